"""The notebooks in docs/: what is committed is clean, and they run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/notebooks"
NAMES = ("quickstart", "forecasting", "sharpness", "own_loop")
COLAB = "https://colab.research.google.com/github/sam-hf/sam_hf/blob/main/docs/notebooks"
PATHS = re.compile(r"(?<![\w.:/])/(work|root|home|tmp|usr|opt|Users)/|\b[A-Z]:\\")
HOURS = 20 * 30 * 24  # 12, 4 and 4 months


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def texts(output: dict[str, Any]) -> str:
    """What an output says; pictures are left out."""
    data = {kind: text for kind, text in output.get("data", {}).items() if "image" not in kind}
    return json.dumps({**output, "data": data}, ensure_ascii=False)


def test_no_notebook_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_on_colab_and_was_run_from_top_to_bottom_without_errors(name):
    first, *_ = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert first["cell_type"] == "markdown" and f"({COLAB}/{name}.ipynb)" in first["source"][0]
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "# !pip install" in "".join(code[0]["source"])
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for text in map(texts, outputs):
        assert "Error" not in text and "Warning" not in text, text
        assert not PATHS.search(text), text
    for cell in (*code, *cells(name, "markdown")):
        assert not PATHS.search("".join(cell["source"]))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 450_000


@pytest.fixture
def etth1(tmp_path):
    """Seven channels of daily waves with noise, in a file like ETTh1's."""
    hours, rng = np.arange(HOURS), np.random.default_rng(0)
    frame = pd.DataFrame({"date": pd.date_range("2016-07-01", periods=HOURS, freq="h")})
    for number, channel in enumerate(("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")):
        frame[channel] = np.sin(2 * np.pi * hours / 24 + number) + rng.normal(0, 0.3, HOURS)
    frame.to_csv(tmp_path / "ETTh1.csv", index=False)
    return str(tmp_path / "ETTh1.csv")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, etth1):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    # Without installed kernels there is one, that of this interpreter.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    place = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=300, resources=place)
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client.execute(env={**os.environ, **environment, "ETT_FILE": etth1})
    assert not [path for path in FOLDER.iterdir() if path.suffix != ".ipynb"]

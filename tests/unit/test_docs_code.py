"""The Python code of the README and of the guides runs as it stands, offline."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from slow import slow_unless

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs/quickstart.md", *sorted(ROOT.glob("docs/guides/*.md"))]
BLOCK = re.compile(r"^<!-- runs -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS = {"trl": "trl", "peft": "peft", "sentence_transformers": "sentence_transformers"}
NEEDS |= {"choosing_rho": "optuna"}


def blocks(page: Path) -> list[tuple[int, str]]:
    """The marked blocks of a page, each with the number of lines before it."""
    text = page.read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the blocks in order, in one module; a traceback shows the line of the page."""
    pytest.importorskip(NEEDS.get(page.stem, "sklearn"))
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # checkpoints pickle its classes
    for lines, code in blocks(page):
        exec(compile("\n" * lines + code, str(page), "exec"), module.__dict__)
    return module.__dict__


@slow_unless(page=lambda page: page.name != "README.md")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: p.stem)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(page, monkeypatch)
    if page.name == "README.md":  # 0.849; plain training: 0.539
        assert names["trainer"].evaluate()["eval_accuracy"] > 0.7


def test_the_readme_and_most_guides_have_code_that_is_run():
    assert blocks(ROOT / "README.md")
    assert sum(bool(blocks(page)) for page in PAGES) >= len(PAGES) / 2

"""Imports go one way, and importing the package is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sam_hf

PACKAGE = Path(sam_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each module may import those before it in this list, and no other one of the package.
ORDER = [
    "",  # the package itself: its version
    "methods",
    "params",
    "side_effects",
    "replay",
    "loss_scale",
    "perturbation",
    "options_file",
    "checks",
    "exclusions",
    "config",
    "model_card",
    "publishing",
    "adapters",
    "backends",
    "schedule",
    "readings",
    "sampling",
    "memory",
    "combination",
    "run",
    "integrations",
    "guard",
    "update",
    "trainer",
    "diagnostics",
    "cli_arguments",
    "cli",
]


def imports(path):
    """The imported modules: ('.name' for one of this package, however deep) and top-level names."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(path.relative_to(PACKAGE).parts) - 1:  # not of its own folder
                inside.add(node.module or "")
            elif node.level:
                continue
            else:
                outside.add(node.module)
    return inside, outside


def layer(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


MATHS = [
    path
    for path in FILES
    if layer(path) in ("methods", "replay", "params", "side_effects", "perturbation")
]


@pytest.mark.parametrize("path", MATHS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_maths_imports_torch_alone(path):
    _, outside = imports(path)
    foreign = {name.split(".")[0] for name in outside} - set(sys.stdlib_module_names) - {"torch"}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if layer(path) == "__init__":
        return
    inside, _ = imports(path)
    allowed = ORDER[: ORDER.index(layer(path))]
    assert {name.split(".")[0] for name in inside} <= set(allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_backends_know_of_processes(path):
    _, outside = imports(path)
    known = {name for name in outside if name.startswith(("torch.distributed", "accelerate"))}
    assert not known or layer(path) == "backends"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 350


def test_import_of_the_package_loads_neither_torch_nor_the_trainer():
    code = (
        "import sys, transformers; before = set(sys.modules); import sam_hf;"
        "new = {m for m in set(sys.modules) - before if not m.startswith('sam_hf')};"
        "print(sorted(new)); assert len(new) < 5; assert 'torch' not in new;"
        "assert set(sam_hf.__all__) <= set(dir(sam_hf)); sam_hf.SAMTrainer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_name_raises_as_any_module_does():
    with pytest.raises(AttributeError, match="has no attribute 'SAMTainer'"):
        sam_hf.SAMTainer  # noqa: B018

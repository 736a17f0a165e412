"""Imports between the folders of the package go one way, and importing the package is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sam_hf

PACKAGE = Path(sam_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The folders that the files of a folder may import from, besides their own, the version in
# `sam_hf/__init__.py`, and `sam_hf/compat.py`.
ALLOWED = {
    "methods": set(),
    "config": {"methods"},
    "engine": {"config", "methods"},
    "distributed": {"config", "engine", "methods"},
    "hub": {"config", "engine", "methods"},
    "trainer": {"engine", "distributed", "hub", "config", "methods"},
    "diagnostics": {"trainer", "engine", "distributed", "hub", "config", "methods"},
    "cli": {"diagnostics", "trainer", "engine", "distributed", "hub", "config", "methods"},
}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports: modules, and names in them."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def folder_of(path: Path) -> str:
    """The folder directly below the package; "" for a file of the package itself."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def is_below(name: str, *modules: str) -> bool:
    """Whether a name is one of the modules, or in one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def test_every_folder_has_its_place_in_the_order_and_no_two_import_each_other():
    assert {folder_of(path) for path in FILES} - {""} == set(ALLOWED)
    below = {""}
    for folder, allowed in sorted(ALLOWED.items(), key=lambda item: len(item[1])):
        assert allowed <= below, folder
        below.add(folder)


@each_file
def test_a_file_imports_only_from_folders_below_its_own(path):
    folder = folder_of(path)
    if not folder:
        return  # the package itself re-exports from everywhere, on first access
    inside = {name.split(".")[1] for name in imported(path) if is_below(name, "sam_hf")}
    assert inside - {"__version__", "compat"} <= ALLOWED[folder] | {folder}


@each_file
def test_the_methods_import_torch_alone(path):
    if folder_of(path) != "methods":
        return
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "sam_hf"}


@each_file
def test_the_engine_knows_no_trainer(path):
    if folder_of(path) != "engine":
        return
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "safetensors", "sam_hf"}


@each_file
def test_only_one_folder_knows_of_processes(path):
    known = {name for name in imported(path) if is_below(name, "torch.distributed", "accelerate")}
    assert not known or folder_of(path) == "distributed" or path.name == "compat.py"


def test_imports_are_found_however_they_are_written(tmp_path, monkeypatch):
    """The tests above see what they are to refuse."""
    lines = [
        "from .. import cli",
        "from ..trainer.mixin import SAMTrainer",
        "from . import layout",
        "import torch.distributed as dist",
        "from torch import distributed",
        "def late():\n    from accelerate.utils import DistributedType",
    ]
    path = tmp_path / "sam_hf" / "engine" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "sam_hf")
    assert set(imported(path)) == {
        "sam_hf.cli",
        "sam_hf.trainer.mixin.SAMTrainer",
        "sam_hf.engine.layout",
        "torch.distributed",
        "accelerate.utils.DistributedType",
    }
    for test in (
        test_a_file_imports_only_from_folders_below_its_own,
        test_the_engine_knows_no_trainer,
        test_only_one_folder_knows_of_processes,
    ):
        with pytest.raises(AssertionError):
            test(path)


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

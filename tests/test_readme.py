"""The README, and the files beside it, agree with the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sam_hf import SAMConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_options_table_has_every_field_with_its_default():
    table = README.split("## Options")[1].split("\n\n**")[0]
    rows = dict(re.findall(r"^\| `(sam_\w+)` \| `?(.*?)`? \|", table, re.MULTILINE))
    assert list(rows) == [f.name for f in fields(SAMConfig)]
    for f in fields(SAMConfig):
        default = f.default if isinstance(f.default, str) else json.dumps(f.default)
        assert rows[f.name] == default


def test_every_file_that_the_readme_names_exists():
    named = re.findall(
        r"(?:scripts|configs|docs|sam_hf|tests)/[\w./]+\.(?:py|yaml|png|json)", README
    )
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and "TODO" not in README


def test_every_script_and_recipe_is_in_the_readme():
    for path in [*ROOT.glob("scripts/*_*.py"), *ROOT.glob("configs/*.yaml")]:
        is_command = path.suffix == ".yaml" or "__main__" in path.read_text()
        assert not is_command or f"{path.parent.name}/{path.name}" in README, path.name


def test_ci_runs_the_test_command_of_the_readme():
    command = README.split("<!-- tests -->\n```bash\n")[1].split("\n```")[0]
    assert command.count("\n") == 0 and "pytest" in command
    assert "<!-- tests -->" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate"])
def test_the_tested_versions_satisfy_the_declared_ones(name):
    declared = re.search(rf'"{name}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.findall(rf"^{name}==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert declared and pinned
    for version in pinned:
        assert tuple(map(int, version.split("."))) >= tuple(map(int, declared[1].split(".")))

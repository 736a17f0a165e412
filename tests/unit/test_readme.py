"""The README, and the files beside it, agree with the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sam_hf import SAMConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_options_table_has_every_field_with_its_default():
    table = README.split("## Options")[1].split("\n\n**")[0]
    rows = dict(re.findall(r"^\| `(sam_\w+)` \| `?(.*?)`? \|", table, re.MULTILINE))
    assert list(rows) == [f.name for f in fields(SAMConfig)]
    for f in fields(SAMConfig):
        default = f.default if isinstance(f.default, str) else json.dumps(f.default)
        assert rows[f.name] == default


def test_every_file_that_the_readme_names_exists():
    # Links are absolute, so that they work on the package index too.
    text = re.sub(r"https://[\w.]+/sam-hf/sam_hf/(?:blob/)?main/", "", README)
    named = re.findall(r"(?:scripts|configs|docs|sam_hf|tests)/[\w./]+\.(?:py|yaml|png|json)", text)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


_WITH_TWINS = (
    "test_exactness.py",
    "test_trl_twins.py",
    "test_sentence_transformers.py",
    "test_peft.py",
)


def test_every_trainer_that_works_is_held_by_a_test():
    trl = pytest.importorskip("trl")
    from text_trainers import TRL

    table = README.split("## Works with")[1].split("\n\nTRL's")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)`", row)
        assert bool(tests) == ("| not tested |" not in row), row
        assert all(any((ROOT / "tests").rglob(name)) for name in tests), row
        assert "| twin" not in row or any(name in _WITH_TWINS for name in tests), row
    works = "\n".join(row for row in rows if "| works" in row)
    named = set(re.findall(r"`(\w*Trainer)`", works))
    tested = {row.trainer.__name__ for row in TRL.values()}
    assert named - tested == {"Trainer", "Seq2SeqTrainer", "SentenceTransformerTrainer"}
    assert tested <= named
    stable = {name for name in trl.__all__ if name.endswith("Trainer")}
    assert stable <= named


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and "TODO" not in README


def test_every_script_and_recipe_is_in_the_readme():
    for path in [*ROOT.glob("scripts/*_*.py"), *ROOT.glob("configs/**/*.yaml")]:
        is_command = path.suffix == ".yaml" or "__main__" in path.read_text()
        assert not is_command or path.name in README, path.name


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

"""The README, the guides and the declared versions agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
GUIDES = ROOT / "docs" / "guides"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def test_the_readme_is_read_in_a_few_minutes():
    assert README.count("\n") <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page):
    # Links of the README are absolute, so that they work on the package index too.
    text = re.sub(r"https://[\w.]+/sam-hf/sam_hf/(?:blob/)?main/", "", page.read_text("utf-8"))
    pattern = r"(?<![\w./])(?:scripts|configs|docs|sam_hf|tests)/[\w./]+\.(?:py|yaml|png|json|md)"
    for name in re.findall(pattern, text):
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

    table = (GUIDES / "trl.md").read_text("utf-8").split("## Works with")[1]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_nothing_is_left_to_fill_in(page):
    text = page.read_text("utf-8")
    assert not [mark for mark in ("@@", "TODO", "caption: owner") if mark in text]


def test_every_script_and_recipe_is_in_the_guides():
    guides = "".join(
        (GUIDES / name).read_text("utf-8") for name in ("scripts.md", "distributed.md")
    )
    for path in [*ROOT.glob("scripts/*_*.py"), *ROOT.glob("configs/**/*.yaml")]:
        is_command = path.suffix == ".yaml" or "__main__" in path.read_text()
        assert not is_command or path.name in guides, path.name


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

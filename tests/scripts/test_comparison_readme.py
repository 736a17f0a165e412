"""The README's tables of results are those of the files with all runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from readme_tables import TABLES, main, with_tables  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKS = re.findall(r"<!-- table: (\S+) (\S+) -->", README)


def test_the_tables_are_made_from_the_committed_results(capsys):
    assert MARKS and with_tables(README, ROOT / "docs") == README
    assert main(["--check"]) == 0
    assert "those of the files" in capsys.readouterr().out


def test_a_table_that_was_changed_by_hand_is_noticed():
    numbers = re.compile(r"(<!-- table: .*?\n(?:.*\n){3}.*?)0\.\d", re.MULTILINE)
    changed = numbers.sub(r"\g<1>0.0", README, count=1)
    assert changed != README and with_tables(changed, ROOT / "docs") == README


def test_every_interval_in_the_text_is_that_of_a_table_of_the_results():
    """Also of tables that the README does not show: the gain at each level."""
    every = "\n".join(
        with_tables(f"<!-- table: {name} {kind} -->\n", ROOT / "docs")
        for name, shown in set(MARKS)
        for kind in (TABLES if shown != "radius" else ["radius"])
    )
    interval = re.compile(r"(?<![\d.])[+-]?\d+\.\d+(?: points)? \[[+-]?\d+\.\d+, [+-]?\d+\.\d+\]")
    text = "\n".join(line for line in README.splitlines() if not line.startswith("|"))
    stated = [found.replace(" points", "") for found in interval.findall(text)]
    assert len(stated) > 10
    cells = set(interval.findall(every))
    assert [found for found in stated if found not in cells] == []


def test_every_file_of_results_has_its_table_and_its_picture():
    files = {f.stem for f in (ROOT / "docs").glob("*.json")}
    assert files == {name for name, _ in MARKS}
    for name in files:
        assert (ROOT / "docs" / f"{name}.png").exists() and f"docs/{name}.png" in README


def test_results_with_a_recipe_that_is_not_finished_make_no_table(tmp_path):
    name = next(name for name, kind in MARKS if kind == "main")
    content = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    recipe = list(content["recipes"])[-1]
    content["runs"].remove(next(run for run in content["runs"] if run["recipe"] == recipe))
    (tmp_path / "part.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"part.json: left out: {recipe}"):
        with_tables("<!-- table: part main -->\n\n", tmp_path)


@pytest.mark.parametrize("mark", ["no_such_file main", "compare_methods_digits other"])
def test_a_mark_that_names_nothing_is_refused(mark):
    with pytest.raises(ValueError, match="there must be a file"):
        with_tables(f"<!-- table: {mark} -->\n\n", ROOT / "docs")

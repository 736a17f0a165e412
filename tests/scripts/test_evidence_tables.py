"""The tables of docs/evidence/ are those of the files of docs/results/, and so are the numbers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import evidence_tables  # noqa: E402
from evidence_tables import PAGES, RESULTS, TABLES, main, with_tables  # noqa: E402

TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES.glob("*.md")}
MARKS = [
    mark for text in TEXTS.values() for mark in re.findall(r"<!-- table: (\S+) (\S+) -->", text)
]
INTERVAL = re.compile(r"(?<![\d.])[+-]?\d+\.\d+(?: points| %)? \[[+-]?\d+\.\d+, [+-]?\d+\.\d+\]")


def test_the_tables_are_made_from_the_committed_results(capsys):
    assert MARKS and all(with_tables(text, RESULTS) == text for text in TEXTS.values())
    assert main(["--check"]) == 0
    assert "those of the files" in capsys.readouterr().out


def test_the_picture_of_the_readme_is_drawn_from_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_tables, "PICTURE", tmp_path / "picture.png")
    assert main(["--check", "--picture"]) == 0
    assert (tmp_path / "picture.png").stat().st_size > 50_000


def test_a_table_that_was_changed_by_hand_is_noticed():
    numbers = re.compile(r"(<!-- table: .*?\n(?:.*\n){3}.*?)0\.\d", re.MULTILINE)
    text = TEXTS["label_noise"]
    changed = numbers.sub(r"\g<1>0.0", text, count=1)
    assert changed != text and with_tables(changed, RESULTS) == text


def test_every_interval_in_a_text_is_that_of_a_table_of_the_results():
    """Also of tables that no page shows, such as the gain at each level."""
    of_one = {name for names, shown in MARKS for name in names.split(",") if shown != "radius"}
    marks = {(name, kind) for name in of_one for kind in ("main", "gain", "measures", "mse")}
    marks -= {(name, "mse") for name in of_one if not name.startswith("etth")}
    every = "\n".join(
        with_tables(f"<!-- table: {name} {kind} -->\n", RESULTS)
        for name, kind in {*marks, *MARKS}
        if kind != "mse" or name in of_one
    )
    text = "\n".join(
        line for page in TEXTS.values() for line in page.splitlines() if not line.startswith("|")
    )
    stated = [re.sub(" points| %", "", found) for found in INTERVAL.findall(text)]
    assert len(stated) > 10
    cells = set(INTERVAL.findall(every))
    assert [found for found in stated if found not in cells] == []


def test_every_file_of_results_has_its_table():
    named = {name for names, _ in MARKS for name in names.split(",")}
    assert {file.stem for file in RESULTS.glob("*.json")} == named


@pytest.mark.parametrize("kind", sorted(TABLES.keys() - {"radius"}))
def test_results_with_a_recipe_that_is_not_finished_make_no_table(kind, tmp_path):
    name = next(names for names, shown in MARKS if shown == kind).split(",")[0]
    content = json.loads((RESULTS / f"{name}.json").read_text())
    recipe = list(content["recipes"])[-1]
    content["runs"].remove(next(run for run in content["runs"] if run["recipe"] == recipe))
    (tmp_path / "part.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"part.json: left out: .*{recipe}"):
        with_tables(f"<!-- table: part {kind} -->\n\n", tmp_path)


@pytest.mark.parametrize(
    ("mark", "message"),
    [("no_such_file main", "no file no_such_file.json"), ("digits other", "no kind 'other'")],
)
def test_a_mark_that_names_nothing_is_refused(mark, message):
    with pytest.raises(ValueError, match=message):
        with_tables(f"<!-- table: {mark} -->\n\n", RESULTS)


def test_every_kind_of_table_is_used():
    assert {kind for _, kind in MARKS} == set(TABLES)

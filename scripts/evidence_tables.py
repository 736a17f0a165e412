"""Write the tables of docs/evidence/ from the files in docs/results/, which hold every run.

    python scripts/evidence_tables.py            # after a file of docs/results/ has changed
    python scripts/evidence_tables.py --check    # list the pages that differ; exit 1 if one does
    python scripts/evidence_tables.py --picture  # the README's, of etth1.json and etth2.json

A table follows a line `<!-- table: FILE KIND -->`. FILE is the name of a file of docs/results/
without its ending, a `results.json` of `compare_methods.py`, or several with commas between. KIND:

    main        scores, gains and costs of each recipe
    gain        gains at each level
    measures    calibration, robustness and sharpness
    recipes     each recipe's cost, and its gain and share of SAM's on each of the files
    robustness  what models of SAM and of plain training lose by shifts of data and weights
    summary     a line for each recipe of each file: the means over the levels
    mse         forecasts: the errors of the last epoch
    selected    forecasts: the errors of the epoch with the least validation error
    radius      of a `results.json` of `compare_radius.py`
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare import radius, series
from compare.comparison import Comparison, default_reference
from compare.plot import draw_errors
from compare.report import (
    gain_table,
    main_table,
    measures_table,
    recipes_table,
    robustness_table,
    summary_table,
)
from compare.results import read_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES, PICTURE = ROOT / "docs" / "evidence", ROOT / "docs" / "forecasting.png"
_PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)(?:\|.*\n)*")


def of_one(make: Callable[[Comparison], str]) -> Callable[[list[Path]], str]:
    def table(files: list[Path]) -> str:
        (file,) = files
        return make(Comparison(finished(file), "sam"))

    return table


def finished(file: Path) -> dict[str, Any]:
    """The content of a results file; a ValueError if runs are missing."""
    content = read_results(file)
    if notes := Comparison(content, default_reference(content["recipes"])).notes:
        raise ValueError(f"{file.name}: {notes[0]}: finish them, or remove them")
    return content


def radius_table(files: list[Path]) -> str:
    (file,) = files
    tasks = radius.read_study(file, None).items()
    return radius.table([row for name, content in tasks for row in radius.rows(name, content)])


TABLES: dict[str, Callable[[list[Path]], str]] = {
    "main": of_one(main_table),
    "gain": of_one(gain_table),
    "measures": of_one(measures_table),
    "recipes": lambda files: recipes_table([Comparison(finished(f), "sam") for f in files]),
    "robustness": lambda files: robustness_table({f.stem: finished(f) for f in files}, "auto"),
    "summary": lambda files: summary_table({f.stem: finished(f) for f in files}),
    "mse": lambda files: series.table([finished(f) for f in files], "mse"),
    "selected": lambda files: series.table([finished(f) for f in files], "selected_mse"),
    "radius": radius_table,
}


def with_tables(text: str, folder: Path) -> str:
    """The text with each table made from its files.

    Raises:
        ValueError: a mark names no file or kind, or runs are missing.
    """

    def table(place: re.Match[str]) -> str:
        mark, names, kind = place.group(1, 2, 3)
        files = [folder / f"{name}.json" for name in names.split(",")]
        missing = [file.name for file in files if not file.exists()]
        if kind not in TABLES or missing:
            reason = f"no file {missing[0]} in {folder.name}/" if missing else f"no kind {kind!r}"
            raise ValueError(f"{mark.strip()}: {reason}; the kinds are {', '.join(TABLES)}")
        return f"{mark}{TABLES[kind](files)}\n"

    return _PLACE.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--picture", action="store_true", help="draw docs/forecasting.png too")
    args = parser.parse_args(argv)
    check = args.check
    if args.picture:
        contents = [finished(RESULTS / f"{name}.json") for name in ("etth1", "etth2")]
        draw_errors(contents, "96 steps", PICTURE)
        print(f"{PICTURE.name}: drawn")
    differ = False
    for page in sorted(PAGES.glob("*.md")):
        old = page.read_text("utf-8")
        new = with_tables(old, RESULTS)
        differ |= new != old
        if check and new != old:
            print(f"{page.name} has tables that differ from docs/results/", file=sys.stderr)
        elif new != old:
            page.write_text(new, encoding="utf-8")
            print(f"{page.name}: written")
    if not differ:
        print("the tables are those of the files")
    return int(check and differ)


if __name__ == "__main__":
    sys.exit(main())

"""Write the README's tables of results from the files in docs/ that hold every run.

    python scripts/readme_tables.py            # after a file of docs/ has changed
    python scripts/readme_tables.py --check    # say which tables differ; exit 1 if one does

A table stands below a line `<!-- table: FILE KIND -->`. FILE is the name of a
file of docs/ without its ending, a `results.json` of `compare_methods.py`; KIND is `main` (scores,
gains, costs), `gain` (gains at each level) or `measures` (calibration, corrupted images,
sharpness). Of a `results.json` of `compare_radius.py` it is `radius`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from compare import radius
from compare.report import Comparison, gain_table, main_table, measures_table
from compare.results import read_results

ROOT = Path(__file__).parents[1]
TABLES = {"main": main_table, "gain": gain_table, "measures": measures_table}
_PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n)(?:\|.*\n)*")


def with_tables(text: str, folder: Path) -> str:
    """The text with each table made from its file.

    Raises:
        ValueError: a mark names no file or kind, or runs are missing.
    """

    def table(place: re.Match[str]) -> str:
        mark, name, kind = place.group(1, 2, 3)
        file = folder / f"{name}.json"
        if kind not in (*TABLES, "radius") or not file.exists():
            raise ValueError(
                f"{mark.strip()}: there must be a file {file.name} in {folder.name}/, and the kind "
                f"must be one of {', '.join(TABLES)}, radius"
            )
        if kind == "radius":
            tasks = radius.read_study(file, None).items()
            rows = [row for name, content in tasks for row in radius.rows(name, content)]
            return f"{mark}{radius.table(rows)}\n"
        comparison = Comparison(read_results(file), "sam")
        if comparison.notes:
            raise ValueError(f"{file.name}: {comparison.notes[0]}: finish them, or remove them")
        return f"{mark}{TABLES[kind](comparison)}\n"

    return _PLACE.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(argv).check
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    new = with_tables(old, ROOT / "docs")
    if new == old:
        print("the tables are those of the files")
        return 0
    if check:
        print("README.md has tables that differ from docs/", file=sys.stderr)
        return 1
    readme.write_text(new, encoding="utf-8")
    print("README.md: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

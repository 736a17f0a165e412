"""The README's table of methods is that of the results beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from comparison_report import main_table, make_rows  # noqa: E402


def test_the_table_of_methods_is_made_from_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "docs" / "compare_methods_digits.json").read_text("utf-8"))
    shown = readme.split("<!-- methods table -->")[1].split("\n\n")[0].strip()
    rows, _ = make_rows(results, None, "sam")
    assert shown == main_table(rows)

"""A small comparison: its recipes, options and task, and made-up results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

RECIPES = {
    "plain": {"description": "one pass", "group": "plain", "trainer": "plain"},
    "sam": {"description": "two passes", "options": {"sam_rho": 0.1}},
    "every 2nd": {"description": "now and then", "options": {"sam_rho": 0.1, "sam_interval": 2}},
    "last half": {"description": "late", "options": {"sam_rho": 0.1, "sam_start_ratio": 0.5}},
    "quarter": {
        "description": "ascent on some",
        "options": {"sam_rho": 0.1, "sam_ascent_fraction": 0.25},
    },
}
TINY = ["--max_train_samples", "128", "--per_device_train_batch_size", "32"]
TINY += ["--num_train_epochs", "1", "--label_noise", "0.4", "--seeds", "0", "1"]
TINY += ["--timing_rounds", "1", "--timing_updates", "2", "--use_cpu", "true"]


def write_recipes(folder: Path, recipes: dict, grids: dict | None = None) -> list[str]:
    """The option that names a file with these recipes."""
    file = folder / "recipes.yaml"
    content = {"recipes": recipes, "rho_grids": grids or {"sam": [0.1]}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return ["--recipes_file", str(file)]


def tiny_task() -> tuple[Any, Any]:
    from compare.arguments import Options
    from compare.tasks import build_task

    options = Options(
        max_train_samples=128,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        label_noise=[0.4],
        use_cpu=True,
    )
    return build_task(options), options


def series_file(folder: Path) -> Path:
    """An hourly series in the layout of the ETT files, somewhat longer than their three parts."""
    steps = np.arange(14_500)
    values = np.sin(steps / 24) + 0.1 * np.random.default_rng(0).standard_normal(len(steps))
    dates = pd.date_range("2016-07-01", periods=len(steps), freq="h")
    (folder / "ett").mkdir(parents=True)
    file = folder / "ett" / "series.csv"
    pd.DataFrame({"date": dates, "OT": values}).to_csv(file, index=False)
    return file


def results(scores: dict[tuple[str, str, float], list[float]], **fields: Any) -> dict[str, Any]:
    """A results file's content.

    Args:
        scores: accuracies by seed, of a recipe at a level with a length.
        fields: of every run.
    """
    runs = [
        {"recipe": recipe, "level": level, "length": length, "seed": seed, "accuracy": score}
        | {"passes": 2.0 if recipe == "sam" else length, "tuned_rho": None, **fields}
        for (recipe, level, length), values in scores.items()
        for seed, score in enumerate(values)
    ]
    recipe = {"description": "d", "group": "methods", "options": {}}
    settings = {"task": "trec6", "training_texts": 100}
    return {"settings": settings, "recipes": {"plain": recipe, "sam": recipe}, "runs": runs}


def two_levels(**fields: Any) -> dict[str, Any]:
    """Two recipes, two levels, three seeds, and plain training that is twice as long."""
    kinds = {("plain", 1.0): 0.9, ("sam", 1.0): 1.0, ("plain", 2.0): 0.85}
    levels = ("0", "0.2 at 0.1")
    scores = {(name, at, n): [x] * 3 for (name, n), x in kinds.items() for at in levels}
    return results(scores, **fields)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]

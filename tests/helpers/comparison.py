"""A small comparison of recipes: its recipes, its options and its task."""

from __future__ import annotations

from pathlib import Path

import yaml
from compare.arguments import Options
from compare.tasks import Task, build_task

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


def tiny_task() -> tuple[Task, Options]:
    options = Options(
        max_train_samples=128,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        label_noise=[0.4],
        use_cpu=True,
    )
    return build_task(options), options

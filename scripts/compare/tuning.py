"""The search for rho of `compare_methods.py`: what is best, and on what that rests."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.script_utils import InputError
from common.training_utils import save_json
from compare.data import VALIDATION_SHARE
from compare.recipes import Recipe
from compare.results import ResultsFile, RunSpec, first_difference


def conclude(
    wanted: Sequence[tuple[Recipe, RunSpec]], tried: ResultsFile, rho_file: Path
) -> dict[str, Any]:
    """Print the scores of every rho, and write them with the best ones to `rho_file`.

    Searches of other recipes that stand in the file stay there.
    """
    metric = tried.content["settings"].get("metric", "accuracy")
    scores: dict[str, dict[float, list[float]]] = {}
    for recipe, spec in wanted:
        record = tried.find(spec)
        assert record is not None and recipe.rho is not None
        scores.setdefault(recipe.name, {}).setdefault(recipe.rho, []).append(record[metric])
    best, notes = {}, []
    for name, by_rho in scores.items():
        means = {rho: statistics.fmean(values) for rho, values in by_rho.items()}
        best[name] = max(means, key=means.__getitem__)
        if len(means) > 1 and best[name] in (min(means), max(means)):
            notes.append(f"{name}: the best rho is at an end of its grid: the grid should be wider")
        print(f"{name}: " + ", ".join(f"{rho:g}: {mean:.4f}" for rho, mean in means.items()))
        print(f"  best: {best[name]:g}")
    print(*notes, sep="\n")
    searched = {
        name: {
            "noise": next(spec.level for recipe, spec in wanted if recipe.name == name),
            "seeds": sorted({spec.seed for recipe, spec in wanted if recipe.name == name}),
            metric: {f"{rho:g}": values for rho, values in by_rho.items()},
        }
        for name, by_rho in scores.items()
    }
    before = read_searches(rho_file, tried)
    content = {
        **_head(tried),
        "best": {**before.get("best", {}), **best},
        "searches": {**before.get("searches", {}), **searched},
    }
    save_json(content, rho_file)
    print(f"saved in {rho_file}")
    return content


def read_rho_file(file: Path) -> dict[str, Any]:
    """What --tune has written there; nothing where there is no file.

    Raises:
        InputError: it is no such file.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--rho_file {str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("best"), dict):
        raise InputError(f"--rho_file {str(file)!r} is no file that --tune wrote: it has no `best`")
    return content


def warn_of_other_settings(file: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Say so where the best rho was searched for with another model, schedule or data."""
    # How the final model is measured has no part in what is best.
    trained = {key: value for key, value in settings.items() if key != "sharpness"}
    different = first_difference(found.get("settings"), trained)
    if found and different is not None:
        key, before, now = different
        warnings.warn(
            f"{file}: rho was searched for with {key}={before!r}, and here it is {now!r}: the best "
            "value may be another one",
            stacklevel=2,
        )


def read_searches(file: Path, tried: ResultsFile) -> dict[str, Any]:
    """What an earlier search has written, or nothing.

    Raises:
        InputError: that was with other settings or versions than those of `tried`.
    """
    before, head = read_rho_file(file), _head(tried)
    if not before:
        return {}
    if {key: before.get(key) for key in head} != head:
        raise InputError(
            f"--rho_file {str(file)!r} holds searches with other settings or versions: choose "
            "another file, or remove it"
        )
    return before


def _head(tried: ResultsFile) -> dict[str, Any]:
    settings = tried.content["settings"]
    metric = settings.get("metric", "accuracy").replace("_", " ").capitalize()
    examples = "images" if "training_images" in settings else "texts"
    how = (
        f"{metric} on {VALIDATION_SHARE:.0%} of the training {examples}, left out of the training, "
        f"with their right labels; means over the seeds. The test {examples} had no say."
    )
    return {"how": how, **{key: tried.content[key] for key in ("settings", "versions")}}

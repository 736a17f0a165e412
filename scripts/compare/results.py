"""The results file of `compare_methods.py`, and the search for rho that rests on such a file."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from common.cli import InputError
from common.runs import save_json
from compare.arguments import VALIDATION_SHARE
from compare.recipes import Recipe

import sam_hf
from sam_hf.config.file import replacing


@dataclass(frozen=True)
class RunSpec:
    """Which run of a recipe. `length`: of the training, in units of the plain schedule."""

    recipe: str
    level: str
    seed: int
    length: float = 1.0
    tuned_rho: float | None = None  # set in a run of the search for rho


class ResultsFile:
    """A JSON file with settings, versions and every finished run.

    An InputError if it exists and holds runs of other settings or versions.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "sam_hf": sam_hf.__version__}
        head = json.loads(json.dumps({"settings": settings, "versions": versions}))
        if path.exists():
            self.content = read_results(path)
            self._refuse_difference("", {k: self.content.get(k) for k in head}, head)
        else:
            device = f"CPU ({platform.processor() or platform.machine()})"
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
            self.content = {**head, "device": device, "recipes": {}, "runs": []}
        self._by_spec = {_key(record): record for record in self.content["runs"]}

    def find(self, spec: RunSpec) -> dict[str, Any] | None:
        return self._by_spec.get(_key(asdict(spec)))

    def add(self, record: dict[str, Any]) -> None:
        self.content["runs"].append(record)
        self._by_spec[_key(record)] = record
        self.write()

    def add_recipes(self, recipes: Sequence[Recipe]) -> None:
        """Record the definitions of the recipes; an InputError if the file holds others."""
        for recipe in recipes:
            definition = recipe.definition()
            known = self.content["recipes"].get(recipe.name, definition)
            known = {key: known.get(key) for key in definition}
            self._refuse_difference(f"recipe {recipe.name!r}: ", known, definition)
            texts = {"description": recipe.description, "group": recipe.group}
            self.content["recipes"][recipe.name] = {**texts, **definition}

    def write(self) -> None:
        """Atomic: an interrupt leaves the previous file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def _refuse_difference(self, where: str, theirs: Any, ours: Any) -> None:
        difference = find_difference(theirs, ours)
        if difference is not None:
            raise InputError(
                f"{self.path} was made with {where}{difference}: choose another --output_dir, or "
                "the earlier value"
            )


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file; an InputError if it is none."""
    return check_results(read_json(path, "the results file"), path)


def check_results(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content; an InputError if it is not that of a results file."""
    parts = {"settings": dict, "recipes": dict, "runs": list}
    if not all(isinstance(content.get(name), kind) for name, kind in parts.items()):
        raise InputError(f"{path} is not a results file: it has no settings, recipes and runs")
    for number, run in enumerate(content["runs"]):
        if not isinstance(run, dict) or not {"recipe", "level", "seed", "length"} <= run.keys():
            raise InputError(f"{path} is damaged: run {number} has no recipe, level and seed")
    return content


def read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is not valid JSON ({error})"
        raise InputError(f"{what} {str(path)!r} cannot be read: {reason}") from error
    return content if isinstance(content, dict) else {}


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in RunSpec.__dataclass_fields__)


def find_difference(before: Any, now: Any) -> str | None:
    """The first difference of two nested dictionaries in words; None if there is none."""
    old, new = (pd.json_normalize(x).to_dict("records")[0] for x in (before, now))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            return f"{key}={old.get(key)!r}, and now it is {new.get(key)!r}"
    return None


def conclude_search(records: list[dict], tried: ResultsFile, rho_file: Path) -> dict[str, Any]:
    """Print the scores of every rho, and write them with the best ones to `rho_file`.

    Searches of other recipes in that file are kept.
    """
    metric = tried.content["settings"].get("metric", "accuracy")
    before = read_rho_file(rho_file, tried)
    how = (
        f"{metric} on {VALIDATION_SHARE:.0%} of the training examples, held out, with right labels"
    )
    content = {"how": f"{how}; means over the seeds"}
    content |= {key: tried.content[key] for key in ("settings", "versions")}
    content |= {key: dict(before.get(key, {})) for key in ("best", "searches")}
    for name, tries in pd.DataFrame(records).groupby("recipe", sort=False):
        by_rho = tries.groupby("tuned_rho")[metric]
        means = by_rho.mean()
        content["best"][name] = best = float(means.idxmax())
        content["searches"][name] = {
            "noise": tries["level"].iloc[0],
            "seeds": sorted(set(tries["seed"].tolist())),
            metric: {f"{rho:g}": scores.tolist() for rho, scores in by_rho},
        }
        print(f"{name}: " + ", ".join(f"{rho:g}: {mean:.4f}" for rho, mean in means.items()))
        print(f"  best: {best:g}")
        if len(means) > 1 and best in (means.index.min(), means.index.max()):
            print("  it is at an end of its grid: the grid should be wider")
    save_json(content, rho_file)
    print(f"saved in {rho_file}")
    return content


def read_rho_file(file: Path, tried: ResultsFile | None = None) -> dict[str, Any]:
    """What --tune has written there; nothing if there is no file.

    An InputError if it is another file, or its settings or versions are not those of `tried`.
    """
    if not file.exists():
        return {}
    content = read_json(file, "--rho_file")
    if not isinstance(content.get("best"), dict):
        raise InputError(f"--rho_file {str(file)!r} was not written by --tune: it has no `best`")
    head = ("settings", "versions")
    if tried is not None and any(content.get(key) != tried.content[key] for key in head):
        raise InputError(f"--rho_file {str(file)!r} has other settings or versions: choose another")
    return content


def warn_of_other_settings(file: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Warn if the best rho was searched for with another model, schedule or data."""
    trained = {key: value for key, value in settings.items() if key != "sharpness"}
    difference = find_difference(found.get("settings", trained), trained)
    if difference is not None:
        warnings.warn(
            f"{file}: rho was searched for with {difference}: another value may be best",
            stacklevel=2,
        )

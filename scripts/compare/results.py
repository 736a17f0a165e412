"""The file of results of `compare_methods.py`, and what tells one run of it from another."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common.script_utils import InputError
from compare.recipes import PLAIN, Recipe

import sam_hf

# Settings of some levels alone: human labels may join a file without them, and may rest again.
OF_SOME_LEVELS = ("labels_file",)


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

    Raises:
        InputError: the file holds runs of other settings or versions, or is no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        head = json.loads(json.dumps({"settings": settings, "versions": versions()}))
        if path.exists():
            self.content = read_results(path)
            theirs, ours = self.content["settings"], head["settings"]
            for name in OF_SOME_LEVELS:
                if name in theirs or name in ours:
                    either = theirs.get(name, ours.get(name))
                    theirs.setdefault(name, either)
                    ours.setdefault(name, either)
            self._refuse_difference("", {k: self.content.get(k) for k in head}, head)
        else:
            self.content = {**head, "device": device(), "recipes": {}, "runs": []}
        self._by_spec = {_key(record): record for record in self.content["runs"]}

    def find(self, spec: RunSpec) -> dict[str, Any] | None:
        return self._by_spec.get(_key(asdict(spec)))

    def add(self, record: dict[str, Any]) -> None:
        self.content["runs"].append(record)
        self._by_spec[_key(record)] = record
        self.write()

    def add_recipes(self, recipes: Sequence[Recipe]) -> None:
        """Note what the runs are made of.

        Raises:
            InputError: runs of a recipe are there, made with other options.
        """
        for recipe in recipes:
            definition = json.loads(json.dumps(recipe.definition()))
            known = self.content["recipes"].get(recipe.name)
            if known is not None:
                known = {key: known.get(key) for key in definition}
                self._refuse_difference(f"recipe {recipe.name!r}: ", known, definition)
            texts = {"description": recipe.description, "group": recipe.group}
            self.content["recipes"][recipe.name] = {**texts, **definition}

    def write(self) -> None:
        """All or nothing: an interrupt leaves the file of before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"_{self.path.name}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def _refuse_difference(self, where: str, theirs: Any, ours: Any) -> None:
        different = first_difference(theirs, ours)
        if different is not None:
            key, before, now = different
            raise InputError(
                f"{self.path} was made with {where}{key}={before!r}, and now it is {now!r}: choose "
                "another --output_dir, or go back to what it was"
            )


def read_results(path: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: there is no such file, or it is not one of these.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    parts = {"settings": dict, "recipes": dict, "runs": list}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), kind) for name, kind in parts.items()
    ):
        raise InputError(f"{path} is no file of results: it has no settings, recipes and runs")
    return content


def finished_runs(
    content: dict[str, Any],
    reference: str,
    seeds: Sequence[int] | None = None,
    levels: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The results of some seeds and levels alone, and a line for each seed that is left out.

    Args:
        reference: beside plain training, the recipe that must have run with a seed at every level.
        seeds: those that are asked for; all if None.
        levels: the same.

    Raises:
        InputError: the runs are not whole, or with no seed they are finished.
    """
    done: dict[int, set[tuple[str, str]]] = {}
    for number, run in enumerate(content["runs"]):
        if not isinstance(run, dict) or not {"recipe", "level", "seed", "length"} <= run.keys():
            raise InputError(f"the results are damaged: run {number} has no recipe, level and seed")
        is_asked_for = (seeds is None or run["seed"] in seeds) and (
            levels is None or run["level"] in levels
        )
        if run["length"] == 1 and is_asked_for:
            done.setdefault(run["seed"], set()).add((run["recipe"], run["level"]))
    known = {level for runs in done.values() for _, level in runs}
    wanted = {(recipe, level) for recipe in (PLAIN, reference) for level in known}
    unfinished = {seed: wanted - runs for seed, runs in sorted(done.items()) if wanted - runs}
    kept = done.keys() - unfinished.keys()
    if not kept:
        raise InputError(
            f"{PLAIN} and {reference} have not been run at every level with any seed yet"
        )
    runs = [run for run in content["runs"] if run["seed"] in kept and run["level"] in known]
    notes = [
        f"left out: seed {seed}, {len(missing)} runs of {PLAIN} and {reference} are missing"
        for seed, missing in unfinished.items()
    ]
    return {**content, "runs": runs}, notes


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sam_hf": sam_hf.__version__,
    }


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.processor() or platform.machine()})"


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in RunSpec.__dataclass_fields__)


def first_difference(before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Where two nested dictionaries differ first, and what stands there; None if nowhere."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
    return {key: item for part in parts for key, item in part.items()}

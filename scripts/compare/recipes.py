"""The recipes of `compare_methods.py`: ways to perturb, read from a YAML file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from common.script_utils import InputError, closest, read_yaml
from compare import third_party_sam

from sam_hf import SAMConfig

PLAIN = "plain"
TRAINERS = (PLAIN, "sam_hf", third_party_sam.PACKAGE)
_KEYS = ("description", "group", "trainer", "optimizer", "rho_of", "options")


@dataclass
class Recipe:
    """One row of the comparison.

    Args:
        description: one line for the reader of the table.
        group: what kind of recipe it is; recipes of one group have one colour in the picture.
        trainer: one of `TRAINERS`.
        optimizer: the class of the other package, where that is the trainer.
        rho_of: the recipe whose search for rho this one relies on; its own name if not given.
        options: those of `SAMConfig`, or those of the other package's optimizer.
    """

    name: str
    description: str
    group: str = "methods"
    trainer: str = "sam_hf"
    optimizer: str | None = None
    rho_of: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rho_key(self) -> str:
        return "sam_rho" if self.trainer == "sam_hf" else "rho"

    @property
    def rho(self) -> float | None:
        """None for plain training, and for a recipe whose rho is not known yet."""
        return self.options.get(self.rho_key)

    def with_rho(self, rho: float) -> Recipe:
        options = {**self.options, self.rho_key: rho}
        return Recipe(**{**vars(self), "options": options})

    def definition(self) -> dict[str, Any]:
        """What the results depend on."""
        definition = {"trainer": self.trainer, "options": self.options}
        if self.trainer == third_party_sam.PACKAGE:
            definition["optimizer"] = self.optimizer
            definition["version"] = third_party_sam.version()
        return definition

    def check(self) -> None:
        """Raise `InputError` for options that the trainer does not have or would ignore."""
        where = f"recipe {self.name!r}"
        if self.trainer not in TRAINERS:
            raise InputError(
                f"{where}: trainer {self.trainer!r} is not allowed. Allowed: {', '.join(TRAINERS)}"
            )
        if self.optimizer is not None and self.trainer != third_party_sam.PACKAGE:
            raise InputError(f"{where}: optimizer has no effect with trainer {self.trainer!r}")
        if self.trainer == PLAIN:
            if self.options or self.rho_of:
                raise InputError(f"{where}: options and rho_of have no effect with trainer 'plain'")
        elif self.trainer == "sam_hf":
            _check_sam_options(where, self.options)
        else:
            third_party_sam.check(where, self.optimizer, self.options)


def _check_sam_options(where: str, options: dict[str, Any]) -> None:
    known = [f.name for f in fields(SAMConfig)]
    for name in options:
        if name not in known:
            raise InputError(f"{where}: SAMConfig has no option {name!r}{closest(name, known)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an option that the method ignores
            SAMConfig(**options)
    except (ValueError, UserWarning) as error:
        raise InputError(f"{where}: {error}") from error


@dataclass
class RecipeBook:
    """All recipes of a file, and the values of rho that a search tries for some of them."""

    file: str
    recipes: dict[str, Recipe]
    grids: dict[str, list[float]]

    @classmethod
    def read(cls, file: str) -> RecipeBook:
        """
        Raises:
            InputError: the file cannot be read, or does not hold what it should.
        """
        content = read_yaml(file, "--recipes_file")
        if not isinstance(content, dict) or set(content) != {"recipes", "rho_grids"}:
            keys = list(content) if isinstance(content, dict) else content
            raise InputError(f"{file} must have the keys recipes and rho_grids, got {keys!r}")
        for key, value in content.items():
            if not isinstance(value, dict) or not value:
                raise InputError(f"{file}: {key} must hold `name: ...` lines, got {value!r}")
        recipes = {str(n): _recipe(file, str(n), r) for n, r in content["recipes"].items()}
        if recipes.get(PLAIN, Recipe("", "")).trainer != PLAIN:
            raise InputError(f"{file}: the recipe 'plain' with `trainer: plain` is needed")
        for name, grid in content["rho_grids"].items():
            if name not in recipes:
                raise InputError(f"{file}: rho_grids: no recipe {name!r}{closest(name, recipes)}")
            if not isinstance(grid, list) or not grid or not all(_is_positive(r) for r in grid):
                raise InputError(
                    f"{file}: rho_grids: {name} must be a list of numbers above 0, got {grid!r}"
                )
        return cls(file, recipes, content["rho_grids"])

    def choose(self, names: Sequence[str] | None, rhos: dict[str, float]) -> list[Recipe]:
        """The recipes of these names (all if None), plain always and first, with their rho.

        Recipes of a package that is not installed are left out, with a line that says so.

        Args:
            rhos: the best rho of each search.

        Raises:
            InputError: a name is unknown, an option is wrong, or a rho is not known.
        """
        chosen = []
        for recipe in self._available(names):
            if recipe.trainer != PLAIN and recipe.rho is None:
                searched = recipe.rho_of or recipe.name
                if searched not in rhos:
                    raise InputError(
                        f"recipe {recipe.name!r} has no {recipe.rho_key}, and no search has found "
                        f"one for {searched!r}: run with --tune, or set it in {self.file}"
                    )
                recipe = recipe.with_rho(rhos[searched])
            recipe.check()
            chosen.append(recipe)
        return chosen

    def to_tune(self, names: Sequence[str] | None) -> list[Recipe]:
        """For each search that these recipes rely on, one recipe for each rho of its grid."""
        trials = []
        for recipe in self._available(names):
            if recipe.name in self.grids:
                trials += [recipe.with_rho(rho) for rho in self.grids[recipe.name]]
        if not trials:
            raise InputError(f"--tune: none of the recipes has a grid in {self.file}")
        for trial in trials:
            trial.check()
        return trials

    def _available(self, names: Sequence[str] | None) -> list[Recipe]:
        for name in names or ():
            if name not in self.recipes:
                hint = closest(name, self.recipes)
                raise InputError(
                    f"--recipes: {self.file} has no recipe {name!r}{hint}; its recipes: "
                    f"{', '.join(self.recipes)}"
                )
        chosen = [r for n, r in self.recipes.items() if names is None or n in (PLAIN, *names)]
        missing = [r.name for r in chosen if r.trainer == third_party_sam.PACKAGE]
        if missing and not third_party_sam.is_installed():
            print(
                f"left out: {', '.join(missing)}. {third_party_sam.PACKAGE} is not installed: "
                "pip install 'sam-hf[benchmark]'"
            )
            chosen = [r for r in chosen if r.name not in missing]
        return sorted(chosen, key=lambda recipe: recipe.name != PLAIN)


def _recipe(file: str, name: str, content: Any) -> Recipe:
    where = f"{file}: recipe {name!r}"
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold `key: value` lines, got {content!r}")
    for key in content:
        if key not in _KEYS:
            raise InputError(
                f"{where}: unknown key {key!r}{closest(key, _KEYS)}. Allowed: {', '.join(_KEYS)}"
            )
    if not content.get("description"):
        raise InputError(f"{where} needs a description, one line")
    options = content.get("options") or {}
    if not isinstance(options, dict):
        raise InputError(f"{where}: options must hold `option: value` lines, got {options!r}")
    return Recipe(name=name, **{**content, "options": options})


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0

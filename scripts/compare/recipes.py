"""The recipes of `compare_methods.py`: ways to perturb, read from a YAML file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from common.cli import InputError, closest, read_yaml
from compare import third_party_sam
from compare.third_party_sam import PACKAGE

from sam_hf import SAMConfig

PLAIN = "plain"
TRAINERS = (PLAIN, "sam_hf", PACKAGE)


@dataclass
class Recipe:
    """One row of the comparison.

    Args:
        description: one line for the reader of the table.
        group: recipes of one group have one colour in the picture.
        trainer: one of `TRAINERS`.
        optimizer: class of the other package, if that is the trainer.
        rho_of: the recipe whose search for rho this one uses; its own name if not given.
        rho_factor: what the rho that was found is multiplied by.
        options: of `SAMConfig`, or of the other package's optimizer.
    """

    name: str
    description: str
    group: str = "methods"
    trainer: str = "sam_hf"
    optimizer: str | None = None
    rho_of: str | None = None
    rho_factor: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rho_key(self) -> str:
        return "sam_rho" if self.trainer == "sam_hf" else "rho"

    @property
    def rho(self) -> float | None:
        """None for plain training, and before the search for rho."""
        return self.options.get(self.rho_key)

    def with_rho(self, rho: float) -> Recipe:
        return replace(self, options={**self.options, self.rho_key: rho})

    def definition(self) -> dict[str, Any]:
        """What the results depend on."""
        definition = {"trainer": self.trainer, "options": self.options}
        if self.trainer == PACKAGE:
            definition |= {"optimizer": self.optimizer, "version": version(PACKAGE)}
        return definition

    def check(self) -> None:
        """Raise an InputError for options that the trainer does not have or would ignore."""
        where = f"recipe {self.name!r}"
        if self.trainer not in TRAINERS:
            raise InputError(f"{where}: trainer {self.trainer!r} is none of {', '.join(TRAINERS)}")
        if self.optimizer is not None and self.trainer != PACKAGE:
            raise InputError(f"{where}: optimizer has no effect with trainer {self.trainer!r}")
        if self.trainer == PLAIN:
            if self.options or self.rho_of:
                raise InputError(f"{where}: options and rho_of have no effect with trainer 'plain'")
        elif self.trainer == PACKAGE:
            third_party_sam.check(where, self.optimizer, self.options)
        else:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # an option that the method ignores
                    # A search finds the rho that is missing here.
                    SAMConfig(**{"sam_rho": 1.0, **self.options})
            except (TypeError, ValueError, UserWarning) as error:
                raise InputError(f"{where}: {error}") from error


@dataclass
class RecipeBook:
    """All recipes of a file, and the values of rho that --tune tries for some of them."""

    file: str
    recipes: dict[str, Recipe]
    grids: dict[str, list[float]]

    @classmethod
    def read(cls, file: str) -> RecipeBook:
        """The content of a YAML file; an InputError if it is not as it should be."""
        content = read_yaml(file, "--recipes_file")
        parts = content if isinstance(content, dict) else {}
        found, grids = parts.get("recipes"), parts.get("rho_grids")
        if len(parts) != 2 or not isinstance(found, dict) or not isinstance(grids, dict):
            raise InputError(f"{file} must hold `recipes:` and `rho_grids:`, each with names")
        recipes = {}
        for name, values in found.items():
            where = f"{file}: recipe {name!r}"
            try:
                recipes[name] = Recipe(name=name, **values)
            except TypeError as error:  # an unknown key, no description, or no keys at all
                reason = str(error).removeprefix("Recipe.__init__() ")
                raise InputError(f"{where}: {reason}") from error
            if not isinstance(recipes[name].options, dict):
                raise InputError(f"{where}: options must hold `option: value` lines")
        if PLAIN not in recipes or recipes[PLAIN].trainer != PLAIN:
            raise InputError(f"{file}: the recipe 'plain' with `trainer: plain` is needed")
        for name, grid in grids.items():
            if name not in recipes:
                raise InputError(f"{file}: rho_grids: no recipe {name!r}{closest(name, recipes)}")
            if not isinstance(grid, list) or not all(isinstance(rho, int | float) for rho in grid):
                raise InputError(f"{file}: rho_grids: {name} must list numbers, got {grid!r}")
        return cls(file, recipes, grids)

    def choose(self, names: Sequence[str] | None, rhos: dict[str, float]) -> list[Recipe]:
        """The recipes of these names (None: all) with their rho; plain training first.

        Recipes of a package that is not installed are left out, with a message.

        Args:
            rhos: the best rho of each search.
        """
        chosen = []
        for recipe in self._available(names):
            if recipe.trainer != PLAIN and recipe.rho is None:
                searched = recipe.rho_of or recipe.name
                if searched not in rhos:
                    raise InputError(
                        f"recipe {recipe.name!r} has no {recipe.rho_key}, and no search has found "
                        f"one for {searched!r}: run with --tune, or give --rho {searched}=NUMBER"
                    )
                recipe = recipe.with_rho(recipe.rho_factor * rhos[searched])
            chosen.append(recipe)
        return _checked(chosen)

    def to_tune(self, names: Sequence[str] | None) -> list[Recipe]:
        """Each of these recipes that has a grid, with each rho of it."""
        trials = [
            recipe.with_rho(rho)
            for recipe in self._available(names)
            for rho in self.grids.get(recipe.name, ())
        ]
        if not trials:
            raise InputError(f"--tune: none of the recipes has a grid in {self.file}")
        return _checked(trials)

    def require(self, names: Iterable[str], option: str) -> None:
        """Raise an InputError if the file has no recipe of one of these names."""
        for name in names:
            if name not in self.recipes:
                where = f"{option}: {self.file}"
                raise InputError(f"{where} has no recipe {name!r}{closest(name, self.recipes)}")

    def _available(self, names: Sequence[str] | None) -> list[Recipe]:
        self.require(names or (), "--recipes")
        chosen = [r for n, r in self.recipes.items() if names is None or n in (PLAIN, *names)]
        missing = [r.name for r in chosen if r.trainer == PACKAGE]
        if missing and not third_party_sam.is_installed():
            how = f"{PACKAGE} is not installed: pip install 'sam-hf[benchmark]'"
            print(f"left out: {', '.join(missing)}. {how}")
            chosen = [r for r in chosen if r.name not in missing]
        return sorted(chosen, key=lambda recipe: recipe.name != PLAIN)


def _checked(recipes: list[Recipe]) -> list[Recipe]:
    for recipe in recipes:
        recipe.check()
    return recipes

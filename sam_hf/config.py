"""The options: `SAMConfig` beside any arguments class, `SAMTrainingArguments` as one object."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils.hub import cached_file

from . import __version__
from .methods import METHODS, Method

SAM_CONFIG_NAME = "sam_config.json"
_SCOPES = ("batch", "micro_batch")
_ADAPTIVE_SCOPES = ("all", "weights")


@dataclass
class SAMConfig:
    """How the weights are perturbed before the gradient that the optimizer sees is taken.

    Raises:
        ValueError: a field has a value that is not allowed. The message names the field, the value
            and what is allowed.
    """

    sam_rho: float = field(
        default=0.05,
        metadata={
            "help": "Size of the perturbation, in the norm of the method. 0 turns SAM off: "
            "training is then bit-identical to the plain Trainer's."
        },
    )
    sam_method: str = field(
        default="sam",
        metadata={"help": f"How the perturbation is made: {', '.join(METHODS)}."},
    )
    sam_eta: float = field(
        default=0.01,
        metadata={"help": "ASAM: added to |w| in T = |w| + eta, so that zero weights can move."},
    )
    sam_adaptive_scope: str = field(
        default="all",
        metadata={
            "help": "ASAM: 'all' scales every parameter by T; 'weights' only those whose name "
            "contains 'weight' (the authors' code), T = 1 on the others. Each needs its own rho."
        },
    )
    sam_scope: str = field(
        default="batch",
        metadata={
            "help": "Which examples share one perturbation: 'batch', all examples of the update; "
            "'micro_batch', those of one micro-batch on one process."
        },
    )
    sam_params: str = field(
        default="all",
        metadata={
            "help": "Which parameters are perturbed: 'all', 'norms' (normalisation layers, by "
            "module type), 'matrices' (weights with two or more dimensions that are not "
            "embeddings), or a regular expression that is searched in the parameters' names."
        },
    )
    sam_replay_rng: bool = field(
        default=True,
        metadata={
            "help": "Use the same dropout masks and noise in both passes. If off, the second pass "
            "draws its own."
        },
    )
    sam_freeze_norm_stats: bool = field(
        default=True,
        metadata={
            "help": "Leave running statistics (BatchNorm) and other buffers untouched by the "
            "second pass. If off, they are updated twice for each batch."
        },
    )
    sam_interval: int = field(
        default=1,
        metadata={"help": "Perturb every k-th update (0, k, 2k, ...); the others are plain."},
    )
    sam_start_ratio: float = field(
        default=0.0,
        metadata={"help": "Train plainly for this part of the updates, from 0 to 1, then perturb."},
    )
    sam_ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Part of the examples that the ascent pass uses. Only 1.0 for the time being."
        },
    )

    def __post_init__(self) -> None:
        # SAMConfig may stand before any arguments class; that class has its own to do.
        parent_post_init = getattr(super(), "__post_init__", None)
        if parent_post_init is not None:
            parent_post_init()
        self.validate_sam()

    def validate_sam(self) -> None:
        """Check the fields. Run again when training begins: a search may have changed them."""
        self._check_number("sam_rho", low=0.0)
        self._check_number("sam_eta", low=0.0)
        self._check_number("sam_start_ratio", low=0.0, high=1.0)
        self._check_number("sam_ascent_fraction", low=1.0, high=1.0)
        self._check_choice("sam_method", METHODS)
        self._check_choice("sam_adaptive_scope", _ADAPTIVE_SCOPES)
        self._check_choice("sam_scope", _SCOPES)
        for name in ("sam_replay_rng", "sam_freeze_norm_stats"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        if type(self.sam_interval) is not int or self.sam_interval < 1:
            self._refuse("sam_interval", "a whole number from 1 up")
        self._check_params()
        self._warn_of_unused_options()

    def build_method(self) -> Method:
        """The method that `sam_method` names, with its options filled in."""
        method = METHODS[self.sam_method]
        return method(**{f.name: getattr(self, f"sam_{f.name}") for f in fields(method)})

    def perturbs(self, update: int, max_updates: int) -> bool:
        """Whether the optimizer step number `update` (from 0) of `max_updates` is a SAM update."""
        started = update >= self.sam_start_ratio * max_updates
        return self.sam_rho > 0 and started and update % self.sam_interval == 0

    def to_sam_dict(self) -> dict[str, Any]:
        """The `sam_*` fields alone, also of a class that has others beside them."""
        return {f.name: getattr(self, f.name) for f in fields(SAMConfig)}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the `sam_*` fields to `sam_config.json` in a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"sam_hf_version": __version__, **self.to_sam_dict()}
        with replacing(folder / SAM_CONFIG_NAME) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> SAMConfig:
        """Read the `sam_config.json` that was saved with a model.

        Args:
            name_or_path: a folder, or the name of a model on the Hub.
            revision, token, cache_dir, local_files_only: for the Hub, as in
                `PreTrainedModel.from_pretrained`.
            **overrides: `sam_*` fields that replace those of the file.

        Returns:
            A `SAMConfig`, also when called on a subclass that needs more than the file holds:
            `SAMTrainingArguments(output_dir=..., **SAMConfig.from_pretrained(...).to_sam_dict())`.

        Raises:
            FileNotFoundError: there is no such file, or the Hub could not be asked for it.
            ValueError: the file is no JSON object, has a key that is no field, or a field has a
                value that is not allowed.
        """
        try:
            file = cached_file(
                name_or_path,
                SAM_CONFIG_NAME,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        except OSError as error:
            raise FileNotFoundError(
                f"{SAM_CONFIG_NAME} could not be read from {str(name_or_path)!r}, which is neither "
                "a folder nor a model on the Hub that holds one: " + " ".join(str(error).split())
            ) from error
        assert file is not None  # else it has raised
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:  # of the JSON or of its encoding
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds {values!r}. Allowed: a JSON object.")
        version = values.pop("sam_hf_version", "unknown")
        unknown = sorted(values.keys() - {f.name for f in fields(SAMConfig)})
        if unknown:
            raise ValueError(
                f"{file}: {', '.join(map(repr, unknown))} is no option of sam_hf {__version__}. "
                f"The file was written by version {version}: install that one, or remove the key."
            )
        try:
            return SAMConfig(**(values | overrides))
        except ValueError as error:
            error.add_note(f"The options were read from {file}, written by sam_hf {version}.")
            raise

    def options_of_other_methods(self) -> list[str]:
        """The fields that have no effect with this `sam_method`."""
        used = {f"sam_{f.name}" for f in fields(METHODS[self.sam_method])}
        known = {f"sam_{f.name}" for method in METHODS.values() for f in fields(method)}
        return sorted(known - used)

    def _check_number(self, name: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and math.isfinite(value) and low <= value <= high:
            return
        if low == high:
            allowed = f"only {low}"
        elif high == math.inf:
            allowed = f"a finite number from {low:g} up"
        else:
            allowed = f"a number from {low:g} to {high:g}"
        self._refuse(name, allowed)

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in tuple(choices):
            self._refuse(name, "one of " + ", ".join(repr(choice) for choice in choices))

    def _check_params(self) -> None:
        allowed = "'all', 'norms', 'matrices' or a regular expression on parameter names"
        if not isinstance(self.sam_params, str) or not self.sam_params:
            self._refuse("sam_params", allowed)
        try:
            re.compile(self.sam_params)
        except re.error as error:
            self._refuse("sam_params", f"{allowed} (this one does not compile: {error})")

    def _refuse(self, name: str, allowed: str) -> None:
        value = getattr(self, name)
        hint = ""
        if isinstance(value, str):
            close = difflib.get_close_matches(value, re.findall(r"'([^']+)'", allowed), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r} is not allowed. Allowed: {allowed}.{hint}")

    def _warn_of_unused_options(self) -> None:
        """A method's option that was set while another method is chosen does nothing: say so."""
        defaults = {f.name: f.default for f in fields(SAMConfig)}
        for name in self.options_of_other_methods():
            if getattr(self, name) != defaults[name]:
                warnings.warn(
                    f"{name}={getattr(self, name)!r} has no effect with "
                    f"sam_method={self.sam_method!r}.",
                    stacklevel=2,
                )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. When the block ends well, what was written there becomes `path`.

    A block that fails (a full disk) leaves the file of before.
    """
    temporary = path.with_name(f"_{path.name}")  # the Trainer never pushes such names
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class SAMTrainingArguments(SAMConfig, TrainingArguments):
    """`TrainingArguments` with the fields of `SAMConfig`: one object, one parser."""

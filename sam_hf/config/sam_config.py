"""The options of SAM: `SAMConfig`, for any arguments class, and `SAMTrainingArguments`."""

import inspect
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from transformers import TrainingArguments

from ..methods import METHODS, Method
from . import checks
from .file import read_options, write_options

_NUMBERS: dict[str, dict[str, float]] = {
    "sam_target_sharpness": {"above": 0.0, "high": 1.0},
    "sam_eta": {"low": 0.0},
    "sam_interval": {"low": 1},
    "sam_start_ratio": {"low": 0.0, "high": 1.0},
    "sam_rho_warmup_ratio": {"low": 0.0, "high": 1.0},
    "sam_ascent_fraction": {"above": 0.0, "high": 1.0},
    "sam_trigger_start": {},
    "sam_trigger_end": {},
}
_CHOICES: dict[str, Collection[str]] = {
    "sam_method": METHODS,
    "sam_adaptive_scope": ("all", "weights"),
    "sam_scope": ("batch", "micro_batch"),
    "sam_rho_schedule": ("constant", "linear", "cosine", "learning_rate"),
    "sam_trigger": ("always", "gradient_norm"),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SAMConfig:
    """The options of SAM, checked when the object is made.

    Raises:
        ValueError: a value that is not allowed. The message names field, value and what is allowed.
        TypeError: an unknown field. The message names the closest one.
    """

    sam_rho: float | str | None = _option(
        None,
        "Norm of the perturbation, in the method's norm. 'auto' (None in Python): found in the "
        "run, by sam_target_sharpness. 0: bit-identical to plain training.",
    )
    sam_target_sharpness: float = _option(
        0.5,
        "Automatic radius: the target sharpness, as a share of the decrease of the loss so far or "
        "of the remaining loss, whichever is smaller.",
    )
    sam_method: str = _option("sam", f"Variant of SAM: {', '.join(METHODS)}.")
    sam_method_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": checks.describe_method_options()}
    )
    sam_eta: float = _option(0.01, "ASAM: T = |w| + eta, so that zero weights can move.")
    sam_adaptive_scope: str = _option(
        "all",
        "ASAM: 'all' scales every parameter by T; 'weights' only those whose name contains "
        "'weight' (the authors' code), T = 1 on the others. Each needs its own rho.",
    )
    sam_scope: str = _option(
        "batch",
        "Which examples share one perturbation: 'batch', all examples of the update; "
        "'micro_batch', those of one micro-batch on one process.",
    )
    sam_params: str = _option(
        "all",
        "Which of the optimizer's parameters are perturbed: 'all', 'norms' (normalisation layers, "
        "by module type), 'matrices' (weights with two or more dimensions that are not "
        "embeddings), or a regular expression that is searched for in parameter names.",
    )
    sam_replay_rng: bool = _option(
        True, "Use the same dropout masks and noise in both passes; off: the second draws new ones."
    )
    sam_freeze_norm_stats: bool = _option(
        True, "Update BatchNorm's statistics and other module state once per batch; off: twice."
    )
    sam_interval: int = _option(1, "Perturb every k-th update (0, k, ...); the others are plain.")
    sam_start_ratio: float = _option(0.0, "Fraction of updates that are plain before SAM starts.")
    sam_ascent_fraction: float = _option(
        1.0,
        "Fraction of the examples of each micro-batch that the ascent pass uses, above 0 to 1; "
        "where micro-batches cannot be cut, fraction of the micro-batches of an update.",
    )
    sam_trigger: str = _option(
        "always",
        "'gradient_norm' (AE-SAM): perturb only if the squared gradient norm is high relative to "
        "its running mean; evaluated only in updates that sam_interval and sam_start_ratio enable.",
    )
    sam_trigger_start: float = _option(
        1.0, "sam_trigger: initial threshold, in standard deviations above the mean (lambda_2)."
    )
    sam_trigger_end: float = _option(-1.0, "sam_trigger: final threshold, likewise (lambda_1).")
    sam_rho_schedule: str = _option(
        "constant",
        "Schedule of rho after its warm-up: 'constant'; 'linear' or 'cosine' decay to sam_rho_min; "
        "'learning_rate', proportional to the learning rate.",
    )
    sam_rho_warmup_ratio: float = _option(
        0.0, "Fraction of the updates after sam_start_ratio in which rho rises from 0 to sam_rho."
    )
    sam_rho_min: float = _option(0.0, "rho at the end of a schedule, or at a learning rate of 0.")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse misspelt options, which the generated `__init__` would report without a hint."""
        parameters = inspect.signature(cls.__init__).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return super().__new__(cls)
        for name in kwargs.keys() - parameters.keys():
            key, value, guess = name.removeprefix("sam_"), kwargs[name], checks.did_you_mean
            owner = next((m for m in METHODS if key in checks.method_options(METHODS[m])), None)
            hint = guess(name, parameters) or guess(f"sam_{name}", parameters)
            if owner:
                hint = f" Pass sam_method_args={{{key!r}: {value!r}}} with sam_method={owner!r}."
            raise TypeError(f"{cls.__name__} has no option {name!r} (={value!r}).{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # SAMConfig may precede any arguments class in the MRO, whose initialisation must run too.
        getattr(super(), "__post_init__", lambda: None)()
        self.validate_sam()

    def validate_sam(self) -> None:
        """Check the fields. Called again when training begins: a search may have changed them."""
        self.sam_rho = checks.parse_rho("sam_rho", self.sam_rho)
        for name, limits in _NUMBERS.items():
            checks.check_number(name, getattr(self, name), whole=name == "sam_interval", **limits)
        highest: dict[str, Any] = {} if self.sam_rho is None else {"high": float(self.sam_rho)}
        checks.check_number("sam_rho_min", self.sam_rho_min, low=0.0, **highest)
        for name, choices in _CHOICES.items():
            checks.check_choice(name, getattr(self, name), choices)
        for name in ("sam_replay_rng", "sam_freeze_norm_stats"):
            checks.check_flag(name, getattr(self, name))
        checks.check_params("sam_params", self.sam_params)
        self.sam_method_args = checks.parse_method_args(self.sam_method_args)
        checks.check_method_args(self.sam_method, self.sam_method_args)
        checks.check_exclusions(self, self.build_method())
        if self.sam_start_ratio == 1:
            warnings.warn("sam_start_ratio=1.0 leaves no update to perturb.", stacklevel=2)
        defaults = {f.name: f.default for f in fields(SAMConfig)}
        for name, reason in self.options_without_effect().items():
            if (value := getattr(self, name)) != defaults[name]:
                warnings.warn(f"{name}={value!r} has no effect with {reason}.", stacklevel=2)

    def build_method(self) -> Method:
        """The method that `sam_method` names, with its options."""
        method = METHODS[self.sam_method]
        shared = {f.name for f in fields(method)} - checks.method_options(method).keys()
        values = {name: getattr(self, f"sam_{name}") for name in shared}
        return method(**values, **checks.parse_method_args(self.sam_method_args))

    def to_sam_dict(self) -> dict[str, Any]:
        """The `sam_*` fields, also of a class that has further fields."""
        return {f.name: getattr(self, f.name) for f in fields(SAMConfig)}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the `sam_*` fields to `sam_config.json` in a folder, created if missing."""
        write_options(Path(save_directory), self.to_sam_dict())

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
    ) -> "SAMConfig":
        """Read the `sam_config.json` that was saved with a model.

        Args:
            name_or_path: a folder, or the name of a model on the Hub.
            revision, token, cache_dir, local_files_only: as in `PreTrainedModel.from_pretrained`.
            **overrides: `sam_*` fields that replace those of the file.

        Returns:
            A `SAMConfig`, also when called on a subclass that needs more than the file holds, as in
            `SAMTrainingArguments(output_dir=..., **SAMConfig.from_pretrained(...).to_sam_dict())`.

        Raises:
            FileNotFoundError: the file does not exist, or the Hub cannot be reached.
            ValueError: the file is not a JSON object, or has an unknown key or a value not allowed.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        known = [f.name for f in fields(SAMConfig)]
        values, origin = read_options(name_or_path, known, local_files_only=local_files_only, **hub)
        try:
            return SAMConfig(**(values | overrides))
        except ValueError as error:
            error.add_note(origin)
            raise

    def options_without_effect(self) -> dict[str, str]:
        """The options that have no effect, each with the option that is the reason."""
        method, name = self.build_method(), f"sam_method={self.sam_method!r}"
        why: dict[str, str] = {}
        if self.sam_method != "asam":
            why |= dict.fromkeys(("sam_eta", "sam_adaptive_scope"), name)
        if method.has_one_pass:
            reason = f"{name}, which has no second pass"
            why |= dict.fromkeys(("sam_replay_rng", "sam_freeze_norm_stats"), reason)
        if self.sam_trigger == "always":
            reason = f"sam_trigger={self.sam_trigger!r}"
            why |= dict.fromkeys(("sam_trigger_start", "sam_trigger_end"), reason)
        if self.sam_rho is not None:
            why["sam_target_sharpness"] = f"sam_rho={self.sam_rho!r}, a fixed radius"
        schedule = f"sam_rho_schedule={self.sam_rho_schedule!r}"
        if self.sam_rho_schedule == "constant":
            why["sam_rho_min"] = schedule
        if self.sam_rho_schedule == "learning_rate":
            why["sam_rho_warmup_ratio"] = f"{schedule}, which warms up as the learning rate does"
        return why


@dataclass
class SAMTrainingArguments(SAMConfig, TrainingArguments):
    """`TrainingArguments` with the fields of `SAMConfig`: one object, one parser."""

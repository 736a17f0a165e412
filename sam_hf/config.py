"""The options: `SAMConfig` beside any arguments class, `SAMTrainingArguments` as one object."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .checks import OptionChecks
from .exclusions import check_exclusions
from .methods import METHODS, Method
from .options_file import read_options, write_options

_SCOPES = ("batch", "micro_batch")
_ADAPTIVE_SCOPES = ("all", "weights")
_RHO_SCHEDULES = ("constant", "linear", "cosine", "learning_rate")
_TRIGGERS = ("always", "gradient_norm")
_BALANCES = ("gradients", "weights")


@dataclass
class SAMConfig(OptionChecks):
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
    sam_alpha: float | None = field(
        default=None,
        metadata={
            "help": "GSAM: weight of the step down the surrogate gap (default 0.6). LookSAM: "
            "weight of the direction that is reused (default 0.7)."
        },
    )
    sam_k: int = field(
        default=5,
        metadata={"help": "LookSAM: two passes every k-th update, one in the others."},
    )
    sam_gamma: float = field(
        default=0.9,
        metadata={
            "help": "WSAM: the sharpness has the weight gamma / (1 - gamma). 0 is plain training, "
            "0.5 SAM (if coupled)."
        },
    )
    sam_decoupled: bool = field(
        default=True,
        metadata={
            "help": "WSAM: step down the sharpness after the optimizer's step instead of within it."
        },
    )
    sam_sigma: float = field(
        default=1.0,
        metadata={"help": "Friendly-SAM: how much of the mean gradient is taken out. 0 is SAM."},
    )
    sam_ema_decay: float = field(
        default=0.9,
        metadata={"help": "Friendly-SAM: decay of the mean gradient from update to update."},
    )
    sam_theta: float = field(
        default=0.9,
        metadata={"help": "VaSSO: weight of the new gradient in the moving average. 1 is SAM."},
    )
    sam_beta: float = field(
        default=0.6,
        metadata={"help": "ESAM: probability with which a parameter is perturbed in an update."},
    )
    sam_rank: int = field(
        default=8,
        metadata={"help": "Bi-LoRA: rank of the pair of factors that does the ascent."},
    )
    sam_balance: str = field(
        default="gradients",
        metadata={
            "help": "BAR: what decides which factor grows, the norms of the 'gradients' (nBAR) or "
            "of the 'weights' (oBAR)."
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
            "help": "Part of the examples of each micro-batch that the ascent pass uses, above 0 "
            "to 1; where micro-batches cannot be cut, part of the micro-batches of an update."
        },
    )
    sam_trigger: str = field(
        default="always",
        metadata={
            "help": "'gradient_norm' (AE-SAM): perturb only where the squared norm of the gradient "
            "is high for the run so far. It is asked in the updates that sam_interval and "
            "sam_start_ratio leave."
        },
    )
    sam_trigger_start: float = field(
        default=1.0,
        metadata={
            "help": "sam_trigger: standard deviations above the mean from which a squared norm is "
            "high, at the beginning (lambda_2 of AE-SAM)."
        },
    )
    sam_trigger_end: float = field(
        default=-1.0,
        metadata={"help": "sam_trigger: the same at the end of the training (lambda_1)."},
    )
    sam_rho_schedule: str = field(
        default="constant",
        metadata={
            "help": "How rho goes on after its warm-up: 'constant', down to sam_rho_min at the end "
            "('linear' or 'cosine'), or in proportion to the learning rate ('learning_rate')."
        },
    )
    sam_rho_warmup_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Part of the updates since sam_start_ratio in which rho rises from 0 to "
            "sam_rho."
        },
    )
    sam_rho_min: float = field(
        default=0.0,
        metadata={"help": "The rho at the end of a schedule, or at a learning rate of 0."},
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
        for name in ("sam_start_ratio", "sam_rho_warmup_ratio"):
            self._check_number(name, low=0.0, high=1.0)
        self._check_number("sam_ascent_fraction", above=0.0, high=1.0)
        self._check_number("sam_rho_min", low=0.0, high=self.sam_rho)
        for name in ("sam_trigger_start", "sam_trigger_end"):
            self._check_number(name, low=-math.inf)
        self._check_choice("sam_method", METHODS)
        self._check_choice("sam_adaptive_scope", _ADAPTIVE_SCOPES)
        self._check_choice("sam_scope", _SCOPES)
        self._check_choice("sam_rho_schedule", _RHO_SCHEDULES)
        self._check_choice("sam_trigger", _TRIGGERS)
        if self.sam_alpha is not None:
            self._check_number("sam_alpha", low=0.0)
        self._check_number("sam_gamma", low=0.0, below=1.0)
        self._check_number("sam_sigma", low=0.0)
        self._check_number("sam_ema_decay", low=0.0, below=1.0)
        for name in ("sam_theta", "sam_beta"):
            self._check_number(name, above=0.0, high=1.0)
        for name in ("sam_replay_rng", "sam_freeze_norm_stats", "sam_decoupled"):
            if not isinstance(getattr(self, name), bool):
                self.refuse(name, "True or False")
        self._check_choice("sam_balance", _BALANCES)
        for name in ("sam_interval", "sam_k", "sam_rank"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                self.refuse(name, "a whole number from 1 up")
        self._check_params("sam_params")
        check_exclusions(self)
        self._warn_of_unused_options()

    def build_method(self) -> Method:
        """The method that `sam_method` names, with its options filled in."""
        method = METHODS[self.sam_method]
        for f in fields(method):
            if not hasattr(self, f"sam_{f.name}"):
                raise TypeError(
                    f"{method.__name__} has the option {f.name!r}, and {type(self).__name__} no "
                    f"field sam_{f.name}: every option of a method is a field of SAMConfig"
                )
        options = {f.name: getattr(self, f"sam_{f.name}") for f in fields(method)}
        return method(**{name: value for name, value in options.items() if value is not None})

    def perturbs(self, update: int, max_updates: int) -> bool:
        """Whether the optimizer step number `update` (from 0) of `max_updates` is a SAM update."""
        started = update >= self.sam_start_ratio * max_updates
        return self.sam_rho > 0 and started and update % self.sam_interval == 0

    def to_sam_dict(self) -> dict[str, Any]:
        """The `sam_*` fields alone, also of a class that has others beside them."""
        return {f.name: getattr(self, f.name) for f in fields(SAMConfig)}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the `sam_*` fields to `sam_config.json` in a folder, which is made if need be."""
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
        values, origin = read_options(
            name_or_path,
            [f.name for f in fields(SAMConfig)],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        try:
            return SAMConfig(**(values | overrides))
        except ValueError as error:
            error.add_note(origin)
            raise

    def options_of_other_methods(self) -> list[str]:
        """The fields that have no effect with this `sam_method`."""
        used = {f"sam_{f.name}" for f in fields(METHODS[self.sam_method])}
        known = {f"sam_{f.name}" for method in METHODS.values() for f in fields(method)}
        return sorted(known - used)

    def _warn_of_unused_options(self) -> None:
        """An option that was set while another one lets it do nothing: say so."""
        because = dict.fromkeys(self.options_of_other_methods(), f"sam_method={self.sam_method!r}")
        if METHODS[self.sam_method].has_one_pass():
            why = f"sam_method={self.sam_method!r}, which has no second pass"
            because |= dict.fromkeys(("sam_replay_rng", "sam_freeze_norm_stats"), why)
        if self.sam_trigger == "always":
            names = ("sam_trigger_start", "sam_trigger_end")
            because |= dict.fromkeys(names, f"sam_trigger={self.sam_trigger!r}")
        schedule = f"sam_rho_schedule={self.sam_rho_schedule!r}"
        if self.sam_rho_schedule == "constant":
            because["sam_rho_min"] = schedule
        if self.sam_rho_schedule == "learning_rate":
            because["sam_rho_warmup_ratio"] = (
                f"{schedule}, which warms up as the learning rate does"
            )
        if self.sam_start_ratio == 1:
            warnings.warn("sam_start_ratio=1.0 leaves no update to perturb.", stacklevel=2)
        defaults = {f.name: f.default for f in fields(SAMConfig)}
        for name, reason in because.items():
            if getattr(self, name) != defaults[name]:
                warnings.warn(
                    f"{name}={getattr(self, name)!r} has no effect with {reason}.", stacklevel=2
                )


@dataclass
class SAMTrainingArguments(SAMConfig, TrainingArguments):
    """`TrainingArguments` with the fields of `SAMConfig`: one object, one parser."""

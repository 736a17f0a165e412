"""Which updates are perturbed, at which rho, and what that costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config import SAMConfig
from ..methods.base import State
from ..methods.lists import is_usable


def rho_at(
    config: SAMConfig, update: int, max_updates: int, learning_rate_share: float
) -> float | None:
    """rho of update number `update` (from 0) of `max_updates`; 0 where the update is plain.

    None where it is automatic.

    With `sam_rho_schedule="learning_rate"`, as in GSAM for a lowest learning rate of 0 (Zhuang et
    al. 2022, https://arxiv.org/abs/2203.08065, section 4.4):
    rho_t = rho_min + (rho_max - rho_min) lr_t / lr_max, with `learning_rate_share` lr_t / lr_max.
    """
    start = config.sam_start_ratio * max_updates
    if config.sam_rho == 0 or update < start or update % config.sam_interval:
        return 0.0
    if config.sam_rho is None:
        return None
    high, low = float(config.sam_rho), config.sam_rho_min
    if config.sam_rho_schedule == "learning_rate":
        return low + (high - low) * learning_rate_share
    done = (update - start) / max(max_updates - start, 1)
    warmup = config.sam_rho_warmup_ratio
    is_warm = done >= warmup
    if is_warm and config.sam_rho_schedule == "constant":
        return high
    share = 1 - (done - warmup) / max(1 - warmup, 1e-12) if is_warm else done / warmup
    if config.sam_rho_schedule == "cosine":
        share = (1 + math.cos(math.pi * (1 - share))) / 2
    return low + (high - low) * share if is_warm else high * share


def learning_rate_share(optimizer: Any) -> float:
    """lr_t / lr_max, the largest over the parameter groups.

    lr_max is the learning rate that the scheduler multiplies; for a scheduler that does not
    multiply one, such as ReduceLROnPlateau, the optimizer's initial learning rate.
    """
    usual = getattr(optimizer, "defaults", {}).get("lr")  # DeepSpeed's optimizers have no defaults
    groups = optimizer.param_groups if optimizer is not None else []
    rates = [(group["lr"], group.get("initial_lr", usual)) for group in groups]
    return max((float(lr) / float(highest) for lr, highest in rates if highest), default=1.0)


def interval_of(config: SAMConfig) -> int:
    """Number of updates from one with a descent pass to the next."""
    return max(config.sam_interval, config.build_method().interval)


def expected_passes(
    config: SAMConfig, max_updates: int, share: float | None = None, first_rate: float = 1.0
) -> float:
    """Forward-backward passes per update, averaged over the run; plain training has 1.

    With `sam_trigger` this is an upper bound. `share` is `sam_ascent_fraction` rounded to whole
    examples (None: not rounded), `first_rate` is lr / lr_max in the first update.
    """
    method = config.build_method()
    if config.sam_rho == 0 or method.has_one_pass:
        return 1.0
    first, every = math.ceil(config.sam_start_ratio * max_updates), interval_of(config)
    count = len(range(0, max_updates, every)) - len(range(0, first, every))
    if first < max_updates:
        rate = first_rate if first == 0 else 1.0
        if method.reuses:
            count += first % every > 0  # the first enabled update has nothing to reuse
        elif first % every == 0 and rho_at(config, first, max_updates, rate) == 0:
            count -= 1  # a warm-up starts at rho 0
    share = config.sam_ascent_fraction if share is None else share
    return 1 + share * count / max(max_updates, 1)


def describe_cost(
    config: SAMConfig, max_updates: int, share: float | None = None, first_rate: float = 1.0
) -> str:
    """One line on the cost of the run, in units of plain updates."""
    passes = expected_passes(config, max_updates, share, first_rate)
    target = f"auto (target sharpness {config.sam_target_sharpness:g})"
    radius = target if config.sam_rho is None else f"{float(config.sam_rho):g}"
    at_most = "at most " if config.sam_trigger != "always" else ""
    noun = "pass" if f"{passes:.4g}" == "1" else "passes"
    line = (
        f"sam_hf: {config.sam_method}, rho {radius}, {max_updates} updates of {at_most}"
        f"{passes:.4g} forward-backward {noun} each on average (a plain step: 1)"
    )
    if share is not None and share > 1.01 * config.sam_ascent_fraction:
        line += (
            f"; sam_ascent_fraction={config.sam_ascent_fraction:g} is rounded up to {share:.3g}, "
            "to whole examples or micro-batches"
        )
    return line


class GradientNormTrigger:
    """AE-SAM's rule: perturb if the squared gradient norm is high relative to its running mean.

    With μ and σ² exponential moving averages (decay δ = 0.9) of the squared norm and of its squared
    distance from μ, update t of T is perturbed if

        |g|² ≥ μ_t + c_t σ_t,   c_t = c_start + (c_end - c_start) t / T

    Source: Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
    ICLR 2023, https://arxiv.org/abs/2304.14647: c_start = λ₂ = 1, c_end = λ₁ = -1. Both averages
    start at 0, so that the first update is perturbed. g is the gradient of the parameters that
    `sam_params` selects; in the paper, of all parameters.

    The result decides on the descent pass, so reading it costs one host synchronization per update.
    """

    DECAY = 0.9

    def __init__(self, config: SAMConfig, state: State) -> None:
        self._config, self._state = config, state

    @classmethod
    def of(cls, config: SAMConfig, state: State) -> GradientNormTrigger | None:
        """The rule that the options name, or None; its averages are kept in `state`."""
        return None if config.sam_trigger == "always" else cls(config, state)

    def __call__(self, squared_norm: Tensor, update: int, max_updates: int) -> bool:
        """Update the averages with the squared norm of g; returns whether it is high."""
        slot = self._state.setdefault("trigger", {})
        nothing = torch.zeros_like(squared_norm)
        mean, variance = slot.get("mean", nothing), slot.get("variance", nothing)
        new_mean = self.DECAY * mean + (1 - self.DECAY) * squared_norm
        distance = (squared_norm - new_mean).square()
        new_variance = self.DECAY * variance + (1 - self.DECAY) * distance
        usable = is_usable(squared_norm)
        slot["mean"] = torch.where(usable, new_mean, mean)
        slot["variance"] = torch.where(usable, new_variance, variance)
        start, end = self._config.sam_trigger_start, self._config.sam_trigger_end
        c = start + (end - start) * update / max(max_updates, 1)
        is_high = squared_norm >= slot["mean"] + c * slot["variance"].sqrt()
        return bool((usable & is_high).item())

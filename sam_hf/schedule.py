"""When an update is perturbed, how far, and what that costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import SAMConfig
from .methods import State
from .methods.lists import is_usable

_SLOT = "trigger"


def rho_at(config: SAMConfig, update: int, max_updates: int, learning_rate_share: float) -> float:
    """ρ of the update number `update` (from 0) of `max_updates`.

    With `sam_rho_schedule="learning_rate"` it is that of GSAM with a lowest learning rate of 0
    (Zhuang et al. 2022, https://arxiv.org/abs/2203.08065, section 4.4):
    ρ_t = ρ_min + (ρ_max - ρ_min) lr_t / lr_max.

    Args:
        learning_rate_share: lr_t / lr_max.
    """
    high, low = config.sam_rho, config.sam_rho_min
    if config.sam_rho_schedule == "learning_rate":
        return low + (high - low) * learning_rate_share
    start = config.sam_start_ratio * max_updates
    done = (update - start) / max(max_updates - start, 1)
    warmup = config.sam_rho_warmup_ratio
    if done < warmup:
        rise = done / warmup
        return high * (_cosine(1 - rise) if config.sam_rho_schedule == "cosine" else rise)
    if config.sam_rho_schedule == "constant":
        return high
    left = 1 - (done - warmup) / max(1 - warmup, 1e-12)
    share = _cosine(1 - left) if config.sam_rho_schedule == "cosine" else left
    return low + (high - low) * share


def learning_rate_share(optimizer: Any) -> float:
    """lr_t / lr_max, the largest of the groups'.

    lr_max is what the schedule multiplies; with one that multiplies nothing, such as
    ReduceLROnPlateau, the learning rate that the optimizer was made with.
    """
    shares = []
    usual = getattr(optimizer, "defaults", {}).get("lr")  # DeepSpeed's optimizers have none
    for group in optimizer.param_groups if optimizer is not None else []:
        if highest := group.get("initial_lr", usual):
            shares.append(float(group["lr"]) / float(highest))
    return max(shares, default=1.0)


def _cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1, along half a period."""
    return (1 + math.cos(math.pi * done)) / 2


def interval_of(config: SAMConfig) -> int:
    """How many updates lie between two that have a second pass."""
    return config.sam_k if config.build_method().has_plain_updates() else config.sam_interval


def expected_passes(
    config: SAMConfig, max_updates: int, share: float | None = None, first_rate: float = 1.0
) -> float:
    """Forward-backward passes over the data an update, as a mean over the run; plain: 1.

    With a trigger it is the most that the run can cost.

    Args:
        share: the part of the examples that the ascent takes, rounded to whole ones;
            `sam_ascent_fraction` if None.
        first_rate: lr / lr_max in the first update.
    """
    method = config.build_method()
    if config.sam_rho == 0 or method.has_one_pass():
        return 1.0
    first, every = math.ceil(config.sam_start_ratio * max_updates), interval_of(config)
    count = len(range(0, max_updates, every)) - len(range(0, first, every))
    if first < max_updates:
        if method.has_plain_updates():
            count += first % every > 0  # the first one has nothing to reuse yet
        elif (
            first % every == 0
            and rho_at(config, first, max_updates, first_rate if first == 0 else 1.0) == 0
        ):
            count -= 1  # a warm-up begins at 0
    share = config.sam_ascent_fraction if share is None else share
    return 1 + share * count / max(max_updates, 1)


def describe_cost(
    config: SAMConfig, max_updates: int, share: float | None = None, first_rate: float = 1.0
) -> str:
    """One line: what the run will cost in units of plain steps."""
    passes = expected_passes(config, max_updates, share, first_rate)
    at_most = "at most " if config.sam_trigger != "always" else ""
    line = (
        f"sam_hf: {config.sam_method}, rho {config.sam_rho:g}, {max_updates} updates of {at_most}"
        f"{passes:.4g} forward-backward passes each on average (a plain step: 1)"
    )
    if share is not None and share > 1.01 * config.sam_ascent_fraction:
        line += (
            f"; sam_ascent_fraction={config.sam_ascent_fraction:g} takes {share:.3g}, since whole "
            "examples or micro-batches are taken"
        )
    return line


class GradientNormTrigger:
    """AE-SAM's rule: perturb where the squared gradient norm is high for the run so far.

    With μ and σ² exponential moving averages (decay δ = 0.9) of the squared norm and of its squared
    distance from μ, an update t of T is perturbed if

        |g|² ≥ μ_t + c_t σ_t,   c_t = c_start + (c_end - c_start) t / T

    Source: Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
    ICLR 2023, https://arxiv.org/abs/2304.14647: c_start = λ₂ = 1, c_end = λ₁ = -1. Both averages
    begin at 0, so that the first update is perturbed. g is that of the weights that `sam_params`
    selects; the paper's is that of all.

    The answer decides whether a second pass is run, so that it must be read: this waits for the
    device once in each update that asks.
    """

    DECAY = 0.9

    def __init__(self, start: float, end: float, state: State) -> None:
        self._start, self._end, self._state = start, end, state

    @classmethod
    def of(cls, config: SAMConfig, state: State) -> GradientNormTrigger | None:
        """The rule that the options ask for, or None; `state` holds its averages."""
        if config.sam_trigger == "always":
            return None
        return cls(config.sam_trigger_start, config.sam_trigger_end, state)

    def __call__(self, squared_norm: Tensor, update: int, max_updates: int) -> bool:
        """Take the squared norm of g into account, and say whether it is high."""
        slot = self._state.setdefault(_SLOT, {})
        nothing = torch.zeros_like(squared_norm)
        mean, variance = slot.get("mean", nothing), slot.get("variance", nothing)
        new_mean = self.DECAY * mean + (1 - self.DECAY) * squared_norm
        distance = (squared_norm - new_mean).square()
        new_variance = self.DECAY * variance + (1 - self.DECAY) * distance
        usable = is_usable(squared_norm)
        slot["mean"] = torch.where(usable, new_mean, mean)
        slot["variance"] = torch.where(usable, new_variance, variance)
        c = self._start + (self._end - self._start) * update / max(max_updates, 1)
        is_high = squared_norm >= slot["mean"] + c * slot["variance"].sqrt()
        return bool((usable & is_high).item())

"""What SAM measures while it trains, kept on the device until the Trainer logs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .methods import Dot, Method
from .params import PARAMETER_GROUPS


class Readings:
    """The `sam_*` entries of the logs.

    The sharpness is the mean over the perturbed updates since the last log. The others are those
    of the last perturbed update before the log, as the Trainer's own `grad_norm`: they cost passes
    over the weights, so they are measured only where a log will show them.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sharpness: Tensor | None = None
        self._updates: Tensor | None = None
        self._latest: dict[str, Tensor] = {}

    def add_sharpness(self, difference: Tensor) -> None:
        """Count L(w + e) - L(w) of one update. A non-finite one is left out of the mean."""
        usable = torch.isfinite(difference)
        if self._sharpness is None or self._updates is None:
            self._sharpness = torch.zeros_like(difference)
            self._updates = torch.zeros_like(difference)
        self._sharpness += torch.where(usable, difference, 0)
        self._updates += usable

    def set(self, **values: Tensor) -> None:
        """Put down readings, each a 0-dimensional tensor."""
        self._latest.update((f"sam_{name}", value) for name, value in values.items())

    def pop(self) -> dict[str, float]:
        """All readings since the last call, in one transfer from the device. Only finite ones."""
        values = dict(self._latest)
        if self._sharpness is not None and self._updates is not None:
            values["sam_sharpness"] = self._sharpness / self._updates
        self._reset()
        if not values:
            return {}
        is_double = any(v.dtype is torch.float64 for v in values.values())
        wide = torch.float64 if is_double else torch.float32  # not every device has float64
        numbers = torch.stack([v.detach().to(wide) for v in values.values()])
        return {
            name: number
            for name, number, usable in zip(
                values, numbers.tolist(), numbers.isfinite().tolist(), strict=True
            )
            if usable
        }


def log_is_due(
    args: TrainingArguments, state: TrainerState, interval: int, is_end_of_epoch: bool
) -> bool:
    """Whether the Trainer will log before the next of the updates that stand `interval` apart."""
    if args.logging_strategy == IntervalStrategy.STEPS:
        update, is_first = state.global_step, state.global_step == 0 and args.logging_first_step
        every = max(int(state.logging_steps or args.logging_steps), 1)
        return is_first or (update + interval) // every > update // every
    return args.logging_strategy == IntervalStrategy.EPOCH and (is_end_of_epoch or interval > 1)


def measure(
    method: Method,
    names: Sequence[str],
    groups: Sequence[str],
    weights: list[Tensor],
    perturbation: list[Tensor],
    descent_grads: Sequence[Tensor | None],
    dot: Dot,
) -> dict[str, Tensor]:
    """|e|, where it was spent, and cos(g, g_s). Overwrites `perturbation`.

    Args:
        weights: w.
        perturbation: e, as it was applied.
        descent_grads: g_s; None where a parameter had no gradient in the descent pass.
    """
    squares = {}
    for group in PARAMETER_GROUPS:
        members = [
            e for e, its_group in zip(perturbation, groups, strict=True) if its_group == group
        ]
        if members:
            squares[group] = dot(members, members)
    squared_norm = torch.stack(list(squares.values())).sum()
    values = {"perturbation_norm": squared_norm.sqrt()}
    if method.reports_shares:
        values.update((f"share_{group}", s / squared_norm) for group, s in squares.items())

    g = method.ascent_gradient(names, weights, perturbation)
    pairs = [(x, y) for x, y in zip(g, descent_grads, strict=True) if y is not None]
    if pairs:
        with_grad, g_s = (list(side) for side in zip(*pairs, strict=True))
        values["grad_cosine"] = dot(with_grad, g_s) / (dot(g, g) * dot(g_s, g_s)).sqrt()
    return values

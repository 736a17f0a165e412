"""What SAM measures while it trains, kept on the device until the Trainer logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .methods import Dot, Method
from .params import PARAMETER_GROUPS

# In the order in which they are logged.
_NAMES = (
    "ascent_grad_norm",
    "perturbation_norm",
    *(f"share_{group}" for group in PARAMETER_GROUPS),
    "grad_cosine",
    "sharpness",
    "passes_per_update",
)


class Readings:
    """The `sam_*` entries of the logs.

    The sharpness is the mean over the perturbed updates since the last log, the passes that over
    all updates. The others are those
    of the last perturbed update before the log, as the Trainer's own `grad_norm`: they cost passes
    over the weights, so they are measured only where a log will show them.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add_sharpness(self, difference: Tensor) -> None:
        """Count L(w + e) - L(w) of one update. A non-finite one is left out of the mean."""
        self._add("sharpness", difference)

    def add_passes(self, passes: float) -> None:
        """Count the forward and backward passes of one update; a plain one has 1."""
        self._add("passes_per_update", torch.tensor(passes))

    def set(self, **values: Tensor) -> None:
        """Put down readings, each a 0-dimensional tensor, in the place of those before."""
        for name, value in values.items():
            self._sums.pop(name, None)
            self._counts.pop(name, None)
            self._add(name, value)

    def _add(self, name: str, value: Tensor) -> None:
        usable = torch.isfinite(value)
        value = torch.where(usable, value.detach(), 0)
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        count = usable.to(value.dtype)
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def pop(self, total: Callable[[list[Tensor]], Tensor]) -> dict[str, float]:
        """The means since the last call, in one transfer from the device. Only of finite readings.

        Args:
            total: adds numbers up over the processes. It is called on every one of them, with as
                many numbers, whatever this one has measured.
        """
        nothing = torch.zeros(())
        sums = [self._sums.get(name, nothing) for name in _NAMES]
        counts = [self._counts.get(name, nothing) for name in _NAMES]
        self._reset()
        numbers = total([*sums, *counts]).tolist()
        pairs = zip(_NAMES, numbers[: len(_NAMES)], numbers[len(_NAMES) :], strict=True)
        return {f"sam_{name}": value / count for name, value, count in pairs if count}


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
    dot_over: Callable[[Sequence[int]], Dot],
) -> dict[str, Tensor]:
    """|e|, where it was spent, and cos(g, g_s). Overwrites `perturbation`.

    Args:
        names, groups: of the perturbed parameters. The lists of tensors go along with them.
        weights: w.
        perturbation: e, as it was applied.
        descent_grads: g_s; None where a parameter had no gradient in the descent pass.
        dot_over: gives the inner product over the parameters at some positions.
    """
    squares = {}
    for group in PARAMETER_GROUPS:
        if members := [i for i, its_group in enumerate(groups) if its_group == group]:
            e = [perturbation[i] for i in members]
            squares[group] = dot_over(members)(e, e)
    squared_norm = torch.stack(list(squares.values())).sum()
    values = {"perturbation_norm": squared_norm.sqrt()}
    if method.reports_shares:
        values.update((f"share_{group}", s / squared_norm) for group, s in squares.items())

    g = method.ascent_gradient(names, weights, perturbation)
    if g is None:
        return values
    pairs = [(i, y) for i, y in enumerate(descent_grads) if y is not None]
    if pairs:
        members, g_s = (list(side) for side in zip(*pairs, strict=True))
        every, dot = dot_over(range(len(g))), dot_over(members)
        product = dot([g[i] for i in members], g_s)
        values["grad_cosine"] = product / (every(g, g) * dot(g_s, g_s)).sqrt()
    return values

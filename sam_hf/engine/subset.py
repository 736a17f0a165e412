"""The subset of the examples that the ascent pass uses (`sam_ascent_fraction`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

Cut = Callable[[Args, Kwargs], tuple[Args, Kwargs, float]]
"""``cut(args, kwargs)``: the arguments for a subset of the examples, and which fraction it is."""


def _count_examples(inputs: Any) -> int:
    """Number of examples in the inputs: length of the first tensor's first dimension, or 0."""
    values = inputs.values() if isinstance(inputs, Mapping) else ()
    return next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 0)


def select_examples(inputs: Any, indices: Tensor) -> Any:
    """The inputs of some examples: the rows at `indices` of each tensor and list.

    Args:
        inputs: a mapping of tensors and lists with one row per example; numbers and None are kept.
        indices: 1-dimensional, on the CPU.

    ValueError if the number of rows of an entry is not the number of examples.
    """
    n = _count_examples(inputs)
    if not n:
        raise ValueError(
            f"sam_ascent_fraction: inputs of type {type(inputs).__name__} without tensors cannot "
            "be cut. Override sam_select_examples, or set sam_ascent_fraction=1.0."
        )
    chosen = dict(inputs)
    for name, value in chosen.items():
        if not (isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim)):
            continue
        if len(value) != n:
            raise ValueError(
                f"sam_ascent_fraction: the input {name!r} has {len(value)} rows for {n} examples, "
                "so that a subset of the examples cannot be selected. Override "
                "sam_select_examples, or set sam_ascent_fraction=1.0."
            )
        if isinstance(value, Tensor):
            chosen[name] = value[indices.to(value.device, non_blocking=True)]
        else:
            chosen[name] = [value[i] for i in indices.tolist()]
    return chosen


class AscentSubset:
    """Selects the examples of the ascent pass.

    If the function that computes the loss accepts a part of a micro-batch (`can_cut`), a subset of
    each micro-batch. Otherwise, and where micro-batches are too small (a quarter of one example
    rounds up to one) and may have no ascent pass (`can_skip`), the first micro-batches of an
    update.

    The subset is random, so that its loss is an unbiased estimate of the loss at w whatever the
    order of the examples. The draw depends on the seed, the update and the number of the
    micro-batch: it does not disturb the global generators, a resumed run repeats it, and all
    processes draw the same rows (processes of tensor parallelism share them).

    `steps` is the number of micro-batches in an update.
    """

    def __init__(
        self, fraction: float, batch_size: int, steps: int, can_cut: bool, can_skip: bool, seed: int
    ) -> None:
        self._fraction, self._seed = fraction, seed
        of_rows = _part(fraction, batch_size) / batch_size
        of_micro_batches = _part(fraction, steps) / steps
        is_too_small = fraction * batch_size < 1 and of_micro_batches < of_rows
        self._cuts = can_cut and not (is_too_small and can_skip)
        self.share = of_rows if self._cuts else of_micro_batches
        """The fraction that is used, for micro-batches of `batch_size`."""
        self._generator = torch.Generator()

    def skips(self, number: int, count: int) -> bool:
        """Whether micro-batch `number` (from 1) of `count` in an update has no ascent pass."""
        return self._fraction < 1 and not self._cuts and number > _part(self._fraction, count)

    def cut(self, update: int, number: int, select: Callable[[Any, Tensor], Any]) -> Cut | None:
        """The function that cuts the arguments of `compute_loss`; None if nothing is cut.

        ``select(inputs, indices)`` returns the inputs of some examples.
        """
        if self._fraction == 1 or not self._cuts:
            return None
        self._generator.manual_seed(hash((self._seed, update, number)) % 2**63)

        def cut(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, float]:
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            n = _count_examples(inputs)
            taken = _part(self._fraction, n)
            if taken >= n > 0:
                return args, kwargs, 1.0
            indices = torch.randperm(n, generator=self._generator)[:taken]
            # In ascending order: some models expect sorted lengths.
            inputs = select(inputs, indices.sort().values)
            if "inputs" in kwargs:
                kwargs = kwargs | {"inputs": inputs}
            else:
                args = (args[0], inputs, *args[2:])
            # A sum over items is divided by their number in the update: scale that too.
            if (items := kwargs.get("num_items_in_batch")) is not None:
                kwargs = kwargs | {"num_items_in_batch": items * (taken / n)}
            return args, kwargs, taken / n

        return cut


def _part(fraction: float, count: int) -> int:
    """A fraction of `count`, rounded up to an integer, at least 1."""
    return max(1, math.ceil(fraction * count - 1e-9))

"""The part of the examples that the ascent pass uses (`sam_ascent_fraction`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .replay import Cut


def count_examples(inputs: Any) -> int:
    """How many examples inputs hold: the length of the first tensor's first dimension, or 0."""
    if isinstance(inputs, Mapping):
        for value in inputs.values():
            if isinstance(value, Tensor) and value.ndim:
                return len(value)
    return 0


def select_examples(inputs: Any, indices: Tensor) -> Any:
    """The inputs of some examples: of each tensor and list the rows at `indices`.

    Args:
        inputs: a mapping of tensors and lists with a row for each example; numbers and None stay.
        indices: 1-dimensional, on the CPU.

    Raises:
        ValueError: something has not one row for each example.
    """
    n = count_examples(inputs)
    if not n:
        raise ValueError(
            f"sam_ascent_fraction: inputs of type {type(inputs).__name__} without tensors cannot "
            "be cut. Override sam_select_examples, or set sam_ascent_fraction=1.0."
        )
    chosen = dict(inputs)
    for name, value in chosen.items():
        is_list = isinstance(value, (list, tuple))
        if not is_list and not (isinstance(value, Tensor) and value.ndim):
            continue
        if len(value) != n:
            raise ValueError(
                f"sam_ascent_fraction: the input {name!r} has {len(value)} rows for {n} examples, "
                "so that a part of the examples cannot be taken. Override sam_select_examples, or "
                "set sam_ascent_fraction=1.0."
            )
        if is_list:
            chosen[name] = [value[i] for i in indices.tolist()]
        else:
            chosen[name] = value[indices.to(value.device, non_blocking=True)]
    return chosen


class AscentPart:
    """Which examples have an ascent pass.

    Of each micro-batch a part, where `compute_loss` is the Trainer's own or the trainer says by
    `sam_select_examples` how to take one. Else the first micro-batches of an update; and also where
    micro-batches are too small: a quarter of one example is that example.

    The part is drawn at random, so that the loss of the ascent is an unbiased reading of the loss
    at w whatever the order of the examples; from a generator of its own, so that dropout and the
    like draw what they would; and from the number of the micro-batch, so that a resumed run draws
    it again. All processes draw the same rows (those of tensor parallelism share them).

    Attributes:
        share: the part that is taken, of micro-batches of the size that the trainer asks for.
    """

    def __init__(self, trainer: Any) -> None:
        self._fraction: float = trainer.sam_config.sam_ascent_fraction
        batch_size: int = trainer._train_batch_size
        of_rows = _share(self._fraction, batch_size)
        of_micro_batches = _share(self._fraction, trainer.args.gradient_accumulation_steps)
        is_too_small = self._fraction * batch_size < 1 and of_micro_batches < of_rows
        self._cuts = cuts_examples(trainer) and not (
            is_too_small and why_all_have_an_ascent(trainer) is None
        )
        self.share = of_rows if self._cuts else of_micro_batches
        self._generator = torch.Generator()

    @property
    def is_whole(self) -> bool:
        return self._fraction == 1

    def leaves_out(self, number: int, count: int) -> bool:
        """Whether the micro-batch `number` (from 1) of `count` in an update has no ascent."""
        return not (self.is_whole or self._cuts) and number > _part(self._fraction, count)

    def cut_for(self, trainer: Any, number: int) -> Cut | None:
        """What cuts the arguments of `compute_loss(model, inputs, ..., num_items_in_batch=...)`."""
        if self.is_whole or not self._cuts:
            return None
        self._generator.manual_seed(trainer.state.global_step * 65537 + number)

        def cut(
            args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any], float]:
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            n = count_examples(inputs)
            taken = _part(self._fraction, n)
            if taken >= n > 0:
                return args, kwargs, 1.0
            indices = torch.randperm(n, generator=self._generator)[:taken]
            # In their order: some models expect sorted lengths.
            inputs = trainer.sam_select_examples(inputs, indices.sort().values)
            if "inputs" in kwargs:
                kwargs = kwargs | {"inputs": inputs}
            else:
                args = (args[0], inputs, *args[2:])
            # A sum over items, divided by their number in the update: so many are expected here.
            if kwargs.get("num_items_in_batch") is not None:
                expected = kwargs["num_items_in_batch"] * (taken / n)
                kwargs = kwargs | {"num_items_in_batch": expected}
            return args, kwargs, taken / n

        return cut


def _part(fraction: float, count: int) -> int:
    """A part of some things, rounded up to whole ones."""
    return max(1, math.ceil(fraction * count - 1e-9))


def _share(fraction: float, count: int) -> float:
    return _part(fraction, count) / count


def cuts_examples(trainer: Any) -> bool:
    """Whether micro-batches can be cut: who computes the loss must not look at whole ones."""
    kind = type(trainer)
    return kind.compute_loss is Trainer.compute_loss or _defined_behind(kind, "sam_select_examples")


def refuse_what_cannot_be_cut(trainer: Any) -> None:
    """Raise where `sam_ascent_fraction` can be taken neither of examples nor of micro-batches.

    Raises:
        ValueError: with the reason and the way out.
    """
    fraction, kind = trainer.sam_config.sam_ascent_fraction, type(trainer)
    if fraction == 1 or cuts_examples(trainer):
        return
    if (why := why_all_have_an_ascent(trainer)) is not None:
        raise ValueError(
            f"sam_ascent_fraction={fraction} is not allowed with {kind.__name__}. Its compute_loss "
            "may need whole micro-batches, so that a part of the micro-batches of an update would "
            f"be taken, but {why}; or override sam_select_examples, or set "
            "sam_ascent_fraction=1.0."
        )


def why_all_have_an_ascent(trainer: Any) -> str | None:
    """Why no micro-batch of an update can be left out of the ascent, and what to do; else None."""
    kind = type(trainer)
    if trainer.args.gradient_accumulation_steps == 1:
        return "an update has one micro-batch: accumulate several"
    if trainer.sam_config.sam_scope == "micro_batch":
        return "each has an e of its own: set sam_scope='batch'"
    if trainer.is_fsdp_enabled or getattr(trainer, "is_distributed_loading_by_transformers", 0):
        return "shards of gradients are reduced in each of them: use DDP"
    if _defined_behind(kind, "training_step") or _defined_behind(kind, "_prepare_inputs"):
        return "its own training_step or _prepare_inputs would be passed by"
    return None


def _defined_behind(kind: type, name: str) -> bool:
    """Whether a class other than Trainer and those of this package defines a method."""
    return any(
        name in vars(base)
        for base in kind.__mro__
        if base is not Trainer
        and not base.__module__.startswith(f"{__package__}.")
        and not issubclass(Trainer, base)
    )

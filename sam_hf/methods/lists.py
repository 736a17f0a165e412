"""Arithmetic on lists of tensors, on one or several devices, without waiting for any of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of the tensors of each device."""
    positions: dict[torch.device, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        positions[tensor.device].append(i)
    return list(positions.values())


def reading_is_free(number: Tensor) -> bool:
    """Whether a number can be read without waiting for a device to compute it."""
    return number.device.type == "cpu"


def is_usable(squared_norm: Tensor) -> Tensor:
    """Whether something can be divided by the norm: it is neither 0 nor infinite nor NaN."""
    return torch.isfinite(squared_norm) & (squared_norm > 0)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, or 0 where that is no finite number."""
    ratio = a / b
    return torch.where(torch.isfinite(ratio), ratio, 0)


def mark_started(state: dict[str, dict[str, Tensor]], slot: str, usable: Tensor) -> Tensor:
    """Whether a moving average holds a gradient yet, before this one; from now on if it is usable.

    Kept on the device: fp16 overflows in its first updates, and then the first does not count.
    """
    flag = state.setdefault(slot, {})
    started = flag.get("", torch.zeros_like(usable))
    flag[""] = started | usable
    return started


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all tensors by a number that lies on a device."""
    for members in by_device(tensors):
        mine = [tensors[i] for i in members]
        torch._foreach_mul_(mine, factor.to(mine[0].device, mine[0].dtype, non_blocking=True))


def blank_(tensors: Sequence[Tensor], where: Tensor) -> None:
    """Set all tensors to 0 where the flag `where` is set, whatever they hold.

    0 · inf is NaN, and no multi-tensor operation turns NaN into 0: on a device that must not be
    waited for, they are masked one by one.
    """
    if reading_is_free(where):
        if where.item():
            torch._foreach_zero_(list(tensors))
        return
    for tensor in tensors:
        tensor.masked_fill_(where.to(tensor.device, non_blocking=True), 0)


def replace_(tensors: Sequence[Tensor], others: Sequence[Tensor], where: Tensor) -> None:
    """Write the others into all tensors where the flag `where` is set."""
    if reading_is_free(where):
        if where.item():
            torch._foreach_copy_(list(tensors), list(others))
        return
    for tensor, other in zip(tensors, others, strict=True):  # as in `blank_`
        flag = where.to(tensor.device, non_blocking=True)
        tensor.copy_(torch.where(flag, other, tensor))

"""Arithmetic on lists of tensors, on one or several devices, without a host synchronization.

The number of kernel launches of each function does not depend on the number of tensors, beyond
what multi-tensor operations need.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

CHUNK = 2**22  # elements: enough to keep a device busy
# With these options a step of SGD is `targets += sources`.
_ADD: dict[str, Any] = dict.fromkeys(("weight_decay", "momentum", "dampening"), 0.0)
_ADD |= {"lr": 1.0, "nesterov": False, "maximize": True, "is_first_step": False}


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors, grouped by device."""
    positions: dict[torch.device, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        positions[tensor.device].append(i)
    return list(positions.values())


def chunks(tensors: Sequence[Tensor], size: int) -> list[list[int]]:
    """Positions in groups of one device and at most `size` elements, or of one larger tensor."""
    groups: list[list[int]] = []
    room, device = 0, None
    for i, tensor in enumerate(tensors):
        room -= tensor.numel()
        if room < 0 or tensor.device != device:
            groups.append([])
            room, device = size - tensor.numel(), tensor.device
        groups[-1].append(i)
    return groups


def reading_is_free(number: Tensor) -> bool:
    """Whether the number can be read without waiting for a device."""
    return number.device.type == "cpu"


def is_usable(squared_norm: Tensor) -> Tensor:
    """Flag: the norm is neither 0 nor infinite nor NaN, so that something can be divided by it."""
    return torch.isfinite(squared_norm) & (squared_norm > 0)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, or 0 where that is not finite."""
    ratio = a / b
    return torch.where(torch.isfinite(ratio), ratio, 0)


def mark_started(state: dict[str, dict[str, Tensor]], slot: str, usable: Tensor) -> Tensor:
    """Whether a moving average already holds a gradient; from now on it does if this one is usable.

    The flag stays on the device: the first updates of an fp16 run may overflow and do not count.
    """
    flag = state.setdefault(slot, {})
    started = flag.get("", torch.zeros_like(usable))
    flag[""] = started | usable
    return started


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all tensors by a 0-dimensional one, in place."""
    for members in by_device(tensors):
        some = [tensors[i] for i in members]
        torch._foreach_mul_(some, factor.to(some[0].device, some[0].dtype, non_blocking=True))


def add_where_(targets: Sequence[Tensor], sources: Sequence[Tensor], where: Tensor) -> None:
    """targets += sources where the flag is set; else targets are untouched, even by inf or NaN.

    0 * inf is NaN, so that a product with the flag cannot do this. The multi-tensor kernel of SGD
    can: it reads a flag on the device (that of fp16's gradient scaler) that skips the step.
    """
    for members in by_device(targets):
        some, added = [targets[i] for i in members], [sources[i] for i in members]
        there = where.to(some[0].device, non_blocking=True)
        if reading_is_free(there):
            if there.item():
                torch._foreach_add_(some, added)
        elif _has_fused_kernel(some, added):
            torch._fused_sgd_(some, added, [], found_inf=(~there).float(), **_ADD)
        else:
            for target, source in zip(some, added, strict=True):
                target.add_(torch.where(there, source, 0))


def zero_unless(tensors: Sequence[Tensor], flag: Tensor) -> list[Tensor]:
    """The tensors where the flag is set, else zeros, whatever they hold. May reuse their memory."""
    if reading_is_free(flag):
        if not flag.item():
            torch._foreach_zero_(list(tensors))
        return list(tensors)
    result = list(torch._foreach_mul(list(tensors), 0))
    torch._foreach_zero_(result)  # 0 * inf is NaN
    add_where_(result, tensors, flag)
    return result


def _has_fused_kernel(targets: list[Tensor], sources: list[Tensor]) -> bool:
    """Whether the multi-tensor kernel exists and takes these: it mixes neither dtypes (weights in
    half precision with a direction in fp32) nor memory formats."""
    return targets[0].device.type in _get_fused_kernels_supported_devices() and all(
        t.dtype is s.dtype and t.stride() == s.stride()
        for t, s in zip(targets, sources, strict=True)
    )

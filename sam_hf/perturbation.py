"""w + e in the place of w, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .methods.lists import by_device, reading_is_free

HALF = (torch.float16, torch.bfloat16)


def step_size(rho: float, squared_norm: Tensor) -> Tensor:
    """ρ / |d|*, or 0 where that is no usable number. Decided on the device, without a wait."""
    size = rho / squared_norm.sqrt()
    return torch.where(torch.isfinite(squared_norm) & torch.isfinite(size), size, 0)


@torch.no_grad()
def add_scaled_(
    weights: list[Tensor], direction: list[Tensor], scale: Tensor, keep_direction: bool = False
) -> None:
    """w += scale · d, and nothing at all where scale is 0, even if d holds inf or NaN.

    Args:
        keep_direction: leave d as it is. Else it is overwritten where that saves a copy.
    """
    if any(w.dtype in HALF for w in weights):
        # In fp32, tensor by tensor: neither the scale nor scale · d need fit the narrow type.
        for w, d in zip(weights, direction, strict=True):
            w.add_(torch.where(scale == 0, 0, d.float() * scale))
    elif reading_is_free(scale):
        if factor := scale.item():
            torch._foreach_add_(weights, direction, alpha=factor)
    else:
        if keep_direction:
            direction = list(torch._foreach_mul(direction, scale))
        else:
            torch._foreach_mul_(direction, scale)
        nothing = scale == 0
        for d in direction:  # 0 · inf is NaN, and no multi-tensor operation turns NaN into 0
            d.masked_fill_(nothing, 0)
        torch._foreach_add_(weights, direction)


class Perturbation:
    """w + e in the place of w, until `restore` puts w back bit for bit.

    w comes back from a copy: subtracting e would leave rounding errors in every weight. It is
    written in place, because other objects (sharded parameters, flat buffers, captured graphs) hold
    on to the memory of the weights.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.saved: list[Tensor] | None = None

    @torch.no_grad()
    def apply(self, direction: list[Tensor], scale: Tensor, keep_direction: bool = False) -> None:
        """Write w + scale · d. `direction` is overwritten, unless it is to be kept."""
        saved = [torch.empty_like(w) for w in self.weights]
        torch._foreach_copy_(saved, self.weights)
        self.saved = saved
        for members in by_device(self.weights):
            weights = [self.weights[i] for i in members]
            there = scale.to(weights[0].device, non_blocking=True)
            add_scaled_(weights, [direction[i] for i in members], there, keep_direction)
        # An autocast region that somebody opened around the training keeps casts of w.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def difference_(self) -> list[Tensor]:
        """e as it was really applied, in the memory of the weights; `restore` must follow."""
        assert self.saved is not None
        torch._foreach_sub_(self.weights, self.saved)
        return self.weights

    @torch.no_grad()
    def swallowed_share(self) -> float:
        """The share of half-precision weights that rounding left at w. Waits for the device."""
        assert self.saved is not None
        unchanged = total = 0
        for w, old in zip(self.weights, self.saved, strict=True):
            if w.dtype in HALF:
                unchanged += int((w == old).sum())
                total += w.numel()
        return unchanged / max(total, 1)

    @torch.no_grad()
    def restore(self) -> None:
        """Put w back. A second call does nothing."""
        if self.saved is not None:
            torch._foreach_copy_(self.weights, self.saved)
            self.saved = None
            torch.clear_autocast_cache()

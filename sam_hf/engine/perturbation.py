"""The perturbation: w + e in place of w, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..methods.base import Radius, Tensors
from ..methods.lists import add_where_, reading_is_free, scale_

HALF = (torch.float16, torch.bfloat16)


def step_size(rho: Radius, squared_norm: Tensor) -> Tensor | float:
    """rho / |d|*, or 0 where that is not finite; rho < 0 goes against d.

    A number where it can be read without waiting for a device, else a 0-dimensional tensor.
    """
    if reading_is_free(squared_norm):
        square = squared_norm.item()
        size = float(rho) / math.sqrt(square) if square > 0 else 0.0
        return size if abs(size) <= torch.finfo(squared_norm.dtype).max else 0.0
    return squared_norm.rsqrt().mul_(rho).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


class Perturbation:
    """w + e in place of w until `restore` puts w back bit for bit.

    w is restored from a copy: subtracting e would leave a rounding error in every weight. The
    weights, local tensors, are written in place, because other objects (sharded parameters, flat
    buffers, captured CUDA graphs) refer to their memory.
    """

    def __init__(self, weights: Tensors) -> None:
        self.weights = weights
        self.saved: Tensors | None = None

    def apply(
        self, direction: Tensors, scale: Tensor | float, keep_direction: bool = False
    ) -> None:
        """Write w + scale * d, and w where the scale is 0, even if d holds inf or NaN.

        Gradients must be disabled. `direction` (d) may be overwritten unless `keep_direction` is
        set.
        """
        saved = [torch.empty_like(w) for w in self.weights]
        torch._foreach_copy_(saved, self.weights)
        self.saved = saved
        if any(w.dtype in HALF for w in self.weights):
            # In fp32: the scale or scale * d may not fit in half precision.
            direction = [d.float() for d in direction]
        if isinstance(scale, float):
            if scale:
                torch._foreach_add_(self.weights, direction, alpha=scale)
        else:
            if keep_direction:
                direction = [d.clone() for d in direction]
            scale_(direction, scale)
            add_where_(self.weights, direction, scale != 0)
        # An autocast region opened by the caller may hold casts of w.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def difference_(self) -> Tensors:
        """e as it was applied, in the memory of the weights; `restore` must follow."""
        assert self.saved is not None
        torch._foreach_sub_(self.weights, self.saved)
        return self.weights

    @torch.no_grad()
    def swallowed_share(self) -> float:
        """Fraction of the half-precision weights that rounding left at w. Waits for the device."""
        assert self.saved is not None
        pairs = zip(self.weights, self.saved, strict=True)
        half = [(w, old) for w, old in pairs if w.dtype in HALF]
        unchanged = sum(int((w == old).sum()) for w, old in half)
        return unchanged / max(sum(w.numel() for w, _ in half), 1)

    def restore(self) -> None:
        """Put w back. A second call does nothing."""
        if self.saved is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.saved)
            self.saved = None
            torch.clear_autocast_cache()

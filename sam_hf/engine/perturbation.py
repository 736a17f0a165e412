"""The perturbation: w + e in the place of w, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.base import Tensors
from ..methods.lists import add_where_, reading_is_free, scale_

HALF = (torch.float16, torch.bfloat16)


def step_size(rho: float, squared_norm: Tensor) -> Tensor:
    """rho / |d|*, or 0 where that is not finite, decided on the device; rho < 0 goes against d."""
    return squared_norm.rsqrt().mul_(rho).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


class Perturbation:
    """w + e in the place of w until `restore` puts w back bit for bit.

    w is restored from a copy: subtracting e would leave a rounding error in every weight. The
    weights, local tensors, are written in place, because other objects (sharded parameters, flat
    buffers, captured CUDA graphs) refer to their memory.
    """

    def __init__(self, weights: Tensors) -> None:
        self.weights = weights
        self.saved: Tensors | None = None

    @torch.no_grad()
    def apply(self, direction: Tensors, scale: Tensor, keep_direction: bool = False) -> None:
        """Write w + scale * d, and w where the scale is 0, even if d holds inf or NaN.

        `direction` (d) may be overwritten unless `keep_direction` is set.
        """
        saved = [torch.empty_like(w) for w in self.weights]
        torch._foreach_copy_(saved, self.weights)
        self.saved = saved
        is_half = any(w.dtype in HALF for w in self.weights)
        if reading_is_free(scale) and not is_half:
            if factor := scale.item():
                torch._foreach_add_(self.weights, direction, alpha=factor)
        else:
            if is_half:  # in fp32: neither the scale nor scale * d need fit half precision
                direction = [d.float() for d in direction]
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

    @torch.no_grad()
    def restore(self) -> None:
        """Put w back. A second call does nothing."""
        if self.saved is not None:
            torch._foreach_copy_(self.weights, self.saved)
            self.saved = None
            torch.clear_autocast_cache()

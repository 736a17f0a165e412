"""LookSAM: the second pass every k-th update, and its direction used again in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Dot, State
from .lists import blank_, by_device, is_usable, quotient, scale_
from .sam import SAM

_SLOT = "looksam.g_v"


@dataclass(frozen=True)
class LookSAM(SAM):
    r"""SAM every k-th update; in between, the part of its gradient that changes slowly is reused.

    .. math:: t \bmod k = 0: \quad g_s, \quad \text{and keep} \quad
              g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2} g
    .. math:: \text{else}: \quad g + \alpha \frac{\|g\|}{\|g_v\|} g_v

    with g and g_s the gradients at w and at w + ε, ε = ρ g / \|g\|. The projection and the norms
    run over all trained parameters together, as in the paper, and not over each tensor. k = 1 is
    SAM.

    Paper: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware
    Minimization", CVPR 2022, https://arxiv.org/abs/2203.02714, algorithm 1.

    Cost: 1 + 1/k passes an update; a copy of the perturbed weights and g beside g_s in every k-th
    update, and g_v all the time.

    Settings: ``sam_k`` 5, ``sam_alpha`` 0.7.

    Scope `batch` only: gradients of single micro-batches are not kept. Not under DeepSpeed, which
    does not show g_s.
    """

    citation: ClassVar[str] = """\
@inproceedings{liu2022towards,
  title = {Towards Efficient and Scalable Sharpness-Aware Minimization},
  author = {Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2022},
  url = {https://arxiv.org/abs/2203.02714}
}"""
    has_state: ClassVar[bool] = True

    k: int = 5
    alpha: float = 0.7

    def should_perturb(self, update: int, state: State) -> bool:
        return update % self.k == 0 or _SLOT not in state

    def combine(
        self,
        names: Sequence[str],
        grads: list[Tensor],
        descent_grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> list[Tensor] | None:
        product, squared = dot(grads, descent_grads), dot(grads, grads)
        known = is_usable(squared) & torch.isfinite(product)
        # In the memory of g: g_v, or 0 where an overflow left nothing to project on.
        scale_(grads, torch.where(known, -quotient(product, squared), 0))
        torch._foreach_add_(grads, descent_grads)
        # What rounding alone has left of it would be scaled up to the length of g.
        rounding = (64 * torch.finfo(grads[0].dtype).eps) ** 2 * dot(descent_grads, descent_grads)
        blank_(grads, ~known | (dot(grads, grads) <= rounding))
        # The old one stays where there is none.
        kept, slot = state.get(_SLOT, {}), {}
        for name, g_v in zip(names, grads, strict=True):
            slot[name] = (
                g_v
                if name not in kept
                else torch.where(known.to(g_v.device, non_blocking=True), g_v, kept[name])
            )
        state[_SLOT] = slot
        return None

    def reuse(self, names: Sequence[str], grads: list[Tensor], dot: Dot, state: State) -> None:
        slot = state[_SLOT]
        g_v = [
            slot[name] if name in slot else torch.zeros_like(g)
            for name, g in zip(names, grads, strict=True)
        ]
        factor = self.alpha * quotient(dot(grads, grads), dot(g_v, g_v)).sqrt()
        for members in by_device(grads):
            there = factor.to(grads[members[0]].device, non_blocking=True)
            added = torch._foreach_mul([g_v[i] for i in members], there)
            torch._foreach_add_([grads[i] for i in members], added)

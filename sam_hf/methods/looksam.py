"""LookSAM: a descent pass every k-th update, whose direction is reused in between."""

from dataclasses import dataclass

import torch

from .base import Dot, Names, State, Tensors, option
from .lists import is_usable, quotient, scale_, zero_unless
from .sam import SAM

_SLOT = "looksam.g_v"


@dataclass(frozen=True)
class LookSAM(SAM):
    r"""SAM every k-th update; in between, the slowly changing component of its gradient is reused.

    .. math:: t \bmod k = 0: \quad g_s, \quad \text{and keep} \quad
              g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2} g
    .. math:: \text{else}: \quad g + \alpha \frac{\|g\|}{\|g_v\|} g_v

    with g and g_s the gradients at w and at w + ε, ε = ρ g / \|g\|. As in the paper, the projection
    and the norms are over all trained parameters together, not per tensor. k = 1 is SAM.

    Paper: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware
    Minimization", CVPR 2022, https://arxiv.org/abs/2203.02714, algorithm 1.

    Cost: 1 + 1/k passes per update; g_v, and g and a copy of the perturbed weights in every k-th.

    Settings: ``k`` 5, ``alpha`` 0.7. Scope `batch` only, which has g of the whole update. Not under
    DeepSpeed, which hides g_s.
    """

    citation = """@inproceedings{liu2022towards, booktitle = {CVPR},
  title = {Towards Efficient and Scalable Sharpness-Aware Minimization},
  author = {Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang},
  year = {2022},
  url = {https://arxiv.org/abs/2203.02714}
}"""
    combines = reuses = keeps_direction = has_state = True

    k: int = option(5, low=1, help="Two passes every k-th update, one in the others.")
    alpha: float = option(0.7, low=0.0, help="Weight of the reused direction.")

    @property
    def interval(self) -> int:
        return self.k

    def should_perturb(self, update: int, state: State) -> bool:
        return update % self.k == 0 or _SLOT not in state

    def combine(
        self, names: Names, grads: Tensors, descent_grads: Tensors, dot: Dot, state: State
    ) -> Tensors | None:
        product, squared = dot(grads, descent_grads), dot(grads, grads)
        known = is_usable(squared) & torch.isfinite(product)
        # g_v in the memory of g.
        scale_(grads, torch.where(known, -quotient(product, squared), 0))
        torch._foreach_add_(grads, descent_grads)
        # A g_v that is all rounding error counts as 0: `reuse` would scale it up to the norm of g.
        rounding = (64 * torch.finfo(grads[0].dtype).eps) ** 2 * dot(descent_grads, descent_grads)
        g_v = zero_unless(grads, known & (dot(grads, grads) > rounding))
        # Where an fp16 overflow left no g_v, the previous one stays.
        slot = state.get(_SLOT, {})
        if old := [i for i, name in enumerate(names) if name in slot]:
            kept = [slot[names[i]] for i in old]
            scale_(kept, torch.where(known, 0, torch.ones_like(squared)))
            torch._foreach_add_(kept, [g_v[i] for i in old])
        state[_SLOT] = {n: slot.get(n, new) for n, new in zip(names, g_v, strict=True)}
        return None

    def reuse(self, names: Names, grads: Tensors, dot: Dot, state: State) -> None:
        slot = state[_SLOT]
        both = [i for i, name in enumerate(names) if name in slot]
        g_v = [slot[names[i]] for i in both]
        factor = self.alpha * quotient(dot(grads, grads), dot(g_v, g_v)).sqrt()
        added = list(torch._foreach_mul(g_v, 1))
        scale_(added, factor)
        torch._foreach_add_([grads[i] for i in both], added)

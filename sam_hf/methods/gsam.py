"""Surrogate-Gap guided Sharpness-Aware Minimization."""

from dataclasses import dataclass

import torch

from .base import Dot, Names, State, Tensors, option
from .lists import add_where_, is_usable, quotient, scale_
from .sam import SAM


@dataclass(frozen=True)
class GSAM(SAM):
    r"""SAM that also descends on the surrogate gap h = L(w + ε) - L(w), orthogonally to g_s.

    .. math:: \epsilon = \rho \, g / \|g\|_2, \qquad
              g_s - \alpha \, g_\perp, \quad
              g_\perp = g - \frac{\langle g, g_s \rangle}{\|g_s\|^2} g_s

    with g and g_s the gradients at w and at w + ε, over all trained parameters together. The
    optimizer gets :math:`g_s - \alpha g_\perp`. α = 0 is SAM.

    Paper: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, "Surrogate Gap
    Minimization Improves Sharpness-Aware Training", ICLR 2022, https://arxiv.org/abs/2203.08065,
    algorithm 1.

    Cost: two passes per update; a copy of the perturbed weights and a copy of g.

    Settings: the paper lets ρ follow the learning rate (``sam_rho_schedule="learning_rate"``); for
    a ViT-B/32 from ``sam_rho`` 0.6 down to ``sam_rho_min`` 0.1 with ``alpha`` 0.6. Scope `batch`
    only, which has g of the whole update. Not under DeepSpeed, which hides g_s.
    """

    citation = """@inproceedings{zhuang2022surrogate, booktitle = {ICLR},
  title = {Surrogate Gap Minimization Improves Sharpness-Aware Training},
  author = {Zhuang, Juntang and Gong, Boqing and Yuan, Liangzhe and Cui, Yin and Adam, Hartwig and
            Dvornek, Nicha and Tatikonda, Sekhar and Duncan, James and Liu, Ting},
  year = {2022},
  url = {https://arxiv.org/abs/2203.08065}
}"""
    combines = keeps_direction = True

    alpha: float = option(0.6, low=0.0, help="Weight of the surrogate gap. 0 is SAM.")

    def combine(
        self, names: Names, grads: Tensors, descent_grads: Tensors, dot: Dot, state: State
    ) -> Tensors | None:
        product, squared = dot(grads, descent_grads), dot(descent_grads, descent_grads)
        # Where g_s has no direction there is no orthogonal component: the optimizer gets g_s.
        known = is_usable(squared) & torch.isfinite(product)
        # g_s - α (g - c g_s) = (1 + α c) g_s - α g
        scale_(descent_grads, 1 + self.alpha * torch.where(known, quotient(product, squared), 0))
        torch._foreach_mul_(grads, -self.alpha)
        add_where_(descent_grads, grads, known)
        return None

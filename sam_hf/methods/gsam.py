"""Surrogate-Gap guided Sharpness-Aware Minimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Dot, State
from .lists import blank_, is_usable, quotient, scale_
from .sam import SAM


@dataclass(frozen=True)
class GSAM(SAM):
    r"""SAM, and a step down the surrogate gap h = L(w + ε) - L(w), which does not raise L(w + ε).

    .. math:: \epsilon = \rho \, g / \|g\|_2, \qquad
              g_s - \alpha \, g_\perp, \quad
              g_\perp = g - \frac{\langle g, g_s \rangle}{\|g_s\|^2} g_s

    with g and g_s the gradients at w and at w + ε, over all trained parameters together; the
    optimizer gets the second expression. α = 0 is SAM.

    Paper: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, "Surrogate Gap
    Minimization Improves Sharpness-Aware Training", ICLR 2022, https://arxiv.org/abs/2203.08065,
    algorithm 1.

    Cost: two passes an update; a copy of the perturbed weights, and g beside g_s.

    Settings: the paper lets ρ follow the learning rate, ``sam_rho_schedule="learning_rate"``; for a
    ViT-B/32 from ``sam_rho`` 0.6 down to ``sam_rho_min`` 0.1 with ``sam_alpha`` 0.6.

    Scope `batch` only: gradients of single micro-batches are not kept. Not under DeepSpeed, which
    does not show g_s.
    """

    citation: ClassVar[str] = """\
@inproceedings{zhuang2022surrogate,
  title = {Surrogate Gap Minimization Improves Sharpness-Aware Training},
  author = {Zhuang, Juntang and Gong, Boqing and Yuan, Liangzhe and Cui, Yin and Adam, Hartwig and
            Dvornek, Nicha and Tatikonda, Sekhar and Duncan, James and Liu, Ting},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  url = {https://arxiv.org/abs/2203.08065}
}"""

    alpha: float = 0.6

    def combine(
        self,
        names: Sequence[str],
        grads: list[Tensor],
        descent_grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> list[Tensor] | None:
        product, squared = dot(grads, descent_grads), dot(descent_grads, descent_grads)
        # Without a direction of g_s there is nothing to be orthogonal to.
        known = is_usable(squared) & torch.isfinite(product)
        blank_(grads, ~known)
        # g_s - α (g - c g_s) = (1 + α c) g_s - α g
        scale_(descent_grads, 1 + self.alpha * torch.where(known, quotient(product, squared), 0))
        torch._foreach_add_(descent_grads, grads, alpha=-self.alpha)
        return None

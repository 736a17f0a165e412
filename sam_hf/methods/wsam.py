"""Weighted Sharpness-Aware Minimization: sharpness as a regulariser with a weight of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Dot, State
from .lists import replace_
from .sam import SAM


@dataclass(frozen=True)
class WSAM(SAM):
    r"""The gradient of L + γ / (1 - γ) · (L(w + ε) - L), with ε = ρ g / \|g\|.

    With g and g_s the gradients at w and at w + ε, the optimizer gets

    .. math:: \text{coupled}: \quad g + \frac{\gamma}{1 - \gamma} (g_s - g)

    .. math:: \text{decoupled}: \quad g, \quad \text{and after its step} \quad
              w \leftarrow w - \eta \frac{\gamma}{1 - \gamma} (g_s - g)

    with η the learning rate of the parameter. γ = 0 is plain training; γ = 1/2, coupled, is SAM.
    Decoupled, the sharpness term sees neither momentum nor the optimizer's scaling nor clipping.

    Paper: Yue, Jiang, Ye, Gao, Liu, Zhang, "Sharpness-Aware Minimization Revisited: Weighted
    Sharpness as a Regularization Term", KDD 2023, https://arxiv.org/abs/2305.15817, algorithms 2
    and 3.

    Cost: two passes an update; a copy of the perturbed weights, and g beside g_s. Decoupled,
    g_s - g takes the place of that copy until the optimizer has stepped.

    Settings: ``sam_gamma`` 0.9 (the sharpness counts nine times the loss: smaller values are
    safer with large ρ), ``sam_rho`` 0.05, ``sam_decoupled`` true as in the paper. Under a
    learning rate schedule the decoupled term shrinks with the learning rate.

    Scope `batch` only: gradients of single micro-batches are not kept. Not under DeepSpeed, which
    does not show g_s.
    """

    citation: ClassVar[str] = """\
@inproceedings{yue2023sharpness,
  title = {Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term},
  author = {Yue, Yun and Jiang, Jiadi and Ye, Zhiling and Gao, Ning and Liu, Yongchao and
            Zhang, Ke},
  booktitle = {Conference on Knowledge Discovery and Data Mining},
  year = {2023},
  url = {https://arxiv.org/abs/2305.15817}
}"""

    gamma: float = 0.9
    decoupled: bool = True

    @property
    def _weight(self) -> float:
        return self.gamma / (1 - self.gamma)

    def combine(
        self,
        names: Sequence[str],
        grads: list[Tensor],
        descent_grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> list[Tensor] | None:
        # Nothing was perturbed by a gradient that is not finite: g_s is that of a plain step.
        replace_(grads, descent_grads, ~torch.isfinite(dot(grads, grads)))
        if not self.decoupled:
            # g + c (g_s - g) = c g_s + (1 - c) g
            torch._foreach_mul_(descent_grads, self._weight)
            torch._foreach_add_(descent_grads, grads, alpha=1 - self._weight)
            return None
        differences = torch._foreach_sub(descent_grads, grads)
        # 0 · inf is NaN: the scaler of fp16 must see a g_s that overflows, and skip the step.
        torch._foreach_add_(grads, differences, alpha=0)
        torch._foreach_copy_(descent_grads, grads)
        return list(differences)

    def after_step(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        pending: Mapping[str, Tensor],
        learning_rates: list[float],
        rho: float,
    ) -> None:
        stepped = [i for i, name in enumerate(names) if name in pending]
        if stepped:
            steps = torch._foreach_mul(
                [pending[names[i]] for i in stepped],
                [-learning_rates[i] * self._weight for i in stepped],
            )
            torch._foreach_add_([weights[i] for i in stepped], steps)

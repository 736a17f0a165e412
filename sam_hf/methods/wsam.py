"""Weighted Sharpness-Aware Minimization: sharpness as a weighted regularization term."""

from dataclasses import dataclass

import torch

from .base import Dot, Floats, Named, Names, Radius, State, Tensors, option
from .lists import add_where_, scale_, zero_unless
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

    Cost: two passes per update; a copy of the perturbed weights and a copy of g. Decoupled, g_s - g
    replaces that copy until the optimizer has stepped.

    Settings: ``gamma`` 0.9 (the sharpness weighs nine times the loss; smaller values are safer with
    a large ρ), ``sam_rho`` 0.05, ``decoupled`` true as in the paper. The decoupled term shrinks
    with the learning rate. Scope `batch` only, which has g of the whole update. Not under
    DeepSpeed, which hides g_s.
    """

    citation = """@inproceedings{yue2023sharpness, booktitle = {KDD},
  title = {Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term},
  author = {Yue, Yun and Jiang, Jiadi and Ye, Zhiling and Gao, Ning and Liu, Yongchao and
            Zhang, Ke},
  year = {2023},
  url = {https://arxiv.org/abs/2305.15817}
}"""
    combines = keeps_direction = acts_on_step = True

    gamma: float = option(
        0.9, low=0.0, below=1.0, help="Sharpness weight gamma / (1 - gamma). 0: plain training."
    )
    decoupled: bool = option(True, help="Step along the sharpness after the optimizer step.")

    @property
    def _weight(self) -> float:
        return self.gamma / (1 - self.gamma)

    def combine(
        self, names: Names, grads: Tensors, descent_grads: Tensors, dot: Dot, state: State
    ) -> Tensors | None:
        # A non-finite g perturbed nothing: g_s is then the gradient of a plain step.
        squared = dot(grads, grads)
        finite = torch.isfinite(squared)
        if not self.decoupled:
            # g + c (g_s - g) = c g_s + (1 - c) g
            scale_(descent_grads, torch.where(finite, self._weight, torch.ones_like(squared)))
            torch._foreach_mul_(grads, 1 - self._weight)
            add_where_(descent_grads, grads, finite)
            return None
        grads = zero_unless(grads, finite)
        add_where_(grads, descent_grads, ~finite)
        differences = torch._foreach_sub(descent_grads, grads)
        # 0 * inf is NaN: fp16's gradient scaler must see an overflow of g_s and skip the step.
        torch._foreach_add_(grads, differences, alpha=0)
        torch._foreach_copy_(descent_grads, grads)
        return list(differences)

    def after_step(
        self, names: Names, weights: Tensors, pending: Named, learning_rates: Floats, rho: Radius
    ) -> None:
        if stepped := [i for i, name in enumerate(names) if name in pending]:
            factors = [-learning_rates[i] * self._weight for i in stepped]
            steps = torch._foreach_mul([pending[names[i]] for i in stepped], factors)
            torch._foreach_add_([weights[i] for i in stepped], steps)

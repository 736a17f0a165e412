"""Adaptive Sharpness-Aware Minimization."""

from dataclasses import dataclass

import torch

from .base import Direction, Dot, Method, Names, State, Tensors
from .lists import CHUNK, chunks


@dataclass(frozen=True)
class ASAM(Method):
    r"""The perturbation of ASAM with element-wise normalisation in the Euclidean norm.

    .. math:: \epsilon = \rho \, T_w^2 g / \|T_w g\|_2, \qquad T_w = |w| + \eta

    so that :math:`\|T_w^{-1} \epsilon\|_2 = \rho`: each weight moves in proportion to its size,
    and the sharpness is invariant to rescalings of the weights that keep the function.

    Paper: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", ICML 2021, https://arxiv.org/abs/2102.11600, section 3,
    equation (6), algorithm 1.

    Two conventions for T are in use; their ρ differ about fourfold on convolutional networks:

    * ``sam_adaptive_scope="all"``: T applies to every parameter. With ``sam_eta`` 0 it is the form
      of the widely used PyTorch package; ρ is about 2.0 on CNNs.
    * ``sam_adaptive_scope="weights"``: the authors' code. T = 1 on every parameter whose name does
      not contain "weight"; ρ is about 0.5.

    On transformers T differs between parameters: at initialisation over 99 % of \|ε\|² goes to
    LayerNorm weights (about 1, against 0.02 for a matrix) with "all", and 97 % to BERT's biases
    (T = 1) with "weights". The logs show the shares; ``sam_params`` selects the parameters.

    Cost: two passes per update; one copy of the perturbed weights.
    """

    citation = """@inproceedings{kwon2021asam, booktitle = {ICML},
  title = {{ASAM}: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
           Networks},
  author = {Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon},
  year = {2021},
  url = {https://arxiv.org/abs/2102.11600}
}"""
    reports_shares = True

    eta: float
    adaptive_scope: str

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        scaled = self._scaled(names)
        if not scaled:
            return grads, dot(grads, grads)
        t = list(torch._foreach_abs([weights[i] for i in scaled]))
        torch._foreach_add_(t, self.eta)
        tg = [grads[i] for i in scaled]
        torch._foreach_mul_(tg, t)  # the memory of g holds T g from here on
        squared_norm = dot(grads, grads)
        torch._foreach_mul_(tg, t)  # and T² g from here on
        return grads, squared_norm

    def ascent_gradient(self, names: Names, weights: Tensors, perturbation: Tensors) -> Tensors:
        scaled = self._scaled(names)
        # In chunks: all T at once would be another copy of the weights.
        for members in chunks([weights[i] for i in scaled], CHUNK):
            positions = [scaled[i] for i in members]
            t_squared = list(torch._foreach_abs([weights[i] for i in positions]))
            torch._foreach_add_(t_squared, self.eta)
            torch._foreach_mul_(t_squared, t_squared)
            if not self.eta:  # where T is 0, e is 0 and g is unknown: 0 / 1 counts as 0
                is_zero = list(torch._foreach_sign(t_squared))
                torch._foreach_neg_(is_zero)
                torch._foreach_add_(is_zero, 1)
                torch._foreach_maximum_(t_squared, is_zero)
            torch._foreach_div_([perturbation[i] for i in positions], t_squared)
        return perturbation

    def _scaled(self, names: Names) -> list[int]:
        """Positions of the parameters with T = |w| + η."""
        if self.adaptive_scope == "all":
            return list(range(len(names)))
        return [i for i, name in enumerate(names) if "weight" in name]

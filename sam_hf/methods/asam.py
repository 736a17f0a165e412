"""Adaptive Sharpness-Aware Minimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Dot, Method, State


@dataclass(frozen=True)
class ASAM(Method):
    r"""The perturbation of ASAM with element-wise normalisation in the Euclidean norm.

    .. math:: \epsilon = \rho \, T_w^2 g / \|T_w g\|_2, \qquad T_w = |w| + \eta

    so that :math:`\|T_w^{-1} \epsilon\|_2 = \rho`: each weight moves in proportion to its size,
    and the sharpness does not change when weights are rescaled without changing the function.

    Paper: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", ICML 2021, https://arxiv.org/abs/2102.11600, section 3,
    equation (6), algorithm 1.

    Two conventions for T exist, and their ρ differ about fourfold on convolutional networks:

    * ``adaptive_scope="all"``: T scales every parameter. With ``eta`` 0 it is the form of the
      widely used PyTorch package; ρ is about 2.0 on CNNs.
    * ``adaptive_scope="weights"``: the authors' code. T = 1 on every parameter whose name does not
      contain "weight"; ρ is about 0.5.

    On transformers the two spend \|ε\|² on different parameters, because T is much larger on some
    groups than on others: at random initialisation over 99 % goes to LayerNorm weights (about 1,
    against 0.02 for a matrix) with "all", and 97 % to BERT's biases (T = 1) with "weights". The
    logged shares tell where it goes in a run; ``sam_params`` decides which parameters take part.

    Cost: two passes an update; one copy of the perturbed weights.
    """

    citation: ClassVar[str] = """\
@inproceedings{kwon2021asam,
  title = {{ASAM}: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
           Networks},
  author = {Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon},
  booktitle = {International Conference on Machine Learning},
  year = {2021},
  url = {https://arxiv.org/abs/2102.11600}
}"""
    reports_shares: ClassVar[bool] = True

    eta: float
    adaptive_scope: str

    def direction(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> tuple[list[Tensor], Tensor]:
        scaled = self._scaled(names)
        if not scaled:
            return grads, dot(grads, grads)
        t = list(torch._foreach_abs([weights[i] for i in scaled]))
        torch._foreach_add_(t, self.eta)
        tg = [grads[i] for i in scaled]
        torch._foreach_mul_(tg, t)  # in the memory of g is T g from here on
        squared_norm = dot(grads, grads)
        torch._foreach_mul_(tg, t)  # and T² g from here on
        return grads, squared_norm

    def ascent_gradient(
        self, names: Sequence[str], weights: list[Tensor], perturbation: list[Tensor]
    ) -> list[Tensor]:
        # One tensor after the other: T for all of them would be another copy of the weights.
        for i in self._scaled(names):
            t_squared = weights[i].abs().add_(self.eta).square_()
            # Where T is 0 nothing was perturbed, and g cannot be known: 0 / 0 counts as 0.
            perturbation[i].div_(t_squared).masked_fill_(t_squared == 0, 0)
        return perturbation

    def _scaled(self, names: Sequence[str]) -> list[int]:
        """The parameters on which T is |w| + η, by position."""
        if self.adaptive_scope == "all":
            return list(range(len(names)))
        return [i for i, name in enumerate(names) if "weight" in name]

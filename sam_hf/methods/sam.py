"""Sharpness-Aware Minimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Dot, Method, State


@dataclass(frozen=True)
class SAM(Method):
    r"""The perturbation of SAM in the Euclidean norm.

    .. math:: \epsilon = \rho \, g / \|g\|_2

    with g the gradient of the loss at w over all perturbed parameters together, so that
    :math:`\|\epsilon\|_2 = \rho`. Second-order terms are dropped, as in the paper.

    Paper: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", ICLR 2021, https://arxiv.org/abs/2010.01412, equation (2) with p = 2.

    Cost: two passes an update; one copy of the perturbed weights.

    Settings: ``sam_rho`` 0.05 for fine-tuning vision models, 0.1 to 0.2 from scratch or under
    label noise, 1e-3 to 5e-2 for language encoders.
    """

    citation: ClassVar[str] = """\
@inproceedings{foret2021sharpness,
  title = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  url = {https://arxiv.org/abs/2010.01412}
}"""

    def direction(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> tuple[list[Tensor], Tensor]:
        return grads, dot(grads, grads)

    def ascent_gradient(
        self, names: Sequence[str], weights: list[Tensor], perturbation: list[Tensor]
    ) -> list[Tensor]:
        return perturbation

"""Sharpness-Aware Minimization."""

from dataclasses import dataclass

from .base import Direction, Dot, Method, Names, State, Tensors


@dataclass(frozen=True)
class SAM(Method):
    r"""The perturbation of SAM in the Euclidean norm.

    .. math:: \epsilon = \rho \, g / \|g\|_2

    with g the gradient of the loss at w, over all perturbed parameters together, so that
    :math:`\|\epsilon\|_2 = \rho`. As in the paper, the dependence of ε on w is not differentiated.

    Paper: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", ICLR 2021, https://arxiv.org/abs/2010.01412, equation (2) with p = 2.

    Cost: two passes per update; one copy of the perturbed weights.

    Settings: ``sam_rho`` 0.05 for fine-tuning vision models, 0.1 to 0.2 from scratch or under
    label noise, 1e-3 to 5e-2 for language encoders.
    """

    citation = """@inproceedings{foret2021sharpness, booktitle = {ICLR},
  title = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  year = {2021},
  url = {https://arxiv.org/abs/2010.01412}
}"""

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        return grads, dot(grads, grads)

    def ascent_gradient(self, names: Names, weights: Tensors, perturbation: Tensors) -> Tensors:
        return perturbation

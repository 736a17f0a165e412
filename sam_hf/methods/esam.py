"""Efficient SAM, its stochastic weight perturbation."""

import random
from dataclasses import dataclass

from .base import Direction, Dot, Names, State, Tensors, option
from .sam import SAM


@dataclass(frozen=True)
class ESAM(SAM):
    r"""SAM on a random subset of the parameters, resampled for each update.

    .. math:: \epsilon = \frac{\rho}{\beta} \, m \odot g / \|m \odot g\|_2

    where m keeps each parameter tensor with probability β. The norm is that of the kept gradients,
    as in the authors' code (for ε to equal SAM's in expectation: the norm of all).

    The draw depends on the seed and the number of the update alone, so that all processes agree.
    This is the first half of ESAM, stochastic weight perturbation. The second half,
    sharpness-sensitive data selection, needs the loss of each example, which ``compute_loss`` does
    not return; ``sam_ascent_fraction`` saves a similar amount in the ascent pass.

    Paper: Du, Yan, Feng, Zhou, Zhen, Goh, Tan, "Efficient Sharpness-Aware Minimization for
    Improved Training of Neural Networks", ICLR 2022, https://arxiv.org/abs/2110.03141, section 3.1.

    Cost: two passes per update, the first without the gradients of the other parameters (in one
    process and under DDP); a copy of the perturbed weights.

    Settings: ``beta`` 0.6, ``sam_rho`` as for SAM.
    """

    citation = """@inproceedings{du2022efficient, booktitle = {ICLR},
  title = {Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks},
  author = {Du, Jiawei and Yan, Hanshu and Feng, Jiashi and Zhou, Joey Tianyi and Zhen, Liangli and
            Goh, Rick Siow Mong and Tan, Vincent Y. F.},
  year = {2022},
  url = {https://arxiv.org/abs/2110.03141}
}"""
    chooses = True

    beta: float = option(0.6, above=0.0, high=1.0, help="Probability of perturbing each tensor.")

    def choose(self, names: Names, update: int, seed: int) -> Names:
        draw = random.Random(f"{seed} {update}").random
        chosen = [name for name in names if draw() < self.beta]
        return chosen or list(names[:1])

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        # β scales the norm instead of the gradient: e is ρ d / |d|*.
        return grads, dot(grads, grads) * self.beta**2

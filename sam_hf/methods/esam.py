"""Efficient SAM, its stochastic weight perturbation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Dot, State
from .sam import SAM


@dataclass(frozen=True)
class ESAM(SAM):
    r"""SAM on a random part of the parameters, another one in each update.

    .. math:: \epsilon = \frac{\rho}{\beta} \, m \odot g / \|m \odot g\|_2

    where m keeps each parameter tensor with probability β; the norm is that of what is kept, as in
    the authors' code (for ε to be SAM's in expectation, it would be that of all). The gradients of
    the others are not computed in the ascent pass where the layout allows it (one process and
    DDP), so that it costs less than a pass.

    The tensors are drawn from the number of the update, the same on every process, and nothing
    is switched off in the model: safe under DDP. This is the first half of ESAM, stochastic
    weight perturbation. The second half (sharpness-sensitive data selection: the descent on the
    examples whose loss rises most) needs the loss of every single example, which a Trainer's
    ``compute_loss`` does not give; ``sam_ascent_fraction`` saves as much in the other pass.

    Paper: Du, Yan, Feng, Zhou, Zhen, Goh, Tan, "Efficient Sharpness-Aware Minimization for
    Improved Training of Neural Networks", ICLR 2022, https://arxiv.org/abs/2110.03141, section 3.1.

    Cost: two passes an update, the first without some of the weights' gradients; a copy of the
    perturbed weights.

    Settings: ``sam_beta`` 0.6, ``sam_rho`` as for SAM.
    """

    citation: ClassVar[str] = """\
@inproceedings{du2022efficient,
  title = {Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks},
  author = {Du, Jiawei and Yan, Hanshu and Feng, Jiashi and Zhou, Joey Tianyi and Zhen, Liangli and
            Goh, Rick Siow Mong and Tan, Vincent Y. F.},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  url = {https://arxiv.org/abs/2110.03141}
}"""

    beta: float = 0.6

    def choose(self, names: Sequence[str], update: int, seed: int) -> Sequence[str]:
        draw = random.Random(f"{seed} {update}").random
        chosen = [name for name in names if draw() < self.beta]
        return chosen or list(names[:1])

    def direction(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> tuple[list[Tensor], Tensor]:
        # The norm is divided and not the gradient multiplied: e is ρ d / |d|*.
        return grads, dot(grads, grads) * self.beta**2

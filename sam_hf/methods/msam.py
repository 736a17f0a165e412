"""Momentum-SAM: perturbs along the optimizer's momentum, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Dot, Method, State


@dataclass(frozen=True)
class MSAM(Method):
    r"""The gradient at a point ahead on the way that the optimizer's momentum leads.

    .. math:: \epsilon = - \rho \, v / \|v\|_2

    with v the momentum that the optimizer keeps (``momentum_buffer`` of SGD, ``exp_avg`` of Adam
    and its relatives), over all perturbed parameters together. The weights are at w + ε during the
    passes alone: w is what is stepped from, evaluated and saved. Until the optimizer has a
    momentum, after its first step, nothing is perturbed.

    Paper: Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without
    Computational Overhead", 2024, https://arxiv.org/abs/2401.12033, algorithm 1.

    Cost: one pass an update; a copy of the perturbed weights.

    Settings: ``sam_rho`` about 3 for a ViT trained from scratch, 0.3 to 3 for CNNs, and no
    perturbation in the warm-up of the learning rate: ``sam_start_ratio`` or
    ``sam_rho_warmup_ratio``.

    The logged loss is that at w + ε, the only one that is computed; there is no ``sam_sharpness``.
    Scope `batch` only. Not under DeepSpeed, which shards the momentum out of sight, and not with
    optimizers that keep none, or one in 8 bits.
    """

    citation: ClassVar[str] = """\
@misc{becker2024momentum,
  title = {Momentum-{SAM}: Sharpness Aware Minimization without Computational Overhead},
  author = {Becker, Marlon and Altrock, Frederick and Risse, Benjamin},
  year = {2024},
  url = {https://arxiv.org/abs/2401.12033}
}"""
    along_momentum: ClassVar[bool] = True

    def direction(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> tuple[list[Tensor], Tensor]:
        return grads, dot(grads, grads)

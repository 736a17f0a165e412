"""Momentum-SAM: perturbs along the optimizer's momentum, in one pass."""

from dataclasses import dataclass

from .base import Direction, Dot, Method, Names, State, Tensors


@dataclass(frozen=True)
class MSAM(Method):
    r"""Perturbs against the optimizer's momentum, which takes one pass per update.

    .. math:: \epsilon = - \rho \, v / \|v\|_2

    with v the optimizer's momentum (``momentum_buffer`` of SGD, ``exp_avg`` of the Adam family),
    over all perturbed parameters together. The weights are at w + ε during the pass only; the
    optimizer steps from w, and w is evaluated and saved. Nothing is perturbed before the first
    optimizer step, which creates the momentum.

    Paper: Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without
    Computational Overhead", 2024, https://arxiv.org/abs/2401.12033, algorithm 1.

    Cost: one pass per update; a copy of the perturbed weights.

    Settings: ``sam_rho`` about 3 for a ViT trained from scratch, 0.3 to 3 for CNNs, and 0 in the
    warm-up of the learning rate (``sam_start_ratio`` or ``sam_rho_warmup_ratio``).

    The logged loss is that at w + ε, the only one computed; ``sam_sharpness`` is not logged. Scope
    `batch` only. Not available under DeepSpeed, which shards the momentum, nor with optimizers that
    keep no momentum or an 8-bit one.
    """

    citation = """@misc{becker2024momentum,
  title = {Momentum-{SAM}: Sharpness Aware Minimization without Computational Overhead},
  author = {Becker, Marlon and Altrock, Frederick and Risse, Benjamin},
  year = {2024},
  url = {https://arxiv.org/abs/2401.12033}
}"""
    along_momentum = True
    keeps_direction = True  # it is the optimizer's state

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        return grads, dot(grads, grads)

"""Bi-LoRA: an auxiliary pair of LoRA factors carries the perturbation."""

from dataclasses import dataclass

import torch

from ..base import Floats, Method, Named, Names, Radius, Tensors, option
from .factors import factor_pairs, is_auxiliary


@dataclass(frozen=True)
class BiLoRA(Method):
    r"""Trains at W₀ + s B₁A₁ + B₂A₂: gradient descent on one pair of factors, ascent on the other.

    Both gradients come from one pass. The optimizer descends on (B₁, A₁) and, with negated
    gradients, ascends on (B₂, A₂), at the same learning rate. After its step

    .. math:: c = \sqrt{\textstyle\sum_{layers} \|B_2 A_2\|_F^2}, \qquad
              (B_2, A_2) \leftarrow \sqrt{\rho / c} \, (B_2, A_2) \quad \text{where } c > \rho

    so that the perturbation ε = B₂A₂ over all layers has a norm of at most ρ. Each batch is trained
    at the perturbation made by the batches before it. (B₂, A₂) is initialised as LoRA is, with
    B₂ = 0; it is active in training passes only, and removed at the end of training.

    Paper: Liu, Li, Huang, Yang, Huang, "Bi-LoRA: Efficient Sharpness-Aware Minimization for
    Fine-Tuning Large-Scale Models", ICLR 2026, https://arxiv.org/abs/2508.19564, equations 7 to 10,
    algorithm 1. Not specified there, chosen here: no weight decay on (B₂, A₂), their scale is 1,
    and ``max_grad_norm`` clips both pairs together.

    Cost: one pass per update, slightly longer; weights, gradients, optimizer state of (B₂, A₂).

    Settings: ``sam_rho`` 0.05 to 0.1, ``rank`` 8.

    For models with LoRA adapters of PEFT on linear layers, in one process or under DDP. The logged
    loss is that at W + ε, the only one computed. Scope `batch` only.
    """

    citation = """@inproceedings{liu2026bilora, booktitle = {ICLR},
  title = {Bi-{LoRA}: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models},
  author = {Liu, Yuhang and Li, Tao and Huang, Zhehao and Yang, Zuopeng and Huang, Xiaolin},
  year = {2026},
  url = {https://arxiv.org/abs/2508.19564}
}"""
    perturbs = False
    needs_adapters = needs_auxiliary = acts_on_step = True

    rank: int = option(8, low=1, help="Rank of the auxiliary factors.")

    def before_step(
        self, names: Names, weights: Tensors, grads: Tensors, learning_rates: Floats, rho: Radius
    ) -> None:
        if ascent := [g for name, g in zip(names, grads, strict=True) if is_auxiliary(name)]:
            torch._foreach_neg_(ascent)

    def after_step(
        self, names: Names, weights: Tensors, pending: Named, learning_rates: Floats, rho: Radius
    ) -> None:
        pairs = factor_pairs(names, auxiliary=True)
        if not pairs:
            return
        # |B A|² = <BᵀB, A Aᵀ>: rank x rank matrices instead of one of the weight's shape.
        squares = [
            (weights[j].T @ weights[j]).mul_(weights[i] @ weights[i].T).sum().to(weights[0].device)
            for i, j in pairs
        ]
        norm = torch.stack(squares).sum().sqrt()
        factor = torch.where(norm > rho, (rho / norm).sqrt(), 1)
        for pair in pairs:
            for i in pair:
                weights[i].mul_(factor.to(weights[i].device, non_blocking=True))

"""Bi-LoRA: a second pair of LoRA's factors does the ascent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method
from .factors import factor_pairs, is_auxiliary


@dataclass(frozen=True)
class BiLoRA(Method):
    r"""Trains at W₀ + s B₁A₁ + B₂A₂: one pair of factors descends, the other one climbs.

    Both gradients come from one pass. The optimizer steps down with (B₁, A₁) and, with the sign of
    the gradient turned, up with (B₂, A₂), at the same learning rate. After its step

    .. math:: c = \sqrt{\textstyle\sum_{layers} \|B_2 A_2\|_F^2}, \qquad
              (B_2, A_2) \leftarrow \sqrt{\rho / c} \, (B_2, A_2) \quad \text{where } c > \rho

    so that the perturbation ε = B₂A₂ of all layers together has a norm of ρ at most. A batch meets
    the perturbation that those before it have made. (B₂, A₂) starts as LoRA does, with B₂ = 0; it
    is there in the training passes alone, and dropped at the end.

    Paper: Liu, Li, Huang, Yang, Huang, "Bi-LoRA: Efficient Sharpness-Aware Minimization for
    Fine-Tuning Large-Scale Models", ICLR 2026, https://arxiv.org/abs/2508.19564, equations 7 to 10,
    algorithm 1. Left open there and chosen here: no weight decay on (B₂, A₂), their scale s is 1,
    and ``max_grad_norm`` counts both pairs together.

    Cost: one pass an update, somewhat longer for the second pair; its weights, gradients and
    optimizer state.

    Settings: ``sam_rho`` 0.05 to 0.1, ``sam_rank`` 8.

    For models with LoRA adapters of PEFT on linear layers, in one process or DDP. The logged loss
    is that at W + ε, the only one that is computed. Scope `batch`: an update has one direction.
    """

    citation: ClassVar[str] = """\
@inproceedings{liu2026bilora,
  title = {Bi-{LoRA}: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models},
  author = {Liu, Yuhang and Li, Tao and Huang, Zhehao and Yang, Zuopeng and Huang, Xiaolin},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  url = {https://arxiv.org/abs/2508.19564}
}"""
    perturbs: ClassVar[bool] = False
    needs_adapters: ClassVar[bool] = True
    needs_auxiliary: ClassVar[bool] = True

    rank: int = 8

    def before_step(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        learning_rates: list[float],
        rho: float,
    ) -> None:
        climbing = [g for name, g in zip(names, grads, strict=True) if is_auxiliary(name)]
        if climbing:
            torch._foreach_neg_(climbing)

    def after_step(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        pending: Mapping[str, Tensor],
        learning_rates: list[float],
        rho: float,
    ) -> None:
        pairs = factor_pairs(names, auxiliary=True)
        if not pairs:
            return
        # |B A|² = <BᵀB, A Aᵀ>: matrices of the rank's size instead of the weight's.
        squares = [
            (weights[j].T @ weights[j]).mul_(weights[i] @ weights[i].T).sum().to(weights[0].device)
            for i, j in pairs
        ]
        norm = torch.stack(squares).sum().sqrt()
        factor = torch.where(norm > rho, (rho / norm).sqrt(), 1)
        for pair in pairs:
            for i in pair:
                weights[i].mul_(factor.to(weights[i].device, non_blocking=True))

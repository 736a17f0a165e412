"""Balancedness-Aware Regularization, for LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method
from .factors import factor_pairs


@dataclass(frozen=True)
class BAR(Method):
    r"""What SAM does to the balance of LoRA's two factors, done to them without a second gradient.

    On a loss of a product B A, SAM draws \|A\|² - \|B\|² towards 0. For each layer by itself, after
    the backward pass and before the optimizer's step with the learning rate η:

    .. math:: A \leftarrow (1 \pm \alpha \eta) A, \qquad B \leftarrow (1 \mp \alpha \eta) B

    with the upper signs

    * ``balance="gradients"`` (nBAR): where \|g_A\| ≥ \|g_B\|, else the lower ones;
    * ``balance="weights"`` (oBAR): where \|A\| < \|B\|, else the lower ones.

    α is ``sam_rho``, and follows ``sam_rho_schedule``: no weights are perturbed. Norms are
    Frobenius norms of one factor. A gradient that is not finite leaves both factors alone.

    Paper: Li, Zhang, He, "Implicit Regularization of Sharpness-Aware Minimization for
    Scale-Invariant Problems", NeurIPS 2024, https://arxiv.org/abs/2410.14802, algorithms 2 and 3.

    Cost: one pass an update; nothing is kept.

    Settings: ``sam_rho`` 0.2 to 2 with ``sam_rho_schedule`` linear or cosine (RoBERTa: 0.5 to 2,
    GPT-2: 0.1 to 0.3), AdamW without weight decay.

    For models with LoRA adapters of PEFT, in one process or DDP. Scope `batch` only.
    """

    citation: ClassVar[str] = """\
@inproceedings{li2024implicit,
  title = {Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems},
  author = {Li, Bingcong and Zhang, Liang and He, Niao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2410.14802}
}"""
    perturbs: ClassVar[bool] = False
    needs_adapters: ClassVar[bool] = True

    balance: str = "gradients"

    def before_step(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        learning_rates: list[float],
        rho: float,
    ) -> None:
        # Both factors of a layer lie on one device. There are few, and they are small.
        for i, j in factor_pairs(names, auxiliary=False):
            norm_a, norm_b = torch.linalg.vector_norm(grads[i]), torch.linalg.vector_norm(grads[j])
            usable = torch.isfinite(norm_a) & torch.isfinite(norm_b)
            if self.balance == "gradients":
                grows = norm_a >= norm_b
            else:
                grows = torch.linalg.vector_norm(weights[i]) < torch.linalg.vector_norm(weights[j])
            # `torch.where` of two numbers would be in float32, whatever the weights are in.
            sign = torch.where(grows, 1, -1) * usable
            share = rho * sign.to(torch.promote_types(weights[i].dtype, torch.float32))
            weights[i].mul_(1 + share * learning_rates[i])
            weights[j].mul_(1 - share * learning_rates[j])

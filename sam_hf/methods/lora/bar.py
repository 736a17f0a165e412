"""Balancedness-Aware Regularization, for LoRA."""

from dataclasses import dataclass

import torch

from ..base import Floats, Method, Names, Radius, Tensors, option
from .factors import factor_pairs


@dataclass(frozen=True)
class BAR(Method):
    r"""SAM's implicit balancing of LoRA's two factors, applied without a second gradient.

    For a loss of a product B A, SAM drives \|A\|² - \|B\|² towards 0. For each layer separately,
    between the backward pass and the optimizer step with learning rate η:

    .. math:: A \leftarrow (1 \pm \alpha \eta) A, \qquad B \leftarrow (1 \mp \alpha \eta) B

    with the upper signs

    * ``balance="gradients"`` (nBAR): where \|g_A\| ≥ \|g_B\|, else the lower ones;
    * ``balance="weights"`` (oBAR): where \|A\| < \|B\|, else the lower ones.

    α is ``sam_rho`` and follows ``sam_rho_schedule``; no weights are perturbed. Norms are Frobenius
    norms of one factor. A non-finite gradient leaves both factors unchanged.

    Paper: Li, Zhang, He, "Implicit Regularization of Sharpness-Aware Minimization for
    Scale-Invariant Problems", NeurIPS 2024, https://arxiv.org/abs/2410.14802, algorithms 2 and 3.

    Cost: one pass per update; no extra memory.

    Settings: ``sam_rho`` 0.2 to 2 with ``sam_rho_schedule`` linear or cosine (RoBERTa: 0.5 to 2,
    GPT-2: 0.1 to 0.3), AdamW without weight decay.

    For models with LoRA adapters of PEFT, in one process or DDP. Scope `batch` only.
    """

    citation = """@inproceedings{li2024implicit, booktitle = {NeurIPS},
  title = {Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems},
  author = {Li, Bingcong and Zhang, Liang and He, Niao},
  year = {2024},
  url = {https://arxiv.org/abs/2410.14802}
}"""
    perturbs = False
    needs_adapters = acts_on_step = True

    balance: str = option(
        "gradients", choices=("gradients", "weights"), help="Norms that decide (nBAR, oBAR)."
    )

    def before_step(
        self, names: Names, weights: Tensors, grads: Tensors, learning_rates: Floats, rho: Radius
    ) -> None:
        # A loop over layers: the sign differs for each of them, and the factors are small.
        for i, j in factor_pairs(names, auxiliary=False):
            norm_a, norm_b = torch.linalg.vector_norm(grads[i]), torch.linalg.vector_norm(grads[j])
            usable = torch.isfinite(norm_a) & torch.isfinite(norm_b)
            if self.balance == "gradients":
                grows = norm_a >= norm_b
            else:
                grows = torch.linalg.vector_norm(weights[i]) < torch.linalg.vector_norm(weights[j])
            # `torch.where` of two Python numbers is in float32, whatever the dtype of the weights.
            sign = torch.where(grows, 1, -1) * usable
            share = rho * sign.to(torch.promote_types(weights[i].dtype, torch.float32))
            weights[i].mul_(1 + share * learning_rates[i])
            weights[j].mul_(1 - share * learning_rates[j])

"""Friendly Sharpness-Aware Minimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Dot, Method, State
from .lists import blank_, is_usable, mark_started, scale_

_SLOT = "friendly_sam.m"
_STARTED = "friendly_sam.started"


@dataclass(frozen=True)
class FriendlySAM(Method):
    r"""Perturbs along the noise of the gradient: without the part that all batches share.

    .. math:: d = g - \sigma m, \qquad \epsilon = \rho \, d / \|d\|_2, \qquad
              m \leftarrow \lambda m + (1 - \lambda) g

    The first update is SAM's, and m = g after it, as in the authors' code. Their algorithm takes d
    after m has moved, which for σ = 1 is the same direction. σ = 0 is SAM.

    Paper: Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", CVPR 2024,
    https://arxiv.org/abs/2403.12350, algorithm 1.

    Cost: two passes an update; a copy of the perturbed weights and m. In updates that are not
    perturbed (``sam_interval``, ``sam_start_ratio``) m stands still.

    Settings: ``sam_sigma`` 1, ``sam_ema_decay`` (λ) 0.9 (the authors' scripts: 0.6), ``sam_rho``
    0.1 to 0.2 where SAM has 0.1 to 0.2.

    In scope `micro_batch` m moves with every micro-batch, on each process by its own. A zero or
    non-finite gradient leaves m as it is. There is no ``sam_grad_cosine``: g is not kept.
    """

    citation: ClassVar[str] = """\
@inproceedings{li2024friendly,
  title = {Friendly Sharpness-Aware Minimization},
  author = {Li, Tao and Zhou, Pan and He, Zhengbao and Cheng, Xinwen and Huang, Xiaolin},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2024},
  url = {https://arxiv.org/abs/2403.12350}
}"""
    has_state: ClassVar[bool] = True
    remembers_gradients: ClassVar[bool] = True

    sigma: float = 1.0
    ema_decay: float = 0.9

    def direction(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> tuple[list[Tensor], Tensor]:
        slot = state.setdefault(_SLOT, {})
        old = [i for i, name in enumerate(names) if name in slot]
        m = [slot.setdefault(n, torch.zeros_like(g)) for n, g in zip(names, grads, strict=True)]
        squared = dot(grads, grads)
        usable, one = is_usable(squared), torch.ones_like(squared)  # numbers alone are in float32
        started = mark_started(state, _STARTED, usable)
        blank_(grads, ~usable)
        # m is 0 until it has started.
        d = list(torch._foreach_sub(grads, m, alpha=self.sigma))
        scale_(m, torch.where(usable, self.ema_decay, one))
        scale_([grads[i] for i in old], torch.where(started, 1 - self.ema_decay, one))
        torch._foreach_add_(m, grads)
        return d, torch.where(usable, dot(d, d), 0)

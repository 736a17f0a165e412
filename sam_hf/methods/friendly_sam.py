"""Friendly Sharpness-Aware Minimization."""

from dataclasses import dataclass

import torch

from .base import Direction, Dot, Method, Names, State, Tensors, option
from .lists import add_where_, is_usable, mark_started, scale_

_SLOT, _STARTED = "friendly_sam.m", "friendly_sam.started"


@dataclass(frozen=True)
class FriendlySAM(Method):
    r"""Perturbs along the batch-specific noise of the gradient, without its moving average.

    .. math:: d = g - \sigma m, \qquad \epsilon = \rho \, d / \|d\|_2, \qquad
              m \leftarrow \lambda m + (1 - \lambda) g

    The first update is SAM's, with m = g after it, as in the authors' code. Their algorithm makes
    d after the update of m, which is the same direction for σ = 1. σ = 0 is SAM.

    Paper: Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", CVPR 2024,
    https://arxiv.org/abs/2403.12350, algorithm 1.

    Cost: two passes per update; a copy of the perturbed weights, and m. Updates that are not
    perturbed (``sam_interval``, ``sam_start_ratio``) do not change m.

    Settings: ``sigma`` 1, ``ema_decay`` (λ) 0.9 (authors' scripts: 0.6), ``sam_rho`` 0.1 to 0.2.

    In scope `micro_batch` every micro-batch updates m, separately on each process. A zero or
    non-finite gradient does not change m. ``sam_grad_cosine`` is not logged, because g is not kept.
    """

    citation = """@inproceedings{li2024friendly, booktitle = {CVPR},
  title = {Friendly Sharpness-Aware Minimization},
  author = {Li, Tao and Zhou, Pan and He, Zhengbao and Cheng, Xinwen and Huang, Xiaolin},
  year = {2024},
  url = {https://arxiv.org/abs/2403.12350}
}"""
    has_state = remembers_gradients = True

    sigma: float = option(1.0, low=0.0, help="Part of the mean gradient that is removed. 0 is SAM.")
    ema_decay: float = option(0.9, low=0.0, below=1.0, help="Decay of the mean per update.")

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        slot = state.setdefault(_SLOT, {})
        old = [i for i, name in enumerate(names) if name in slot]
        m = [slot.setdefault(n, torch.zeros_like(g)) for n, g in zip(names, grads, strict=True)]
        squared = dot(grads, grads)
        usable, one = is_usable(squared), torch.ones_like(squared)  # in float64 for float64 weights
        started = mark_started(state, _STARTED, usable)
        # m is 0 until it has started. An unusable d gets the norm 0 and perturbs nothing.
        d = list(torch._foreach_sub(grads, m, alpha=self.sigma))
        scale_(m, torch.where(usable, self.ema_decay, one))
        scale_([grads[i] for i in old], torch.where(started, 1 - self.ema_decay, one))
        add_where_(m, grads, usable)
        return d, torch.where(usable, dot(d, d), 0)

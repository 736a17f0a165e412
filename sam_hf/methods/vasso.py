"""Variance-suppressed Sharpness-Aware Optimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Dot, Method, State
from .lists import blank_, is_usable, mark_started, scale_

_SLOT = "vasso.d"
_STARTED = "vasso.started"


@dataclass(frozen=True)
class VaSSO(Method):
    r"""Perturbs along a moving average of the gradients, which a single batch sways less.

    .. math:: d \leftarrow (1 - \theta) d + \theta g, \qquad \epsilon = \rho \, d / \|d\|_2

    with d = g at first. θ = 1 is SAM.

    Paper: Li, Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
    NeurIPS 2023, https://arxiv.org/abs/2309.15639, algorithm 1.

    Cost: two passes an update; a copy of the perturbed weights and d. In updates that are not
    perturbed (``sam_interval``, ``sam_start_ratio``) d stands still.

    Settings: ``sam_theta`` 0.9 (the paper also tries 0.2 and 0.4), ``sam_rho`` as for SAM.

    In scope `micro_batch` d moves with every micro-batch, on each process by its own. A zero or
    non-finite gradient leaves d as it is, and perturbs nothing. There is no ``sam_grad_cosine``:
    g is not kept.
    """

    citation: ClassVar[str] = """\
@inproceedings{li2023enhancing,
  title = {Enhancing Sharpness-Aware Optimization Through Variance Suppression},
  author = {Li, Bingcong and Giannakis, Georgios B.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2309.15639}
}"""
    has_state: ClassVar[bool] = True
    remembers_gradients: ClassVar[bool] = True

    theta: float = 0.9

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
        d = [slot.setdefault(n, torch.zeros_like(g)) for n, g in zip(names, grads, strict=True)]
        squared = dot(grads, grads)
        usable, one = is_usable(squared), torch.ones_like(squared)  # numbers alone are in float32
        started = mark_started(state, _STARTED, usable)
        blank_(grads, ~usable)
        scale_(d, torch.where(usable, torch.where(started, 1 - self.theta, 0 * one), one))
        scale_([grads[i] for i in old], torch.where(started, self.theta, one))
        torch._foreach_add_(d, grads)
        return d, torch.where(usable, dot(d, d), 0)

    @classmethod
    def keeps_direction(cls) -> bool:
        return True  # it is the state

"""Variance-suppressed Sharpness-Aware Optimization."""

from dataclasses import dataclass

import torch

from .base import Direction, Dot, Method, Names, State, Tensors, option
from .lists import add_where_, is_usable, mark_started, scale_

_SLOT, _STARTED = "vasso.d", "vasso.started"


@dataclass(frozen=True)
class VaSSO(Method):
    r"""Perturbs along a moving average of the gradients, which suppresses their variance.

    .. math:: d \leftarrow (1 - \theta) d + \theta g, \qquad \epsilon = \rho \, d / \|d\|_2

    with d = g at first. θ = 1 is SAM.

    Paper: Li, Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
    NeurIPS 2023, https://arxiv.org/abs/2309.15639, algorithm 1.

    Cost: two passes per update; a copy of the perturbed weights, and d. Updates that are not
    perturbed (``sam_interval``, ``sam_start_ratio``) do not change d.

    Settings: ``theta`` 0.9 (the paper also tries 0.2 and 0.4), ``sam_rho`` as for SAM.

    In scope `micro_batch` every micro-batch updates d, separately on each process. A zero or
    non-finite gradient leaves d as it is and perturbs nothing. ``sam_grad_cosine`` is not logged.
    """

    citation = """@inproceedings{li2023enhancing, booktitle = {NeurIPS},
  title = {Enhancing Sharpness-Aware Optimization Through Variance Suppression},
  author = {Li, Bingcong and Giannakis, Georgios B.},
  year = {2023},
  url = {https://arxiv.org/abs/2309.15639}
}"""
    has_state = remembers_gradients = True
    keeps_direction = True  # d is the state

    theta: float = option(0.9, above=0.0, high=1.0, help="Weight of the new gradient. 1 is SAM.")

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        slot = state.setdefault(_SLOT, {})
        old = [i for i, name in enumerate(names) if name in slot]
        d = [slot.setdefault(n, torch.zeros_like(g)) for n, g in zip(names, grads, strict=True)]
        squared = dot(grads, grads)
        usable, one = is_usable(squared), torch.ones_like(squared)  # in float64 for float64 weights
        started = mark_started(state, _STARTED, usable)
        scale_(d, torch.where(usable, 1 - self.theta, one))  # d is 0 until it has started
        scale_([grads[i] for i in old], torch.where(started, self.theta, one))
        add_where_(d, grads, usable)
        return d, torch.where(usable, dot(d, d), 0)

"""Base optimizers and gradient clipping in plain torch, written from their definitions.

Each step takes the weights w, the gradient g (None: the parameter is left alone) and the state of
the last step ({} before the first), and returns the new weights and state. Nothing is changed in
place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def sgd_step(
    w: list[Tensor],
    g: list[Tensor | None],
    state: State,
    lr: float,
    mu: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[list[Tensor], State]:
    """Heavy-ball momentum with L2 decay: b = mu b + (g + weight_decay w), w = w - lr b.

    A buffer starts as its first gradient, and the learning rate stays outside it (torch.optim.SGD's
    definition; Sutskever et al. put it inside).
    """
    w_new, b_new = [], []
    for w_i, g_i, b_i in zip(w, g, state.get("b", [None] * len(w)), strict=True):
        if g_i is not None:
            g_i = g_i + weight_decay * w_i
            b_i = g_i if b_i is None else mu * b_i + g_i
            w_i = w_i - lr * b_i
        w_new.append(w_i)
        b_new.append(b_i)
    return w_new, {"b": b_new}


def adamw_step(
    w: list[Tensor],
    g: list[Tensor | None],
    state: State,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[list[Tensor], State]:
    """Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, Algorithm 2.

    m = beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
    v = beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)
    w = w - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

    The decay is multiplied by the learning rate, as in torch.optim.AdamW.
    """
    beta1, beta2 = betas
    fresh = [(0, torch.zeros_like(w_i), torch.zeros_like(w_i)) for w_i in w]
    w_new, moments = [], []
    for w_i, g_i, (t, m, v) in zip(w, g, state.get("moments", fresh), strict=True):
        if g_i is not None:
            t = t + 1
            m = beta1 * m + (1 - beta1) * g_i
            v = beta2 * v + (1 - beta2) * g_i * g_i
            m_hat = m / (1 - beta1**t)
            v_hat = v / (1 - beta2**t)
            w_i = w_i - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * w_i)
        w_new.append(w_i)
        moments.append((t, m, v))
    return w_new, {"moments": moments}


def clip_by_global_norm(
    g: list[Tensor | None], max_norm: float
) -> tuple[list[Tensor | None], float]:
    """Scale g by min(1, max_norm / (|g| + 1e-6)), as torch does; return it with |g|."""
    norm = math.sqrt(sum((g_i * g_i).sum().item() for g_i in g if g_i is not None))
    scale = min(1.0, max_norm / (norm + 1e-6))
    return [None if g_i is None else scale * g_i for g_i in g], norm

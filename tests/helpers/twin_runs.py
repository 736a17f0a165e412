"""Whole runs of the trainer, worked out with the float64 twin and compared to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from reference_optimizers import clip_by_global_norm
from reference_radius import AutomaticRadius
from reference_sam import sam_step
from tiny import (
    assert_same_bits,
    weights,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.data import default_collate

RHO = 0.3


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def loss_of(
    model: nn.Module, names: list[str], batch: dict[str, Tensor], share: float = 1, **kwargs: Any
) -> Callable[[list[Tensor]], Tensor]:
    """The micro-batch's share of the loss, as a function of the weights."""

    def loss(w: list[Tensor]) -> Tensor:
        parameters = dict(zip(names, w, strict=True))
        return share * functional_call(model, parameters, (), {**batch, **kwargs})["loss"]

    return loss


def optimizer_state(trainer: Any) -> list[Tensor]:
    states = trainer.optimizer.state_dict()["state"]
    return [torch.as_tensor(v) for _, s in sorted(states.items()) for _, v in sorted(s.items())]


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(actual: Any, expected: Any) -> None:
    """The same weights, optimizer state, losses and random state, to the last bit."""
    assert_same_bits(actual.model, weights(expected.model))
    assert_close(optimizer_state(actual), optimizer_state(expected), rtol=0, atol=0)
    assert losses(actual) == losses(expected)


def share(model: nn.Module):
    """The share of a micro-batch in the update's loss, as a function of the model's parameters."""

    def loss(w: dict[str, Tensor], batch: dict[str, Tensor], **count: Any) -> Tensor:
        return functional_call(model, w, kwargs={**batch, **count})["loss"]

    return loss


def by_the_twin(
    model: nn.Module,
    updates: list[list[Any]],
    rho: float | None = RHO,
    clip: float = 0.0,
    step: Any = sam_step,
    target: float = 0.5,
    **options: Any,
) -> dict[str, Tensor]:
    """SGD on g_s of the float64 twin. Each update is a list of functions of the parameters.

    Without a rho it is the automatic one, for this share.
    """
    radius = AutomaticRadius(target) if rho is None else None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names, w = list(trained), [p.detach().clone() for p in trained.values()]
    for shares in updates:
        as_lists = [lambda w, f=f: f(dict(zip(names, w, strict=True))) for f in shares]
        g_s, readings = step(w, as_lists, radius.rho if radius else rho, **options)
        if radius:
            radius.update([r.loss for r in readings], [r.sharpness for r in readings])
        g_s = clip_by_global_norm(g_s, clip)[0] if clip else g_s
        w = [w_i if g_i is None else w_i - 0.1 * g_i for w_i, g_i in zip(w, g_s, strict=True)]
    return dict(zip(names, w, strict=True))


def means(model: nn.Module, windows: list[list[list[Any]]]) -> list[list[Any]]:
    """For windows of micro-batches of rows: the shares of a loss that is a mean over examples."""
    loss = share(model)

    def part(rows: list[Any], count: int) -> Any:
        return lambda w: loss(w, default_collate(rows)) / count

    return [[part(rows, len(window)) for rows in window] for window in windows]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all weights together, those of `b` in float64."""
    return math.sqrt(sum((a[n].double() - value).square().sum().item() for n, value in b.items()))


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def token_means(model: nn.Module, windows: list[list[list[Any]]]) -> list[list[Any]]:
    """The same of a loss that is a mean over the tokens of the whole update."""
    loss = share(model)

    def part(rows: list[Any], count: Tensor) -> Any:
        return lambda w: loss(w, default_collate(rows), num_items_in_batch=count)

    def tokens(window: list[list[Any]]) -> Tensor:
        return sum((row["labels"] != -100).sum() for rows in window for row in rows)

    return [[part(rows, tokens(window)) for rows in window] for window in windows]

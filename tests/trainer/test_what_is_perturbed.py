"""Which parameters are perturbed and combined: those that the optimizer steps, as they are now."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlp import MLP, TINY_RHO, assert_same_weights, build
from reference_asam import asam_step
from reference_gsam import gsam_step
from reference_optimizers import clip_by_global_norm
from reference_sam import Gradient, sam_step
from tiny import Spy
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback
from twin_runs import RHO, assert_weights, by_the_twin, means

from sam_hf import SAMTrainer

GSAM = {"sam_method": "gsam", "sam_method_args": {"alpha": 0.4}}
TWINS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "sam": ({}, sam_step),
    "sam-micro_batch": (
        {"sam_scope": "micro_batch"},
        lambda *args, **kwargs: sam_step(*args, scope="micro_batch", **kwargs),
    ),
    "asam": ({"sam_method": "asam"}, lambda *args, **kwargs: asam_step(*args, eta=0.01, **kwargs)),
    "gsam": (GSAM, lambda *args, **kwargs: gsam_step(*args, alpha=0.4, **kwargs)),
}
all_methods = pytest.mark.parametrize("method", TWINS)


def windows(trainer: Any) -> list[Any]:
    rows, k = trainer.train_dataset.rows, trainer.args.gradient_accumulation_steps
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    return means(trainer.model, [batches[i : i + k] for i in range(0, len(batches), k)])


def by_the_twin_on(trainer: Any, parts: list[str], twin: Any) -> list[dict[str, Tensor]]:
    """SGD with the twin on the parameters of each update's part alone: the weights after each."""
    w = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    reached = []
    for part, losses in zip(parts, windows(trainer), strict=True):
        names = [name for name in w if re.match(part, name)]
        as_lists = [
            lambda x, f=f, w=w, names=names: f(w | dict(zip(names, x, strict=True))) for f in losses
        ]
        g, _ = twin([w[name] for name in names], as_lists, RHO)
        w = w | {name: w[name] - 0.1 * x for name, x in zip(names, g, strict=True)}
        reached.append(w)
    return reached


# ---- An optimizer of a part of the model ---------------------------------------------------------


class OwnOptimizer:
    """Makes its optimizer itself, for the parameters whose names begin with `part`."""

    part = "head"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        self.optimizer = sgd(self.model, self.part)
        return self.optimizer


def sgd(model: nn.Module, part: str) -> torch.optim.Optimizer:
    # One group for each parameter: all groups count.
    chosen = [p for name, p in model.named_parameters() if name.startswith(part)]
    return torch.optim.SGD([{"params": [p]} for p in chosen], lr=0.1)


def partly_trained(trainer_class: type, part: str, given: bool, **kwargs: Any) -> Any:
    """A trainer whose optimizer has a part of the parameters; all of them require gradients."""
    if not given:
        owner = type("Owner", (OwnOptimizer, trainer_class), {"part": part})
        return build(owner, **kwargs)
    torch.manual_seed(0)
    model = MLP()
    optimizers = {"optimizers": (sgd(model, part), None)}
    return build(trainer_class, lambda: model, trainer_kwargs=optimizers, **kwargs)


@pytest.mark.parametrize("given", [True, False], ids=["optimizers", "create_optimizer"])
@pytest.mark.parametrize("part", ["head", "first", "middle.weight"])
@pytest.mark.parametrize("accumulation", [1, 3])
@all_methods
def test_only_what_the_optimizer_steps_is_perturbed_and_counted_in_the_norm(
    method, accumulation, part, given
):
    sam, twin = TWINS[method]
    sam = {"sam_rho": RHO, **sam}
    trainer = partly_trained(SAMTrainer, part, given, accumulation=accumulation, sam=sam)
    # GSAM combines what is stepped: gradients of other parameters do not count.
    expected = by_the_twin_on(trainer, [part] * 3, twin)[-1]
    trainer.train()
    assert_weights(trainer.model, expected)
    if method.startswith("sam"):
        norms = [entry["sam_perturbation_norm"] for entry in trainer.state.log_history[:3]]
        assert norms == pytest.approx([RHO] * 3)


@pytest.mark.parametrize("part", ["head", "first"])
def test_sam_params_choose_among_what_the_optimizer_steps(part):
    sam = {"sam_rho": RHO, "sam_params": "weight"}
    trainer = partly_trained(SAMTrainer, part, True, sam=sam)
    names = [name for name, _ in trainer.model.named_parameters()]

    def step(w: list[Tensor], losses: Any, rho: float) -> tuple[Gradient, Any]:
        g_s, readings = sam_step(w, losses, rho, perturbed=[n == f"{part}.weight" for n in names])
        stepped = [n.startswith(part) for n in names]
        return [g if flag else None for g, flag in zip(g_s, stepped, strict=True)], readings

    expected = by_the_twin(trainer.model, windows(trainer), step=step)
    trainer.train()
    assert_weights(trainer.model, expected)


@all_methods
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_that_the_optimizer_does_not_step_are_clipped_as_in_plain_training(
    method, accumulation
):
    options = {"accumulation": accumulation, "max_grad_norm": 0.1}
    sam = {"sam_rho": TINY_RHO, **TWINS[method][0]}
    ours = partly_trained(SAMTrainer, "head", True, sam=sam, **options)
    expected = partly_trained(Trainer, "head", True, **options)
    for trainer in (ours, expected):
        trainer.train()
    assert_same_weights(ours.model, expected.model)


def test_gradients_that_the_optimizer_does_not_step_count_in_clipping_with_their_g_s():
    trainer = partly_trained(SAMTrainer, "head", True, sam={"sam_rho": RHO}, max_grad_norm=0.1)
    flags = [name.startswith("head") for name, _ in trainer.model.named_parameters()]

    def step(w: list[Tensor], losses: Any, rho: float) -> tuple[Gradient, Any]:
        g_s, readings = sam_step(w, losses, rho, perturbed=flags)
        g_s, _ = clip_by_global_norm(g_s, 0.1)
        return [g if flag else None for g, flag in zip(g_s, flags, strict=True)], readings

    expected = by_the_twin(trainer.model, windows(trainer), step=step)
    trainer.train()
    # The Trainer's clipping divides by the norm plus 1e-6.
    actual = dict(trainer.model.named_parameters())
    assert_close(actual, {n: nn.Parameter(w) for n, w in expected.items()}, rtol=0, atol=1e-6)


# ---- Layers that are frozen and thawed in turn (LISA) --------------------------------------------


class Lisa(TrainerCallback):
    """Trains one of two layers of the same size in each update, and the head in all of them."""

    layers = ("first", "middle", "first")

    def on_step_begin(
        self, args: Any, state: Any, *_: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        for layer in ("first", "middle"):
            model.get_submodule(layer).requires_grad_(layer == self.layers[state.global_step])


def lisa(trainer_class: type, **kwargs: Any) -> tuple[Any, Spy]:
    torch.manual_seed(0)
    model, spy = MLP(), Spy()
    assert [p.shape for p in model.first.parameters()] == [
        p.shape for p in model.middle.parameters()
    ]
    options = {"optimizers": (sgd(model, ""), None), "callbacks": [Lisa(), spy]}
    return build(trainer_class, lambda: model, trainer_kwargs=options, **kwargs), spy


@all_methods
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_layer_that_is_thawed_while_another_is_frozen_is_perturbed_and_combined(
    method, accumulation
):
    sam, twin = TWINS[method]
    trainer, spy = lisa(SAMTrainer, accumulation=accumulation, sam={"sam_rho": RHO, **sam})
    expected = by_the_twin_on(trainer, [f"{layer}|head" for layer in Lisa.layers], twin)
    trainer.train()
    for actual, reference in zip(spy.weights, expected, strict=True):
        assert_close(actual, reference, rtol=1e-11, atol=1e-13)


@all_methods
@pytest.mark.parametrize("accumulation", [1, 3])
def test_layers_frozen_and_thawed_in_turn_train_as_plain_at_a_tiny_rho(method, accumulation):
    sam = {"sam_rho": TINY_RHO, **TWINS[method][0]}
    ours, _ = lisa(SAMTrainer, accumulation=accumulation, sam=sam)
    expected, _ = lisa(Trainer, accumulation=accumulation)
    for trainer in (ours, expected):
        trainer.train()
    assert_same_weights(ours.model, expected.model)


def test_a_layer_that_is_thawed_within_the_run_is_in_the_norm_of_e():
    trainer, _ = lisa(SAMTrainer, sam={"sam_rho": RHO})
    trainer.train()
    norms = [entry["sam_perturbation_norm"] for entry in trainer.state.log_history[:3]]
    assert norms == pytest.approx([RHO] * 3)

"""The weights equal the float64 twins', update for update, and rho = 0 is the plain Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_asam import asam_step
from reference_optimizers import adamw_step, clip_by_global_norm, sgd_step
from reference_sam import sam_step
from tiny import (
    Classifier,
    LanguageModel,
    Spy,
    assert_same_bits,
    examples,
    sam_trainer,
    sentences,
    weights,
)
from torch import Tensor, nn
from transformers import Trainer
from twin_runs import collate, loss_of

from sam_hf import with_sam

RHO, ETA = 0.3, 0.01

METHODS = {
    "sam": ({}, lambda w, losses, names, **kw: sam_step(w, losses, RHO, **kw)),
    "asam": (
        {"sam_eta": ETA},
        lambda w, losses, names, **kw: asam_step(w, losses, RHO, ETA, **kw),
    ),
    "asam-eta0": (
        {"sam_eta": 0.0},
        lambda w, losses, names, **kw: asam_step(w, losses, RHO, 0.0, **kw),
    ),
    "asam-weights": (
        {"sam_adaptive_scope": "weights"},
        lambda w, losses, names, **kw: asam_step(
            w, losses, RHO, ETA, adaptive=["weight" in n for n in names], **kw
        ),
    ),
}

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01}


class Twin:
    """A run of the reference: the same examples in the same order, hand-written optimizers."""

    def __init__(self, model: nn.Module, step: Callable, optimizer: str, **options: Any) -> None:
        self.model, self.step = model, step
        self.names = [name for name, _ in model.named_parameters()]
        self.w = [p.detach().clone() for p in model.parameters()]
        self.optimizer, self.options, self.state = optimizer, options, {}
        self.readings: list[Any] = []

    def update(self, micro_batches: list[dict[str, Tensor]], scope: str, **kwargs: Any) -> None:
        counted = isinstance(self.model, LanguageModel)
        extra = (
            {"num_items_in_batch": sum((b["labels"] != -100).sum() for b in micro_batches)}
            if counted
            else {}
        )
        share = 1 if counted else 1 / len(micro_batches)
        losses = [loss_of(self.model, self.names, batch, share, **extra) for batch in micro_batches]
        g_s, readings = self.step(self.w, losses, self.names, scope=scope, **kwargs)
        self.readings.append(readings)
        if clip := self.options.get("clip"):
            g_s, _ = clip_by_global_norm(g_s, clip)
        decay, lr = self.options.get("weight_decay", 0.0), self.options["lr"]
        if self.optimizer == "sgd":
            self.w, self.state = sgd_step(self.w, g_s, self.state, lr, 0.9, decay)
        else:
            self.w, self.state = adamw_step(self.w, g_s, self.state, lr, weight_decay=decay)

    def assert_equals(self, actual: dict[str, Tensor], tolerance: float = 1e-10) -> None:
        for name, expected in zip(self.names, self.w, strict=True):
            assert (actual[name] - expected).abs().max() < tolerance, name


class DecaysEverything(Trainer):
    """The twins decay every parameter."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]


def run(model: nn.Module, data: Any, sam: dict[str, Any], **args: Any) -> tuple[Any, Spy]:
    spy = Spy()
    trainer = sam_trainer(
        model,
        data,
        with_sam(DecaysEverything),
        {"callbacks": [spy]},
        {"sam_rho": RHO, **sam},
        **args,
    )
    trainer.train()
    return trainer, spy


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_weights_equal_the_twin_after_every_update(method, optimizer, scope, clip):
    model, data = Classifier(), examples(16)
    options, step = METHODS[method]
    args = SGD if optimizer == "sgd" else ADAMW
    twin = Twin(model, step, optimizer, lr=args["learning_rate"], weight_decay=0.1, clip=clip)
    _, spy = run(
        model,
        data,
        {"sam_method": method.split("-")[0], "sam_scope": scope, **options},
        **args,
        weight_decay=0.1,
        max_grad_norm=clip,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    for i in range(4):
        rows = data.rows[4 * i : 4 * i + 4]
        twin.update([collate(rows[:2]), collate(rows[2:])], scope)
        twin.assert_equals(spy.weights[i])
    # The test would see a trainer that does not perturb at all:
    assert twin.readings[0][0].sharpness > 1e-3


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_ragged_token_counts_and_a_short_last_window_equal_the_twin(scope):
    model, data = LanguageModel(), sentences(10)
    twin = Twin(model, METHODS["sam"][1], "sgd", lr=0.1)
    trainer, spy = run(
        model,
        data,
        {"sam_scope": scope},
        **SGD,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=-1,
        num_train_epochs=1,
    )
    batches = [collate(data.rows[i : i + 2]) for i in range(0, 10, 2)]
    assert trainer.state.global_step == 2
    for i, window in enumerate([batches[:3], batches[3:]]):  # three micro-batches, then two
        twin.update(window, scope)
        twin.assert_equals(spy.weights[i])


@pytest.mark.parametrize(
    ("sam_params", "chosen"),
    [
        ("norms", lambda n: n.startswith("layer_norm")),
        ("matrices", lambda n: n in ("first.weight", "second.weight")),
        (r"^second\.", lambda n: n.startswith("second")),
    ],
)
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_only_the_selected_parameters_are_perturbed(method, sam_params, chosen):
    model, data = Classifier(), examples(8)
    twin = Twin(model, METHODS[method][1], "sgd", lr=0.1)
    _, spy = run(model, data, {"sam_method": method, "sam_params": sam_params}, **SGD, max_steps=2)
    for i in range(2):
        twin.update(
            [collate(data.rows[4 * i : 4 * i + 4])],
            "batch",
            perturbed=[chosen(name) for name in twin.names],
        )
        twin.assert_equals(spy.weights[i])
    everything = [e for e in twin.readings[0][0].e if e.abs().max() > 0]
    assert 0 < len(everything) < len(twin.names)


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_the_split_of_the_batch_does_not_matter_in_scope_batch(method):
    start, data = LanguageModel(), sentences(24)
    results = []
    for size, steps in [(1, 8), (8, 1), (2, 4)]:
        model = LanguageModel()
        model.load_state_dict(weights(start))
        run(
            model,
            data,
            {"sam_method": method},
            **ADAMW,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        results.append(weights(model))
    for other in results[1:]:
        for name, value in results[0].items():
            assert (other[name] - value).abs().max() < 1e-10, name
    assert any((results[0][n] - v).abs().max() > 1e-3 for n, v in weights(start).items())


def test_the_split_of_the_batch_matters_in_scope_micro_batch():
    start, data, results = LanguageModel(), sentences(8), []
    for size, steps in [(1, 8), (8, 1)]:
        model = LanguageModel()
        model.load_state_dict(weights(start))
        run(
            model,
            data,
            {"sam_scope": "micro_batch"},
            **SGD,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        results.append(weights(model))
    assert any((results[0][n] - results[1][n]).abs().max() > 1e-4 for n in results[0])


def test_a_window_cut_short_by_an_exhausted_stream_joins_the_next_one_as_in_the_plain_trainer():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(12).rows)

    class Watched(DecaysEverything):
        windows: tuple = ()

        def compute_loss(self, model, inputs, **kwargs):
            self.windows += ((self.state.global_step, inputs["x"][0, 0].item()),)
            return super().compute_loss(model, inputs, **kwargs)

    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    plain = sam_trainer(Classifier(), Stream(), Watched, **args)
    plain.train()
    model, spy = Classifier(), Spy()
    twin = Twin(model, METHODS["sam"][1], "sgd", lr=0.1)
    trainer = sam_trainer(
        model, Stream(), with_sam(Watched), {"callbacks": [spy]}, {"sam_rho": RHO}, **args
    )
    trainer.train()
    assert trainer.windows == plain.windows
    # The stream holds three micro-batches. The third is left over at the end of each of its passes,
    # with the share of the window it was read in, which is its own; its gradient is kept.
    a, b, c = (collate(examples(12).rows[i : i + 4]) for i in (0, 4, 8))
    for update, window in enumerate([[(a, 0.5), (b, 0.5)], [(c, 1.0), (a, 0.5), (b, 0.5)]]):
        losses = [loss_of(model, twin.names, batch, share) for batch, share in window]
        g_s, _ = sam_step(twin.w, losses, RHO)
        twin.w, _ = sgd_step(twin.w, g_s, {}, 0.1)
        twin.assert_equals(spy.weights[update])


@pytest.mark.parametrize("off", [{"sam_rho": 0.0}, {"sam_start_ratio": 1.0}])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_without_perturbation_the_run_is_the_plain_trainers_bit_for_bit(off, scope):
    runs = []
    for sam in (None, {"sam_scope": scope, **off}):
        torch.manual_seed(1)
        model = Classifier(dropout=0.2)
        kwargs = {} if sam is None else {"sam": sam}
        trainer = sam_trainer(
            model,
            examples(24),
            **({"trainer_class": Trainer} if sam is None else {}),
            **kwargs,
            **ADAMW,
            max_grad_norm=0.1,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        runs.append((trainer, torch.get_rng_state()))
    (plain, plain_rng), (sam_run, sam_rng) = runs
    assert_same_bits(sam_run.model, weights(plain.model))
    assert torch.equal(plain_rng, sam_rng)
    # A run that has not begun to perturb says so.
    passes = [e.pop("sam_passes_per_update", 1) for e in sam_run.state.log_history]
    assert set(passes) == {1}
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [
        [{k: v for k, v in entry.items() if k not in drop} for entry in t.state.log_history]
        for t, _ in runs
    ]
    assert logs[0] == logs[1]
    for a, b in zip(
        plain.optimizer.state_dict()["state"].values(),
        sam_run.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_interval_two_perturbs_every_other_update_and_start_ratio_the_last_part():
    def passes(updates, **sam):
        trainer = sam_trainer(Classifier(), examples(16), sam=sam, max_steps=updates)
        calls = []
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: (
            calls.append(trainer.state.global_step) or (compute_loss(*a, **k))
        )
        trainer.train()
        return calls

    assert passes(4, sam_interval=2) == [0, 0, 1, 2, 2, 3]
    assert passes(4, sam_start_ratio=0.5) == [0, 1, 2, 2, 3, 3]
    assert passes(4, sam_rho=0.0) == [0, 1, 2, 3]
    assert passes(6, sam_start_ratio=0.5, sam_interval=2) == [0, 1, 2, 3, 4, 4, 5]

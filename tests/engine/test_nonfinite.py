"""NaN and inf in either pass, with and without a gradient scaler."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from combinations import WHOLE
from faulty import (
    TINY_RHO,
    Fault,
    Faulty,
    K,
    all_methods_and_scopes,
    all_methods_at_micro_batches,
    all_scopes,
    assert_same,
    bad_gradient,
    every_micro_batch,
    failed,
    failure,
    forward_number,
    options,
    undisturbed,
    watched,
)
from tiny import Classifier, Spy, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, set_seed

from sam_hf import SAMTrainer


def bad_loss(value: float) -> Fault:
    """The loss, and with it every gradient, is no number."""
    return lambda hidden: hidden * value


FAULTS = [
    pytest.param(make(value), id=f"{make.__name__}-{value}")
    for make in (bad_loss, bad_gradient)
    for value in (math.nan, math.inf)
]
every_fault = pytest.mark.parametrize("fault", FAULTS)


def partly_plain(micro_batch: int) -> type:
    """A SAM trainer that takes the plain Trainer's training step for one micro-batch."""

    class PartlyPlainTrainer(SAMTrainer):
        micro_batches = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.micro_batches += 1
            if self.micro_batches - 1 == micro_batch:
                return Trainer.training_step(self, *args, **kwargs)
            return super().training_step(*args, **kwargs)

    return PartlyPlainTrainer


def trained(
    method: str,
    scope: str,
    faults: dict[int, Fault] | None = None,
    trainer_class: type = SAMTrainer,
    max_steps: int = 1,
) -> Any:
    set_seed(0)
    trainer = sam_trainer(
        Faulty(faults),
        examples(4 * K * 2),
        trainer_class,
        sam=options(method, scope, WHOLE, sam_rho=0.3),
        gradient_accumulation_steps=K,
        max_steps=max_steps,
    )
    trainer.train()
    assert not trainer.model.faults
    return trainer


# ---- Without a scaler -------------------------------------------------------------------------


@all_methods_at_micro_batches
@every_fault
def test_a_nonfinite_ascent_perturbs_nothing_and_the_step_is_the_plain_one(
    method: str, scope: str, index: int, fault: Fault
) -> None:
    number = forward_number("ascent", scope, index)
    trainer = trained(method, scope, {number: fault})
    expected = trained(
        method, scope, trainer_class=Trainer if scope == "batch" else partly_plain(index)
    )
    assert_same_bits(trainer.model, weights(expected.model))


@all_methods_and_scopes
@every_fault
def test_a_nonfinite_ascent_is_logged_as_no_perturbation_and_never_as_nan(
    method: str, scope: str, fault: Fault
) -> None:
    last = forward_number("ascent", scope, K - 1)
    first, second = trained(method, scope, {last: fault}, max_steps=2).state.log_history[:2]
    assert first["sam_perturbation_norm"] == 0
    assert all(math.isfinite(v) for name, v in first.items() if name.startswith("sam_"))
    if scope == "batch":  # with an infinite loss at w, the sharpness is not known
        assert first.get("sam_sharpness", 0) == 0
    assert second["sam_perturbation_norm"] > 0


@all_methods_at_micro_batches
@every_fault
def test_a_nonfinite_descent_is_to_the_trainer_what_it_is_without_sam(
    method: str, scope: str, index: int, fault: Fault
) -> None:
    number = forward_number("descent", scope, index)
    trainer = watched(options(method, scope), {number: fault}, max_steps=1)
    plain = watched(None, {index: fault}, max_steps=1)
    w = weights(trainer.model)
    for each in (trainer, plain):
        each.train()
        assert not each.model.faults
    left, finite_run = trainer.snapshots[-1], undisturbed(None)[K - 1]
    assert_same(left.weights, {name: w[name] for name in left.weights})
    assert_same(left.statistics, finite_run.statistics)
    assert left.generators == finite_run.generators
    assert left.counters == finite_run.counters
    for gradients, values in (
        (left.gradients, plain.snapshots[-1].gradients),
        (weights(trainer.model), weights(plain.model)),
    ):
        assert any(not v.isfinite().all() for v in gradients.values())
        assert_same(
            {name: v.isfinite() for name, v in gradients.items()},
            {name: v.isfinite() for name, v in values.items()},
        )


# ---- With a scaler ----------------------------------------------------------------------------


class Trajectory(Spy):
    """After every update: the weights, the scale, the learning rate; and which were skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []
        self.rates: list[float] = []
        self.skipped: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if kwargs["optimizer"].step_was_skipped:
            self.skipped.append(len(self.scales))
        self.scales.append(kwargs["optimizer"].scaler.get_scale())
        self.rates.extend(kwargs["lr_scheduler"].get_last_lr())


def scaled(
    sam: dict[str, Any] | None,
    model: nn.Module,
    scaling: tuple[float, float, float, int] = (8.0, 2.0, 0.5, 2),
    **args: Any,
) -> tuple[Any, Trajectory]:
    """A trained trainer with a scaler, and what it went through."""
    set_seed(0)
    trajectory = Trajectory()
    trainer = sam_trainer(
        model,
        examples(4 * K * 8, dtype=next(model.parameters()).dtype),
        Trainer if sam is None else SAMTrainer,
        {"callbacks": [trajectory]},
        sam,
        gradient_accumulation_steps=K,
        lr_scheduler_type="linear",
        **args,
    )
    # Accelerate makes one for fp16 on a GPU alone.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", *scaling)
    trainer.train()
    return trainer, trajectory


@all_scopes
@every_micro_batch
@pytest.mark.parametrize("passes", [("ascent",), ("descent",), ("ascent", "descent")], ids="+".join)
@pytest.mark.parametrize("fault", [FAULTS[0], FAULTS[-1]])
def test_only_an_overflow_in_the_descent_skips_the_step_and_halves_the_scale(
    scope: str, index: int, passes: tuple[str, ...], fault: Fault
) -> None:
    set_seed(0)
    model = Faulty({forward_number(each, scope, index, update=1): fault for each in passes})
    plain_model = copy.deepcopy(model)
    is_skipped = "descent" in passes
    plain_model.faults = {K + index: fault} if is_skipped else {}
    _, seen = scaled({"sam_rho": TINY_RHO, "sam_scope": scope}, model, max_steps=5)
    _, plain = scaled(None, plain_model, max_steps=5)
    assert not model.faults and not plain_model.faults

    assert seen.skipped == ([1] if is_skipped else [])
    assert seen.scales == ([8, 4, 4, 8, 8] if is_skipped else [8, 16, 16, 32, 32])
    assert seen.rates == plain.rates
    for update in range(5):
        assert_same(seen.weights[update], plain.weights[update])


class HalfPrecisionClassifier(Classifier):
    """Gradients pass through fp16, where what is above 65504 overflows, as under autocast."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)["logits"].half().float()
        return {"loss": cross_entropy(logits, labels), "logits": logits}


@all_methods_and_scopes
def test_a_scale_too_large_for_fp16_falls_as_without_sam_and_then_the_steps_are_perturbed(
    method: str, scope: str
) -> None:
    set_seed(0)
    model = HalfPrecisionClassifier()
    start, plain_model = weights(model), copy.deepcopy(model)
    sam = options(method, scope, sam_rho=0.3)
    never_grows = (2.0**22, 2.0, 0.5, 100)
    trainer, seen = scaled(sam, model, never_grows, max_steps=8)
    _, plain = scaled(None, plain_model, never_grows, max_steps=8)

    skipped = len(plain.skipped)
    assert 2 <= skipped <= 6
    assert seen.skipped == plain.skipped == list(range(skipped))
    assert seen.scales == plain.scales
    for update in range(skipped):
        assert_same(seen.weights[update], start)
    logs = trainer.state.log_history[:-1]
    assert [log["sam_perturbation_norm"] > 0 for log in logs] == [i >= skipped for i in range(8)]
    assert all(math.isfinite(v) for log in logs for k, v in log.items() if k.startswith("sam_"))


@all_scopes
def test_a_failed_descent_leaves_the_scaler_as_it_was(scope: str) -> None:
    number = forward_number("descent", scope, K - 1, update=1)
    trainer = watched({"sam_scope": scope}, {number: failure("backward")})
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", 8.0, growth_interval=2)
    failed(trainer)
    assert scaler.get_scale() == 8.0
    assert scaler._get_growth_tracker() == 1
    trainer.train()
    assert scaler.get_scale() == 16.0

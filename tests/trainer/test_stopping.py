"""Runs that are cut short: begun again with smaller batches, or stopped inside an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from combinations import PURE
from faulty import (
    TINY_RHO,
    Faulty,
    K,
    all_methods_and_scopes,
    all_scopes,
    assert_same,
    every_micro_batch,
    failure,
    forward_and_backward,
    forward_number,
    options,
)
from tiny import Spy, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed

from sam_hf import SAMTrainer

# ---- Out of memory: auto_find_batch_size -----------------------------------------------------


class Beginnings(TrainerCallback):
    """The weights and the batch size that each attempt starts with."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights: list[dict[str, Tensor]] = []
        self.batch_sizes: list[int] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights(self.trainer.model))
        self.batch_sizes.append(self.trainer._train_batch_size)


def out_of_memory_run(
    scope: str, failing_pass: str, where: str, index: int, update: int
) -> tuple[Any, Beginnings, Spy]:
    """A run that is out of memory once with 4 examples in a micro-batch, and goes on with 3."""
    set_seed(0)
    number = forward_number(failing_pass, scope, index, update)
    fault = failure(where, torch.OutOfMemoryError)
    spy = Spy()
    trainer = sam_trainer(
        Faulty({number: fault}, noise=0.0),
        examples(4 * K * 3),
        SAMTrainer,
        {"callbacks": [spy]},
        {"sam_rho": 0.3, "sam_scope": scope},
        gradient_accumulation_steps=K,
        optim="adamw_torch",
        auto_find_batch_size=True,
    )
    beginnings = Beginnings(trainer)
    trainer.add_callback(beginnings)
    trainer.train()
    assert not trainer.model.faults
    assert beginnings.batch_sizes == [4, 3]
    return trainer, beginnings, spy


@all_scopes
@forward_and_backward
@every_micro_batch
def test_out_of_memory_in_the_first_descent_equals_a_run_with_the_smaller_batch(
    scope: str, where: str, index: int
) -> None:
    trainer, beginnings, _ = out_of_memory_run(scope, "descent", where, index, update=0)
    assert_same(beginnings.weights[1], beginnings.weights[0])
    fresh = sam_trainer(
        Faulty(noise=0.0),
        examples(4 * K * 3),
        sam={"sam_rho": 0.3, "sam_scope": scope},
        gradient_accumulation_steps=K,
        optim="adamw_torch",
        per_device_train_batch_size=3,
    )
    fresh.model.load_state_dict(beginnings.weights[0])
    fresh.train()
    assert_same_bits(trainer.model, weights(fresh.model))


@all_scopes
@every_micro_batch
def test_out_of_memory_in_a_later_descent_is_retried_as_one_in_the_ascent_is(
    scope: str, index: int
) -> None:
    trainer, beginnings, spy = out_of_memory_run(scope, "descent", "backward", index, update=2)
    assert_same(beginnings.weights[1], spy.weights[1])
    other, *_ = out_of_memory_run(scope, "ascent", "forward", index, update=2)
    assert_same_bits(trainer.model, weights(other.model))


# ---- Stopped in the middle of an accumulation window -----------------------------------------


class StopAfter(TrainerCallback):
    """Sets a flag of the control after one micro-batch of one update, which is not its last."""

    def __init__(self, flag: str, update: int, index: int) -> None:
        self.flag, self.update, self.index = flag, update, index
        self.micro_batches = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.micro_batches = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step, self.micro_batches) == (self.update, self.index):
            setattr(control, self.flag, True)
            self.update = -1
        self.micro_batches += 1


def stopped(sam: dict[str, Any] | None, flag: str, index: int) -> tuple[Any, Spy]:
    set_seed(0)
    spy = Spy()
    trainer = sam_trainer(
        Faulty(noise=0.0),
        examples(4 * K * 2),
        Trainer if sam is None else SAMTrainer,
        {"callbacks": [spy, StopAfter(flag, update=1, index=index)]},
        sam,
        gradient_accumulation_steps=K,
    )
    trainer.train()
    return trainer, spy


not_the_last_micro_batch = pytest.mark.parametrize("index", range(K - 1))


@all_methods_and_scopes
@not_the_last_micro_batch
def test_stopping_in_the_middle_of_an_update_leaves_the_weights_of_the_last_one(
    method: str, scope: str, index: int
) -> None:
    sam = options(method, scope, sam_rho=0.3)
    trainer, spy = stopped(sam, "should_training_stop", index)
    assert trainer.state.global_step == len(spy.weights) == 1
    assert_same_bits(trainer.model, spy.weights[0])


@all_methods_and_scopes
@not_the_last_micro_batch
def test_training_again_after_stopping_in_the_middle_of_an_update_equals_a_fresh_run(
    method: str, scope: str, index: int
) -> None:
    sam = options(method, scope, sam_rho=0.3)
    trainer, spy = stopped(sam, "should_training_stop", index)
    fresh = sam_trainer(
        Faulty(noise=0.0), examples(4 * K * 2), sam=sam, gradient_accumulation_steps=K
    )
    fresh.model.load_state_dict(spy.weights[0])
    trainer.train()
    fresh.train()
    assert trainer.state.global_step == 3
    assert_same_bits(trainer.model, weights(fresh.model))


@all_methods_and_scopes
@not_the_last_micro_batch
def test_an_epoch_that_stops_in_the_middle_of_an_update_goes_on_as_in_a_plain_trainer(
    method: str, scope: str, index: int
) -> None:
    # The gradients of the cut update stay for the first update of the next epoch.
    sam = options(method, scope, PURE, sam_rho=TINY_RHO)
    trainer, spy = stopped(sam, "should_epoch_stop", index)
    plain, plain_spy = stopped(None, "should_epoch_stop", index)
    assert trainer.state.global_step == plain.state.global_step == 3
    for update in range(3):
        assert_same(spy.weights[update], plain_spy.weights[update])


@all_scopes
def test_early_stopping_after_two_updates_equals_a_run_of_two_updates(scope: str) -> None:
    def trained(callbacks: list[TrainerCallback], max_steps: int) -> Any:
        set_seed(0)
        trainer = sam_trainer(
            Faulty(),
            examples(4 * K * 3),
            SAMTrainer,
            {"eval_dataset": examples(8, seed=1), "callbacks": callbacks},
            {"sam_rho": 0.3, "sam_scope": scope},
            gradient_accumulation_steps=K,
            max_steps=max_steps,
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="loss",
        )
        trainer.train()
        return trainer

    never_good_enough = EarlyStoppingCallback(1, early_stopping_threshold=1e9)
    trainer = trained([never_good_enough], max_steps=3)
    assert trainer.state.global_step == 2
    assert_same_bits(trainer.model, weights(trained([], max_steps=2).model))

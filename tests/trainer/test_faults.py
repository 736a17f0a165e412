"""A pass that raises: w comes back, nothing of the failed pass stays, and training can go on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from combinations import has_one_pass_at_w_plus_e, methods_and_scopes
from faulty import (
    TINY_RHO,
    Faulty,
    K,
    all_methods_at_micro_batches,
    all_passes_at_micro_batches,
    all_scopes,
    assert_same,
    both_passes,
    every_micro_batch,
    failed,
    failure,
    forward_and_backward,
    forward_number,
    gradients_before,
    options,
    undisturbed,
    watched,
)
from tiny import Spy, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from sam_hf import SAMTrainer

# ---- What is left when the exception leaves the training step --------------------------------


@all_passes_at_micro_batches
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (RuntimeError, "backward"),
        (KeyboardInterrupt, "backward"),
        (torch.OutOfMemoryError, "forward"),
        (torch.OutOfMemoryError, "backward"),
    ],
)
def test_weights_are_those_of_the_last_update_bitwise_whatever_fails(
    method: str,
    scope: str,
    failing_pass: str,
    where: str,
    index: int,
    kind: type[BaseException],
) -> None:
    number = forward_number(failing_pass, scope, index, update=1, method=method)
    trainer = watched(options(method, scope), {number: failure(where, kind)})
    spy = Spy()
    trainer.add_callback(spy)
    left = failed(trainer, kind)
    assert_same(left.weights, {name: spy.weights[0][name] for name in left.weights})
    assert_same(left.weights, dict(trainer.model.named_parameters()))
    assert left.replaced_methods == []


@all_methods_at_micro_batches
@forward_and_backward
def test_a_failed_descent_leaves_all_but_the_gradients_as_the_ascent_left_it(
    method: str, scope: str, where: str, index: int
) -> None:
    number = forward_number("descent", scope, index)
    left = failed(watched(options(method, scope), {number: failure(where)}))
    # The ascent is the plain Trainer's training step: so is all that it leaves.
    expected = undisturbed(None)[K - 1 if scope == "batch" else index]
    assert left.counters == expected.counters
    assert_same(left.statistics, expected.statistics)
    assert left.generators == expected.generators
    assert left.replaced_methods == []


@forward_and_backward
@pytest.mark.parametrize(
    ("scope", "index"), [("batch", 0), ("batch", 1), ("batch", 2), ("micro_batch", 0)]
)
def test_a_failed_descent_with_masks_of_its_own_gives_back_the_random_numbers_it_drew(
    scope: str, index: int, where: str
) -> None:
    number = forward_number("descent", scope, index)
    sam = {"sam_scope": scope, "sam_replay_rng": False}
    left = failed(watched(sam, {number: failure(where)}))
    expected = undisturbed(None)[K - 1 if scope == "batch" else index]
    assert left.generators == expected.generators


@all_methods_at_micro_batches
@forward_and_backward
def test_a_failed_descent_leaves_the_gradients_of_earlier_micro_batches_and_no_part_of_its_own(
    method: str, scope: str, where: str, index: int
) -> None:
    number = forward_number("descent", scope, index)
    left = failed(watched(options(method, scope), {number: failure(where)}))
    # With one e for the update, no micro-batch has its g_s before the last one.
    assert_same(left.gradients, gradients_before(index * (scope != "batch"), method, scope))


@all_methods_at_micro_batches
@forward_and_backward
def test_a_failed_ascent_leaves_what_it_leaves_in_a_plain_trainer(
    method: str, scope: str, where: str, index: int
) -> None:
    number = forward_number("ascent", scope, index)
    left = failed(watched(options(method, scope), {number: failure(where)}))
    plain = failed(watched(None, {index: failure(where)}))
    assert left.counters == plain.counters
    assert left.generators == plain.generators
    assert left.replaced_methods == []
    assert_same(left.statistics, plain.statistics)
    assert_same(left.weights, plain.weights)
    if scope == "micro_batch":
        assert_same(left.gradients, gradients_before(index, method, scope))
    else:  # whole ones: the trainer overrides training_step, where others may need all gradients
        assert_same(left.gradients, plain.gradients)


@pytest.mark.parametrize(
    "method", [name for name, _ in methods_and_scopes(has_one_pass_at_w_plus_e)]
)
@forward_and_backward
@every_micro_batch
def test_a_failed_pass_at_w_plus_e_that_is_the_only_one_leaves_what_it_leaves_in_a_plain_trainer(
    method: str, where: str, index: int
) -> None:
    # In the second update, since e lies along the momentum of the first.
    fault = {K + index: failure(where)}
    left = failed(watched(options(method, "batch", sam_rho=TINY_RHO), dict(fault)))
    plain = failed(watched(None, fault))
    assert left.counters == plain.counters
    assert left.generators == plain.generators
    assert left.replaced_methods == []
    assert_same(left.statistics, plain.statistics)
    assert_same(left.weights, plain.weights)
    assert_same(left.gradients, plain.gradients)


# ---- Again ------------------------------------------------------------------------------------


@all_passes_at_micro_batches
@forward_and_backward
def test_training_again_after_a_failure_equals_a_fresh_run_from_the_same_weights(
    method: str, scope: str, failing_pass: str, where: str, index: int
) -> None:
    number = forward_number(failing_pass, scope, index, method=method)
    sam = options(method, scope)
    trainer = watched(sam, {number: failure(where)})
    failed(trainer)
    fresh = watched(sam, model=copy.deepcopy(trainer.model))
    for each in (trainer, fresh):
        set_seed(1)
        each.train()
    assert_same_bits(trainer.model, weights(fresh.model))
    assert trainer.state.log_history[0] == fresh.state.log_history[0]


# ---- In spite of it ---------------------------------------------------------------------------


@all_scopes
@both_passes
def test_options_that_change_after_a_failure_hold_in_the_next_run(
    scope: str, failing_pass: str
) -> None:
    number = forward_number(failing_pass, scope, K - 1)
    trainer = watched({"sam_method": "sam", "sam_scope": scope}, {number: failure("forward")})
    failed(trainer)
    trainer.sam_config.sam_method = "asam"
    fresh = watched({"sam_method": "asam", "sam_scope": scope}, model=copy.deepcopy(trainer.model))
    for each in (trainer, fresh):
        set_seed(1)
        each.train()
    assert_same_bits(trainer.model, weights(fresh.model))


class _Swallowing:
    """Goes on after a failed micro-batch, as a notebook does after Ctrl-C.

    With `drops_gradients` it clears them first, as recipes against running out of memory do.
    """

    drops_gradients = False

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(model, *args, **kwargs)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            if self.drops_gradients:
                model.zero_grad()
            return torch.zeros(())


class SwallowingTrainer(_Swallowing, Trainer): ...


class SwallowingSAMTrainer(_Swallowing, SAMTrainer): ...


def swallowing(
    sam: dict[str, Any] | None, number: int | None, drops_gradients: bool, skip: int = 0
) -> tuple[Any, Spy]:
    """A trainer for three updates, less those skipped; the model has neither noise nor norms."""
    set_seed(0)
    rows = examples(4 * K * 3)
    rows.rows = rows.rows[4 * K * skip :]
    spy = Spy()
    fault = failure("forward", torch.OutOfMemoryError if drops_gradients else KeyboardInterrupt)
    trainer = sam_trainer(
        Faulty({} if number is None else {number: fault}, noise=0.0),
        rows,
        SwallowingTrainer if sam is None else SwallowingSAMTrainer,
        {"callbacks": [spy]},
        sam,
        gradient_accumulation_steps=K,
        max_steps=3 - skip,
    )
    trainer.drops_gradients = drops_gradients
    return trainer, spy


every_recipe = pytest.mark.parametrize(
    "drops_gradients", [False, True], ids=["keep_grad", "zero_grad"]
)


@all_scopes
@both_passes
@every_micro_batch
@every_recipe
def test_the_update_after_a_swallowed_failure_equals_that_of_a_fresh_run(
    scope: str, failing_pass: str, index: int, drops_gradients: bool
) -> None:
    sam = {"sam_rho": 0.3, "sam_scope": scope}
    number = forward_number(failing_pass, scope, index, update=1)
    trainer, spy = swallowing(sam, number, drops_gradients)
    trainer.train()
    assert not trainer.model.faults
    fresh, _ = swallowing(sam, None, drops_gradients, skip=2)
    fresh.model.load_state_dict(spy.weights[1])
    fresh.train()
    assert_same_bits(trainer.model, weights(fresh.model))


@all_scopes
@both_passes
@every_micro_batch
@every_recipe
def test_the_update_of_a_swallowed_failure_is_made_of_the_other_micro_batches(
    scope: str, failing_pass: str, index: int, drops_gradients: bool
) -> None:
    sam = {"sam_rho": TINY_RHO, "sam_scope": scope}
    number = forward_number(failing_pass, scope, index, update=1)
    trainer, spy = swallowing(sam, number, drops_gradients)
    trainer.train()
    # One descent for all micro-batches leaves nothing to step with when it fails.
    nothing_left = failing_pass == "descent" and scope == "batch"
    plain, plain_spy = (
        swallowing(None, K + K - 1, True)
        if nothing_left
        else swallowing(None, K + index, drops_gradients)
    )
    plain.train()
    assert not trainer.model.faults and not plain.model.faults
    for update in range(3):
        assert_same(spy.weights[update], plain_spy.weights[update])


class Eye(TrainerCallback):
    """Looks whether the weights are still those of the update's beginning."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.looks = 0

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.weights = weights(model)

    def on_substep_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        assert_same_bits(model, self.weights)
        self.looks += 1

    on_pre_optimizer_step = on_substep_end


@all_scopes
@pytest.mark.parametrize("failing_pass", ["ascent", "descent", "neither"])
@every_micro_batch
def test_no_callback_sees_other_weights_than_w(scope: str, failing_pass: str, index: int) -> None:
    sam = {"sam_rho": 0.3, "sam_scope": scope}
    number = forward_number(failing_pass, scope, index, update=1)
    trainer, _ = swallowing(sam, None if failing_pass == "neither" else number, False)
    eye = Eye()
    trainer.add_callback(eye)
    trainer.train()
    assert eye.looks == 3 * K

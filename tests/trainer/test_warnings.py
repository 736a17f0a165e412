"""Runs that do not do what their options ask for are told, once; and draws that follow the seed."""

from __future__ import annotations

import re
import statistics
import warnings
from typing import Any

import pytest
import torch
from mlp import MLP, build, trained
from tiny import Classifier, examples
from torch import Tensor
from transformers import TrainerCallback

from sam_hf import SAMTrainer


def warned(trainer: Any) -> list[str]:
    """What training warns of, about options of SAM."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "sam_" in str(w.message)]


# ---- Not one update was perturbed ----------------------------------------------------------------


class StopsAfter(TrainerCallback):
    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.updates


def stopped(sam: dict[str, Any], updates: int, max_steps: int = 10) -> Any:
    callbacks = {"callbacks": [StopsAfter(updates)]}
    data = examples(4 * max_steps)
    return build(SAMTrainer, data=data, sam=sam, max_steps=max_steps, trainer_kwargs=callbacks)


@pytest.mark.parametrize("method", ["sam", "asam", "gsam"])
@pytest.mark.parametrize("updates", [1, 5])
def test_a_run_that_ends_before_sam_start_ratio_warns_once_that_no_update_was_perturbed(
    method, updates
):
    found = warned(stopped({"sam_method": method, "sam_start_ratio": 0.5}, updates))
    assert len(found) == 1 and "sam_start_ratio=0.5" in found[0]


def test_a_run_whose_interval_leaves_no_update_after_sam_start_ratio_warns():
    # Updates 0, 8, ... of 6, from the third on: none.
    sam = {"sam_start_ratio": 0.5, "sam_interval": 8}
    found = warned(stopped(sam, 6, max_steps=6))
    assert len(found) == 1 and "sam_start_ratio=0.5" in found[0] and "sam_interval=8" in found[0]


@pytest.mark.parametrize(
    ("sam", "updates"),
    [
        ({}, 1),
        ({"sam_start_ratio": 0.5}, 6),
        ({"sam_start_ratio": 0.5}, 10),
        ({"sam_interval": 5}, 1),
        ({"sam_rho": 0.0, "sam_start_ratio": 0.5}, 2),
    ],
)
def test_a_run_with_a_perturbed_update_and_one_at_rho_0_do_not_warn(sam, updates):
    assert warned(stopped(sam, updates)) == []


def test_a_run_resumed_after_sam_start_ratio_does_not_warn(tmp_path):
    options = {
        "sam": {"sam_start_ratio": 0.5},
        "data": examples(40),
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 3,
        "output_dir": str(tmp_path),
    }
    stop = {"callbacks": [StopsAfter(3)]}
    assert len(warned(build(SAMTrainer, trainer_kwargs=stop, **options))) == 1
    resumed = build(SAMTrainer, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [w for w in caught if "sam_start_ratio" in str(w.message)] == []


# ---- rho is far too large ------------------------------------------------------------------------


def cosines(trainer: Any) -> list[float]:
    return [e["sam_grad_cosine"] for e in trainer.state.log_history if "sam_grad_cosine" in e]


def long_run(model: Any = MLP, **kwargs: Any) -> Any:
    return build(SAMTrainer, model, data=examples(160), max_steps=40, **kwargs)


@pytest.mark.parametrize("model", [MLP, Classifier])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_rho_that_turns_the_gradient_warns_once_with_the_reading_and_the_option(
    model, scope, logging_steps
):
    sam = {"sam_rho": 100.0, "sam_scope": scope}
    trainer = long_run(model, sam=sam, logging_steps=logging_steps)
    found = warned(trainer)
    assert statistics.median(cosines(trainer)) < 0.2
    assert len(found) == 1
    assert "sam_rho" in found[0] and "100" in found[0]
    cosine = re.search(r"sam_grad_cosine (?:was )?(-?[\d.e-]+)", found[0])
    assert cosine is not None and float(cosine[1]) < 0.5


@pytest.mark.parametrize("model", [MLP, Classifier])
@pytest.mark.parametrize("rho", [0.1, 0.2])
def test_a_usual_rho_does_not_warn(model, rho):
    trainer = long_run(model, sam={"sam_rho": rho})
    assert warned(trainer) == []
    assert min(cosines(trainer)) > 0.8


# ---- Draws follow the seed -----------------------------------------------------------------------


class Looks(MLP):
    """Notes the examples of the passes over a part of the micro-batch."""

    def __init__(self, drawn: list[Tensor]) -> None:
        super().__init__()
        self.note = drawn.append

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if len(x) < 4:
            self.note(x.clone())
        return super().forward(x, labels)


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_draws_of_sam_ascent_fraction_follow_the_seed_of_the_arguments(accumulation, scope):
    def draws(seed: int) -> list[Tensor]:
        drawn: list[Tensor] = []
        sam = {"sam_rho": 0.05, "sam_ascent_fraction": 0.5, "sam_scope": scope}
        # The data are read in their order, and the weights do not depend on the seed.
        trained(SAMTrainer, lambda: Looks(drawn), accumulation, sam=sam, seed=seed, max_steps=6)
        assert len(drawn) == 6 * accumulation and {len(x) for x in drawn} == {2}
        return drawn

    first, again, other = draws(1), draws(1), draws(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))

"""The recorded calls of an update, and the inputs that the second pass gets."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from tiny import Classifier, examples, sam_trainer
from torch import Tensor, nn
from transformers import BatchEncoding

from sam_hf import SAMTrainer
from sam_hf.engine.recorder import CallRecorder, InputKeeper, RecordedCall

Pair = namedtuple("Pair", "a b")


def address(x: Tensor) -> int:
    return x.data_ptr()


# ---- The inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict, BatchEncoding, OrderedDict])
def test_kept_inputs_are_out_of_reach_of_the_callee(make):
    keeper = InputKeeper()
    for _ in range(3):
        inputs = make({"x": torch.ones(2), "labels": torch.zeros(2)})
        inputs["nested"] = {"list": [torch.ones(1)], "pair": Pair(torch.ones(1), "text")}
        inputs["both"] = (torch.ones(1), 3)
        kept = keeper.keep(inputs)
        inputs.pop("labels")
        inputs["x"].mul_(7)
        inputs["nested"]["list"][0].zero_()
        inputs["nested"]["list"].append(3)
        inputs["nested"]["pair"].a.zero_()
        inputs["both"][0].zero_()
        keeper.observe(kept)
        value = kept.value
        assert type(value) is make
        assert torch.equal(value["x"], torch.ones(2))
        assert torch.equal(value["labels"], torch.zeros(2))
        assert value["nested"]["list"] == [torch.ones(1)]
        assert value["nested"]["pair"] == Pair(torch.ones(1), "text")
        assert type(value["nested"]["pair"]) is Pair
        assert value["both"] == (torch.ones(1), 3)


def test_modules_and_other_objects_are_shared_and_not_copied():
    model, text = nn.Linear(2, 2), object()
    kept = InputKeeper().keep((model, text))
    assert kept.value == (model, text)


def test_a_leaf_that_requires_a_gradient_stays_a_leaf_of_its_own():
    keeper, leaf = InputKeeper(), torch.ones(2, requires_grad=True)
    for _ in range(2):
        kept = keeper.keep([leaf])
        keeper.observe(kept)
        (value,) = kept.value
        assert value.requires_grad and value.is_leaf
        assert value is not leaf  # its gradient would be that of two passes


def test_an_input_that_was_computed_with_gradients_is_refused_in_one_line():
    computed = torch.ones(2, 3, requires_grad=True) * 2
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\).*sam_rho=0") as e:
        InputKeeper().keep({"x": computed})
    assert "\n" not in str(e.value)


def batch(size: int = 100_000) -> dict[str, Any]:
    return {"x": torch.ones(size), "written": torch.ones(size), "nested": [torch.ones(size)]}


def test_tensors_are_shared_after_the_first_call_and_those_that_are_written_are_copied():
    keeper = InputKeeper()
    for number in range(3):
        inputs = batch()
        kept = keeper.keep(inputs)
        is_shared = [
            address(kept.value[name]) == address(inputs[name]) for name in ("x", "written")
        ]
        is_shared.append(address(kept.value["nested"][0]) == address(inputs["nested"][0]))
        # Which of them is written is known after the first call.
        assert is_shared == ([False] * 3 if number == 0 else [True, False, True])
        inputs["written"].zero_()
        keeper.observe(kept)
        assert address(kept.value["x"]) == address(inputs["x"])
        assert address(kept.value["nested"][0]) == address(inputs["nested"][0])
        assert torch.equal(kept.value["written"], torch.ones(100_000))


def test_no_input_is_held_twice_after_the_first_call():
    keeper, inputs = InputKeeper(), batch()
    kept = keeper.keep(inputs)
    copies = [weakref.ref(x) for x in (kept.value["x"], kept.value["nested"][0])]
    written = weakref.ref(kept.value["written"])
    inputs["written"].zero_()
    keeper.observe(kept)
    assert [ref() for ref in copies] == [None, None] and written() is kept.value["written"]


def test_a_view_that_is_written_counts_as_its_base():
    keeper = InputKeeper()
    for _ in range(2):
        inputs = {"x": torch.ones(4)}
        kept = keeper.keep(inputs)
        inputs["x"].view(2, 2)[0].zero_()
        keeper.observe(kept)
        assert torch.equal(kept.value["x"], torch.ones(4))


def test_an_input_that_is_written_late_is_named_once_and_copied_from_then_on():
    keeper = InputKeeper()
    for number in range(4):
        inputs = {"inputs": {"x": torch.ones(2)}}
        kept = keeper.keep(inputs)
        if number:
            inputs["inputs"]["x"].zero_()
        if number == 1:
            with pytest.warns(UserWarning, match=r"'inputs\.x' in place, for the first time"):
                keeper.observe(kept)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                keeper.observe(kept)
            assert torch.equal(kept.value["inputs"]["x"], torch.ones(2))


def test_inputs_of_inference_mode_are_copied_as_nobody_counts_what_is_written_into_them():
    keeper = InputKeeper()
    for _ in range(2):
        with torch.inference_mode():
            inputs = {"x": torch.ones(2)}
        kept = keeper.keep(inputs)
        with torch.inference_mode():
            inputs["x"].zero_()
        keeper.observe(kept)
        assert torch.equal(kept.value["x"], torch.ones(2))


# ---- The calls ----------------------------------------------------------------------------------


def test_a_recorder_gives_its_calls_once_in_their_order():
    recorder, calls = CallRecorder(), [RecordedCall(lambda: torch.ones(())) for _ in range(3)]
    recorder.calls += calls
    assert len(recorder) == 3
    assert recorder.take() == calls
    assert len(recorder) == 0 and recorder.take() == []


class Seen:
    """What `compute_loss` was given and what it found, in each pass."""

    def __init__(self) -> None:
        self.passes: list[tuple[bool, Any]] = []

    def add(self, trainer: Any, value: Any) -> None:
        self.passes.append((trainer.is_in_descent_pass, copy.deepcopy(value)))

    def of(self, is_descent: bool) -> list[Any]:
        return [value for descent, value in self.passes if descent is is_descent]


def run(compute_loss: Any, steps: int = 2, updates: int = 2, **sam: Any) -> tuple[Any, Seen]:
    seen = Seen()

    class Records(SAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return compute_loss(self, seen, super().compute_loss, model, inputs, args, kwargs)

    trainer = sam_trainer(
        Classifier(),
        examples(4 * steps * updates),
        Records,
        sam=sam,
        gradient_accumulation_steps=steps,
        max_steps=updates,
    )
    trainer.coefficient, trainer.names = 1.0, ["a"]
    trainer.tensor = torch.ones(())
    trainer.large = torch.zeros(100_000)
    trainer.train()
    return trainer, seen


both_scopes = pytest.mark.parametrize("sam_scope", ["batch", "micro_batch"])


@both_scopes
def test_a_call_finds_the_attributes_of_its_first_pass_and_its_count_of_items(sam_scope):
    def compute_loss(trainer, seen, above, model, inputs, args, kwargs):
        count = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        seen.add(trainer, (trainer.coefficient, trainer.names, inputs["x"], count))
        trainer.coefficient *= 0.75
        trainer.names = [*trainer.names, "b"]
        return above(model, inputs, *args, **kwargs)

    trainer, seen = run(compute_loss, sam_scope=sam_scope)
    assert len(seen.of(True)) == 4
    assert repr(seen.of(True)) == repr(seen.of(False))
    assert trainer.coefficient == 0.75**4 and trainer.names == ["a"] + ["b"] * 4


@both_scopes
def test_tensors_of_any_size_that_a_call_changes_in_place_are_found_as_in_its_first_pass(
    sam_scope,
):
    def compute_loss(trainer, seen, above, model, inputs, args, kwargs):
        seen.add(trainer, (trainer.tensor, trainer.large.sum()))
        trainer.tensor.mul_(2)
        trainer.large.add_(1)
        return above(model, inputs, *args, **kwargs)

    trainer, seen = run(compute_loss, sam_scope=sam_scope)
    assert seen.of(True) == seen.of(False)
    assert [float(tensor) for tensor, _ in seen.of(True)] == [1.0, 2.0, 4.0, 8.0]
    assert trainer.tensor == 16 and torch.equal(trainer.large, torch.full((100_000,), 4.0))


def test_a_call_without_gradients_is_not_recorded():
    class Evaluates(SAMTrainer):
        seen = Seen()

        def compute_loss(self, model, inputs, *args, **kwargs):
            if torch.is_grad_enabled():
                with torch.no_grad():
                    self.compute_loss(model, dict(inputs), *args, **kwargs)
            self.seen.add(self, torch.is_grad_enabled())
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = sam_trainer(Classifier(), examples(8), Evaluates, max_steps=2)
    trainer.train()
    # In each pass both, as they are written: the measurement is a part of the call.
    assert Evaluates.seen.of(False) == Evaluates.seen.of(True) == [False, True] * 2


@pytest.mark.parametrize("failing", [1, 2])
def test_the_calls_of_a_micro_batch_that_failed_are_forgotten_and_earlier_ones_kept(failing):
    """A trainer that skips a micro-batch which fails trains on the others."""
    rows, descents = examples(12), []

    class Skips(SAMTrainer):
        number = 0

        def training_step(self, *args, **kwargs):
            try:
                return super().training_step(*args, **kwargs)
            except ZeroDivisionError:
                return torch.zeros((), dtype=torch.float64)

        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.is_in_descent_pass:
                descents.append(inputs["x"])
            else:
                self.number += 1
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.number == failing and not self.is_in_descent_pass:
                raise ZeroDivisionError
            return loss

    trainer = sam_trainer(
        Classifier(), rows, Skips, gradient_accumulation_steps=3, max_steps=1, sam={"sam_rho": 0.3}
    )
    trainer.train()
    xs = [torch.stack([r["x"] for r in rows.rows[i : i + 4]]) for i in (0, 4, 8)]
    expected = [x for i, x in enumerate(xs, 1) if i != failing]
    assert all(torch.equal(a, b) for a, b in zip(descents, expected, strict=True))


def test_a_recorded_call_is_freed_as_soon_as_it_was_replayed():
    alive: list[list[bool]] = []

    class Watches(SAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.is_in_descent_pass:
                alive.append([ref() is not None for ref in held])
            else:
                held.append(weakref.ref(inputs["x"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            # The loop of the Trainer holds the batches of an update: this one forgets them.
            inputs = {name: x.clone() for name, x in inputs.items()}
            return super().training_step(model, inputs, *args, **kwargs)

    held: list[Any] = []
    trainer = sam_trainer(
        Classifier(), examples(12), Watches, gradient_accumulation_steps=3, max_steps=1
    )
    trainer.train()
    assert alive[1][0] is False and alive[2][:2] == [False, False]

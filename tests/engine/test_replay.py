"""What both passes share, and what the second one must leave as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from sam_hf.replay import BufferGuard, RandomState, Tape, clone_inputs


class Owner:
    """Stands for the trainer whose calls are recorded."""


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()


def test_the_random_state_of_torch_python_and_numpy_comes_back():
    state = RandomState([])
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first


def test_recorded_inputs_are_out_of_reach_of_the_callee():
    pair = namedtuple("pair", "a b")
    for make in (dict, BatchEncoding, OrderedDict):
        inputs = make({"x": torch.ones(2), "labels": torch.zeros(2)})
        inputs["nested"] = {"list": [torch.ones(1)], "pair": pair(torch.ones(1), "text")}

        def callee(inputs):
            inputs.pop("labels")
            inputs["x"].mul_(7)
            inputs["nested"]["list"][0].zero_()
            inputs["nested"]["list"].append(3)
            inputs["nested"]["pair"].a.zero_()
            return torch.ones(())

        tape = Tape([])
        with tape.recording(Owner(), callee, None) as recorder:
            recorder(inputs)
        (call,) = tape.take()
        kept = call.args[0]
        assert type(kept) is make
        assert torch.equal(kept["x"], torch.ones(2)) and torch.equal(kept["labels"], torch.zeros(2))
        assert kept["nested"]["list"] == [torch.ones(1)]
        assert kept["nested"]["pair"] == pair(torch.ones(1), "text")
        assert len(tape) == 0


def test_modules_and_other_objects_are_shared_and_not_copied():
    model, text = nn.Linear(2, 2), object()
    assert clone_inputs((model, text)) == (model, text)
    leaf = torch.ones(2, requires_grad=True)
    assert clone_inputs(leaf).requires_grad and clone_inputs(leaf).is_leaf


def test_a_call_keeps_the_plain_attributes_that_it_found():
    tape, owner = Tape([]), Owner()
    with tape.recording(owner, torch.tensor, 7) as recorder:
        owner.coefficient, owner.names = 0.5, ["a"]
        recorder(1)
        owner.coefficient = 0.75
        recorder(2)
    calls = tape.take()
    assert [call.attributes for call in calls] == [{"coefficient": 0.5}, {"coefficient": 0.75}]
    assert [call.num_items_in_batch for call in calls] == [7, 7]


def test_a_tensor_that_a_call_changes_in_place_is_kept_as_it_was():
    tape, owner = Tape([]), Owner()

    def call(x):
        owner.coefficient.mul_(2)
        return torch.tensor(x)

    with tape.recording(owner, call, None) as recorder:
        owner.coefficient = torch.ones(())
        recorder(1.0)
        recorder(2.0)
    assert [float(call.attributes["coefficient"]) for call in tape.take()] == [1.0, 2.0]
    assert owner.coefficient == 4


def test_a_call_without_gradients_is_not_recorded():
    tape = Tape([])
    with tape.recording(Owner(), torch.tensor, None) as recorder:
        with torch.no_grad():
            recorder(1)
        recorder(2)
    assert [call.args for call in tape.take()] == [(2,)]


def test_the_calls_of_a_failed_block_are_forgotten_and_earlier_ones_kept():
    tape = Tape([])
    with tape.recording(Owner(), torch.tensor, None) as recorder:
        recorder(1)
    with (
        pytest.raises(KeyboardInterrupt),
        tape.recording(Owner(), torch.tensor, None) as recorder,
    ):
        recorder(2)
        raise KeyboardInterrupt
    assert [call.args for call in tape.take()] == [(1,)]


class Counts(nn.Module):
    """Replaces one buffer and writes another in place, as codebooks and counters do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.replaced = self.replaced + x.sum()
        self.written += 1
        return x


class Normalises(nn.Module):
    """Batch norm by its function: no counter tells of what its kernel wrote."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)


@pytest.mark.parametrize(
    "layer",
    [
        Normalises(),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, momentum=None),
        nn.BatchNorm1d(3, affine=False),
        nn.InstanceNorm1d(3, track_running_stats=True),
        Counts(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_buffers_written_in_a_forward_pass_are_written_once(layer):
    model = nn.Sequential(nn.Identity(), layer)
    guard, x = BufferGuard(model), torch.randn(4, 3, 5)
    for _ in range(2):  # the second update finds a known writer
        guard.watch()
        model(x)
        once = {name: b.clone() for name, b in model.named_buffers()}
        objects = dict(model.named_buffers())
        with guard.preserved():
            model(x * 10 + 3)
            assert any(not torch.equal(b, once[name]) for name, b in model.named_buffers())
        for name, b in model.named_buffers():
            assert torch.equal(b, once[name]) and b is objects[name]


@pytest.mark.parametrize("how", ["in place", "data"])
def test_frozen_weights_that_a_forward_pass_writes_are_written_once(how):
    model = nn.ModuleDict({"teacher": nn.Linear(2, 2), "student": nn.Linear(2, 2)})
    model["teacher"].requires_grad_(False)

    def forward():
        for slow, fast in zip(*(m.parameters() for m in model.values()), strict=True):
            with torch.no_grad():
                if how == "data":
                    slow.data = slow.data.lerp(fast.data, 0.5)
                else:
                    slow.lerp_(fast, 0.5)

    guard = BufferGuard(model)
    for _ in range(2):  # the second update finds a known writer
        guard.watch()
        forward()
        once = [p.clone() for p in model["teacher"].parameters()]
        with guard.preserved():
            forward()
            assert not torch.equal(model["teacher"].weight, once[0])
        for p, value in zip(model["teacher"].parameters(), once, strict=True):
            assert torch.equal(p, value)


def test_buffers_that_nobody_writes_are_not_copied():
    model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 3))
    model[1].register_buffer("large", torch.zeros(10))
    guard = BufferGuard(model)
    guard.watch()
    model(torch.randn(2, 3))
    model[1].large.clone = None  # a copy would call it
    with guard.preserved():
        pass

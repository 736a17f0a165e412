"""What both passes share, and what the second one must leave as it was."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from sam_hf.replay import BufferGuard, RandomState, SideEffects, Tape, clone_inputs


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
        with tape.recording(callee, {}) as recorder:
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


def test_a_call_without_gradients_is_not_recorded():
    tape = Tape([])
    with tape.recording(torch.tensor, {}) as recorder:
        with torch.no_grad():
            recorder(1)
        recorder(2)
    assert [call.args for call in tape.take()] == [(2,)]


def test_the_calls_of_a_failed_block_are_forgotten_and_earlier_ones_kept():
    tape = Tape([])
    with tape.recording(torch.tensor, {}) as recorder:
        recorder(1)
    with (
        pytest.raises(KeyboardInterrupt),
        tape.recording(torch.tensor, {}) as recorder,
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


@pytest.mark.parametrize(
    "layer",
    [
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


def test_buffers_that_nobody_writes_are_not_copied():
    model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 3))
    model[1].register_buffer("large", torch.zeros(10))
    guard = BufferGuard(model)
    guard.watch()
    model(torch.randn(2, 3))
    model[1].large.clone = None  # a copy would call it
    with guard.preserved():
        pass


class Owner:
    def __init__(self):
        self.count, self.name = 1, "a"
        self.metrics = {"train": defaultdict(list, {"loss": [1.0]}), "eval": {}}
        self.recent, self.seen = deque([1, 2], maxlen=2), {1}
        self.votes, self.total = Counter(a=1), torch.tensor(1.0)
        self.data = [1, 2]
        self.output = SequenceClassifierOutput(logits=torch.ones(1))
        self.both = ([1], {"k": 1})


def test_attributes_counters_metric_lists_and_small_tensors_come_back():
    owner, other = Owner(), Owner()
    objects = dict(vars(owner))
    effects = SideEffects(owner, other, skip=["data"])
    owner.count += 1
    owner.name = "b"
    owner.new = 3
    del owner.votes["a"]
    owner.metrics["train"]["loss"].append(2.0)
    owner.metrics["train"]["accuracy"].append(0.5)
    owner.metrics["eval"] = {"x": 1}
    owner.recent.append(3)
    owner.seen.add(2)
    owner.votes["b"] += 1
    owner.total += 5
    owner.both[0].append(2)
    owner.both[1]["k"] = 2
    owner.data.append(3)
    other.count = 9
    effects.restore()
    fresh = Owner()
    for name in ("count", "name", "metrics", "recent", "seen", "votes", "both"):
        assert getattr(owner, name) == getattr(fresh, name), name
        assert getattr(owner, name) is objects[name], name
    assert owner.total == 1.0 and owner.total is objects["total"]
    assert not hasattr(owner, "new") and other.count == 1
    assert owner.data == [1, 2, 3]  # data, not state
    assert owner.metrics["train"].default_factory is list


def test_containers_that_hold_themselves_do_not_hang():
    owner = Owner()
    owner.metrics["self"] = owner.metrics
    effects = SideEffects(owner)
    owner.metrics["train"]["loss"].append(2.0)
    effects.restore()
    assert owner.metrics["train"]["loss"] == [1.0]

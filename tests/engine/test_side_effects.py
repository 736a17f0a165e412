"""What the second pass does to the attributes of a trainer is undone."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from sam_hf.side_effects import SideEffects


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


class Average:
    """The meter of many training scripts."""

    def __init__(self):
        self.sum, self.count, self.history = 0.0, 0, []

    def __call__(self, value):
        self.sum += value
        self.count += 1
        self.history.append(value)


class Accuracy(nn.Module):
    """A metric as torchmetrics builds them: a module without parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("correct", torch.zeros(()))
        self.total = torch.zeros(())
        self.scale = torch.add

    def update(self):
        self.correct += 1
        self.total = self.total + 1


class Holder:
    def __init__(self, value):
        self.value = {"inside": [value]}


class Owns:
    def __init__(self):
        self.count, self.model = 1, nn.Linear(2, 2)


ADAM = torch.optim.Adam(nn.Linear(2, 2).parameters())


class Confusion:
    """A metric that counts in arrays, and knows where it will be written."""

    def __init__(self):
        self.matrix, self.path, self.device = np.zeros((2, 2)), Path("."), torch.device("cpu")
        self.history = [self]  # and holds itself

    def update(self):
        self.matrix += 1


@pytest.mark.parametrize(
    "meter", [Average(), Accuracy(), Confusion()], ids=lambda m: type(m).__name__
)
def test_a_meter_counts_once(meter):
    count = meter.update if hasattr(meter, "update") else lambda: meter(2.0)
    count()
    before = {k: repr(v) for k, v in (vars(meter) | dict(getattr(meter, "_buffers", {}))).items()}
    effects = SideEffects(Holder(meter))
    count()
    meter.new = 1
    effects.restore()
    after = {k: repr(v) for k, v in (vars(meter) | dict(getattr(meter, "_buffers", {}))).items()}
    assert after == before


@pytest.mark.parametrize(
    "thing",
    [nn.Linear(2, 2), TrainingArguments("."), Owns(), Average, torch, open, ADAM],
    ids=lambda thing: getattr(thing, "__name__", type(thing).__name__),
)
def test_models_arguments_and_classes_are_not_entered(thing):
    effects = SideEffects(Holder(thing))
    if hasattr(thing, "__dict__"):
        thing.left_alone = 1
        effects.restore()
        assert thing.left_alone == 1
        del thing.left_alone


def test_small_arrays_and_tensors_of_any_kind_come_back():
    owner = Owner()
    with torch.inference_mode():
        owner.metric = torch.zeros(2)
    owner.array, owner.resized = np.arange(3), torch.ones(2)
    objects = dict(vars(owner))
    effects = SideEffects(owner)
    owner.array += 1
    owner.resized.resize_(3)
    with torch.inference_mode():
        owner.metric += 1
    effects.restore()
    assert owner.array.tolist() == [0, 1, 2]
    assert torch.equal(owner.resized, torch.ones(2)) and torch.equal(owner.metric, torch.zeros(2))
    assert all(getattr(owner, name) is objects[name] for name in ("array", "resized", "metric"))


def test_of_a_very_long_list_no_copy_is_made_and_what_was_appended_goes():
    owner, length = Owner(), 70_000
    owner.data = list(range(length))
    effects = SideEffects(owner)
    owner.data.append(1)
    effects.restore()
    assert len(owner.data) == length
    assert not any(kept is not owner.data and len(kept) == length for kept in lists_in(effects))


def lists_in(effects):
    return [kept for _, kept in effects._contents if isinstance(kept, list)]


def test_a_container_that_another_thread_writes_is_left_to_it(monkeypatch):
    owner = Owner()
    owner.queue = deque([1])

    def copied(value):
        if value is owner.queue:
            raise RuntimeError("deque mutated during iteration")
        return value.copy()

    monkeypatch.setattr("sam_hf.side_effects.copy.copy", copied)
    effects = SideEffects(owner)
    owner.queue.append(2)
    owner.metrics["eval"]["x"] = 1
    effects.restore()
    assert list(owner.queue) == [1, 2] and owner.metrics["eval"] == {}


def test_a_container_that_nothing_was_done_to_is_not_written():
    class Row(list):
        pass

    owner = Owner()
    owner.data = [object() for _ in range(3)]
    version = iter(owner.data)
    next(version)
    SideEffects(owner).restore()
    assert next(version) is owner.data[1]  # a list that was refilled would end here

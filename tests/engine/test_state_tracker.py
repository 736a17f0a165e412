"""What a training pass does to attributes, containers and buffers, is done once and not twice."""

from __future__ import annotations

import gc
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from sam_hf.engine import state as state_module
from sam_hf.engine.state import StateTracker, always_restore, patched


class Owner:
    def __init__(self):
        self.count, self.name = 1, "a"
        self.metrics = {"train": defaultdict(list, {"loss": [1.0]}), "eval": {}}
        self.recent, self.seen = deque([1, 2], maxlen=2), {1}
        self.votes, self.total = Counter(a=1), torch.tensor(1.0)
        self.order = OrderedDict(a=1, b=2)
        self.data = [1, 2]
        self.output = SequenceClassifierOutput(logits=torch.ones(1))
        self.both = ([1], {"k": 1})


class Bag:
    """Holds what it is given."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def both_passes(tracker, write, check):
    """What the engine does in an update: a recorded pass, and one whose writes are undone.

    Args:
        write: called in each pass.
        check: called after the first pass and after the second; it must return the same.
    """
    before = tracker.capture()
    write()
    tracker.observe(before)
    once = check()
    after = tracker.capture(since=before)
    before.restore()  # the replay finds what the first pass found
    write()
    again = check()
    after.restore()
    assert check() == once
    return once, again


def repeated(tracker, write):
    """The same, without a second pass where it would not find what the first one found."""
    before = tracker.capture()
    write()
    if tracker.observe(before):
        after = tracker.capture(since=before)
        before.restore()
        write()
        after.restore()


# ---- Attributes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False])
def test_attributes_counters_metric_lists_and_tensors_come_back_as_the_same_objects(is_first):
    owner, other = Owner(), Owner()
    tracker = StateTracker([owner, other], skip=["data"])
    if not is_first:  # a pass that writes nothing: later ones are found all the same
        tracker.observe(tracker.capture())
    objects = dict(vars(owner))
    before = tracker.capture()
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
    owner.order.move_to_end("a")
    owner.order["c"] = 3
    if is_first:
        owner.total += 5
    owner.both[0].append(2)
    owner.both[1]["k"] = 2
    owner.data.append(3)
    other.count = 9
    before.restore()
    fresh = Owner()
    for name in ("count", "name", "metrics", "recent", "seen", "votes", "order", "both"):
        assert getattr(owner, name) == getattr(fresh, name), name
        assert getattr(owner, name) is objects[name], name
    assert owner.recent.maxlen == 2 and list(owner.order) == ["a", "b"]
    assert owner.total == 1.0 and owner.total is objects["total"]
    assert not hasattr(owner, "new") and other.count == 1
    assert owner.data == [1, 2, 3]  # data, not state
    assert owner.metrics["train"].default_factory is list


def test_a_deleted_attribute_and_a_skipped_one_are_treated_as_they_should_be():
    owner = Bag(gone=1, kept=2)
    before = StateTracker([owner], skip=["kept", "made"]).capture()
    del owner.gone
    owner.kept, owner.made = 3, 4
    before.restore()
    assert vars(owner) == {"gone": 1, "kept": 3, "made": 4}


def test_a_snapshot_can_be_restored_twice():
    owner = Owner()
    before = StateTracker([owner]).capture()
    for _ in range(2):
        owner.count += 1
        owner.votes["b"] += 1
        owner.order.move_to_end("a")
        owner.total += 1
        owner.recent.append(7)
        before.restore()
        assert (owner.count, owner.votes, float(owner.total)) == (1, Counter(a=1), 1.0)
        assert list(owner.order) == ["a", "b"] and list(owner.recent) == [1, 2]


def test_containers_that_hold_themselves_do_not_hang():
    owner = Owner()
    owner.metrics["self"] = owner.metrics
    before = StateTracker([owner]).capture()
    owner.metrics["train"]["loss"].append(2.0)
    before.restore()
    assert owner.metrics["train"]["loss"] == [1.0]


# ---- Meters -------------------------------------------------------------------------------------


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


def contents(meter):
    return {k: repr(v) for k, v in (vars(meter) | dict(getattr(meter, "_buffers", {}))).items()}


@pytest.mark.parametrize(
    "meter", [Average(), Accuracy(), Confusion()], ids=lambda m: type(m).__name__
)
def test_a_meter_counts_once(meter):
    count = meter.update if hasattr(meter, "update") else lambda: meter(2.0)
    count()
    tracker = StateTracker([Bag(value={"inside": [meter]})])
    for _ in range(3):
        found = contents(meter)
        once, again = both_passes(tracker, count, lambda: contents(meter))
        assert once == again != found
    before = tracker.capture()
    once = contents(meter)
    count()
    meter.new = 1
    before.restore()
    assert contents(meter) == once


@pytest.mark.parametrize(
    "thing",
    [TrainingArguments("."), Owns(), Average, torch, open, ADAM, Path("."), len],
    ids=lambda thing: getattr(thing, "__name__", type(thing).__name__),
)
def test_arguments_classes_and_objects_that_hold_others_are_not_entered(thing):
    before = StateTracker([Bag(value={"inside": [thing]})]).capture()
    if hasattr(thing, "__dict__"):
        thing.left_alone = 1
        before.restore()
        assert thing.left_alone == 1
        del thing.left_alone
    before.restore()


def test_of_a_model_that_is_held_the_trained_weights_are_left_alone_and_the_rest_comes_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.calls = 0
    tracker = StateTracker([Bag(value={"inside": [model]})], ignored=model.parameters())

    def write():
        model.calls += 1
        with torch.no_grad():
            model[0].weight.add_(1)
        model(torch.randn(3, 2))

    start = model[0].weight.detach().clone()
    for number in range(3):
        once, again = both_passes(
            tracker, write, lambda: (model.calls, int(model[1].num_batches_tracked))
        )
        assert once == again == (number + 1, number + 1)
    torch.testing.assert_close(model[0].weight.detach(), start + 6)


def test_ignored_modules_are_left_alone_though_an_owner_holds_them():
    model = nn.BatchNorm1d(2)
    before = StateTracker([Bag(model=model)], ignored=model.modules()).capture()
    model(torch.randn(3, 2))
    before.restore()
    assert model.num_batches_tracked == 1


# ---- Tensors and arrays -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 1_025, 10_001, 70_001])
def test_arrays_and_tensors_of_any_kind_and_size_come_back_as_the_same_objects(size):
    owner = Owner()
    with torch.inference_mode():
        owner.metric = torch.zeros(size)
    owner.array, owner.resized = np.arange(size), torch.ones(size)
    owner.nested, owner.integers = {"list": [torch.ones(size)]}, torch.zeros(size, dtype=torch.long)
    objects = dict(vars(owner))
    before = StateTracker([owner]).capture()
    owner.array += 1
    owner.resized.resize_(size + 1)
    owner.nested["list"][0].zero_()
    owner.integers += 1
    with torch.inference_mode():
        owner.metric += 1
    before.restore()
    assert np.array_equal(owner.array, np.arange(size))
    assert torch.equal(owner.resized, torch.ones(size))
    assert torch.equal(owner.metric, torch.zeros(size))
    assert torch.equal(owner.nested["list"][0], torch.ones(size))
    assert owner.integers.sum() == 0
    assert all(getattr(owner, n) is objects[n] for n in ("array", "resized", "metric", "integers"))


LARGE = 100_000


def test_after_the_first_pass_large_tensors_are_copied_only_if_they_are_written():
    owner = Bag(
        written=torch.zeros(LARGE),
        by_data=torch.zeros(LARGE),
        left=torch.zeros(LARGE),
        array=np.zeros(LARGE),
        left_array=np.zeros(LARGE),
    )
    tracker = StateTracker([owner])

    def write():
        owner.written += 1
        owner.by_data.data.add_(1)  # PyTorch does not count it
        owner.array += 1

    def check():
        return [float(x[0]) for x in (owner.written, owner.by_data, owner.array)]

    for number in range(1, 4):
        once, again = both_passes(tracker, write, check)
        assert once == again == [number] * 3
    before = bytes_of_tensors()
    held = tracker.capture()
    assert bytes_of_tensors() - before == LARGE * (4 + 4)
    held.restore()


def bytes_of_tensors():
    """Memory of all tensors that exist; of those that share it, once."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) is torch.Tensor:
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_copies_of_large_tensors_that_the_first_pass_left_alone_are_freed_with_it():
    owner = Bag(written=torch.zeros(LARGE), left=torch.zeros(LARGE))
    tracker = StateTracker([owner])
    start = bytes_of_tensors()
    before = tracker.capture()
    assert bytes_of_tensors() - start == LARGE * (4 + 4)
    owner.written += 1
    tracker.observe(before)
    assert bytes_of_tensors() - start == LARGE * 4
    before.restore()
    assert owner.written.sum() == 0


@pytest.mark.parametrize("size", [5, LARGE])
def test_a_tensor_that_is_written_late_is_left_as_its_first_pass_left_it(size):
    """A bank that is filled from the third update on."""
    owner = Bag(bank=torch.zeros(size), count=0)
    tracker = StateTracker([owner])

    def write():
        owner.count += 1
        if owner.count > 2:
            owner.bank += 1

    for number in range(1, 6):
        before = tracker.capture()
        write()
        is_known = tracker.observe(before)
        # Of a large tensor the replay does not find what its first pass found, once.
        assert is_known == (size < LARGE or number != 3)
        after = tracker.capture(since=before)
        before.restore()
        write()
        after.restore()
        assert owner.count == number
        assert torch.equal(owner.bank, torch.full((size,), float(max(0, number - 2))))


def test_of_two_calls_of_one_step_each_is_observed_against_what_it_found():
    """Both are captured before the first of them is observed."""
    owner = Bag(**{name: torch.zeros(LARGE) for name in "abc"}, count=0)
    for name, writes in (("b", 3), ("c", 5)):  # version counters that differ
        for _ in range(writes):
            vars(owner)[name] += 0
    tracker = StateTracker([owner])
    for update in range(1, 4):
        snapshots = []
        for name in "ac":
            snapshots.append(tracker.capture())
            owner.count += 1
            vars(owner)[name] += 1
        assert [tracker.observe(snapshot) for snapshot in snapshots] == [True, True]
        after = tracker.capture(since=snapshots[-1])
        for snapshot, (a, c) in zip(snapshots, ((0, 0), (1, 0)), strict=True):
            snapshot.restore()
            assert (float(owner.a[0]), float(owner.c[0])) == (update - 1 + a, update - 1 + c)
            owner.a += 1
            owner.c += 1
        after.restore()
        assert (float(owner.a[0]), float(owner.c[0]), owner.count) == (update, update, 2 * update)
    start = bytes_of_tensors()
    held = tracker.capture()
    assert bytes_of_tensors() - start == 2 * 4 * LARGE  # of `b`, which nobody wrote, no copy
    held.restore()


@pytest.mark.parametrize("size", [3])
def test_an_array_that_is_written_late_is_left_as_its_first_pass_left_it(size):
    """Nobody counts how often an array is written."""
    owner = Bag(array=np.zeros(size), count=0)
    tracker = StateTracker([owner])

    def write():
        owner.count += 1
        if owner.count > 2:
            owner.array += 1

    for number in range(1, 6):
        repeated(tracker, write)
        assert owner.array[0] == max(0, number - 2)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, dtype=np.float16),
        np.zeros(3, dtype=np.uint16),
        np.zeros(3, dtype=np.uint64),
        np.zeros(3, dtype=bool),
        np.zeros(3, dtype=np.complex128),
        np.zeros(3, dtype=np.longdouble),
        np.zeros(3, dtype=">f8"),
        np.zeros(6)[::-1],
        np.zeros(6)[::2],
        np.zeros((2, 3)).T,
        np.zeros(()),
        np.zeros(0),
        np.zeros(3).view(type("Own", (np.ndarray,), {})),
        np.ma.masked_array(np.zeros(3)),
    ],
    ids=lambda a: f"{type(a).__name__}-{a.dtype}-{a.strides}",
)
def test_arrays_of_every_kind_are_written_once(array):
    owner = Bag(array=array)
    tracker = StateTracker([owner])

    def write():
        array[...] = array + 1 if array.dtype != bool else ~array

    for _ in range(3):
        once, again = both_passes(tracker, write, array.tolist)
        assert once == again


def test_arrays_that_cannot_be_written_and_those_of_other_things_are_left_alone():
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    owner = Bag(fixed=fixed, text=np.array(["a"]), things=np.array([object()]))
    tracker = StateTracker([owner])
    before = tracker.capture()
    tracker.observe(before)
    before.restore()
    tracker.capture().restore()


@pytest.mark.parametrize(
    "generator",
    [
        torch.Generator(),
        random.Random(0),
        np.random.RandomState(0),
        np.random.default_rng(0),
    ],
    ids=lambda g: type(g).__name__,
)
@pytest.mark.parametrize("where", ["attribute", "inside", "module"])
def test_a_generator_of_its_own_draws_the_same_in_both_passes(generator, where):
    if where == "module":
        module = nn.Module()
        module.generator = generator
        tracker = StateTracker([], [module])
    else:
        tracker = StateTracker([Bag(value=generator if where == "attribute" else [generator])])
    drawn = []

    def write():
        if isinstance(generator, torch.Generator):
            drawn.append(torch.rand(2, generator=generator).tolist())
        elif isinstance(generator, random.Random):
            drawn.append([generator.random(), generator.gauss(0, 1)])
        else:
            drawn.append([*generator.random(2).tolist(), float(generator.normal())])

    for _ in range(3):
        both_passes(tracker, write, lambda: None)
    assert drawn[0::2] == drawn[1::2]
    assert len({tuple(x) for x in drawn}) == 3


def test_what_an_owner_gets_between_the_tracker_and_the_first_pass_is_tracked_in_that_pass():
    owner = Bag()
    tracker = StateTracker([owner])
    owner.teacher, owner.counts = nn.BatchNorm1d(3), [0]

    def write():
        owner.teacher(torch.randn(4, 3))
        owner.counts[0] += 1

    for number in (1, 2):
        both_passes(tracker, write, lambda: int(owner.teacher.num_batches_tracked))
        assert (int(owner.teacher.num_batches_tracked), owner.counts) == (number, [number])


@pytest.mark.parametrize("make", [torch.zeros, np.zeros], ids=["tensor", "array"])
@pytest.mark.parametrize("where", ["attribute", "dictionary", "list"])
def test_what_a_pass_makes_new_is_tracked_from_then_on(make, where):
    owner = Bag(inside={}, several=[])
    tracker = StateTracker([owner])

    def get():
        if where == "attribute":
            return getattr(owner, "made", None)
        if where == "dictionary":
            return owner.inside.get("made")
        return owner.several[0] if owner.several else None

    def write():
        if get() is not None:
            held = get()
            held += 1
        elif where == "attribute":
            owner.made = make(3)
        elif where == "dictionary":
            owner.inside["made"] = make(3)
        else:
            owner.several.append(make(3))

    for number in range(4):
        both_passes(tracker, write, lambda: None if get() is None else float(get().sum()))
        assert get().sum() == 3 * number


def test_a_tensor_that_every_pass_replaces_comes_back():
    owner = Bag(bank=torch.zeros(3))
    tracker = StateTracker([owner])

    def write():
        owner.bank = owner.bank + 1

    for number in range(1, 4):
        once, again = both_passes(tracker, write, lambda: float(owner.bank.sum()))
        assert once == again == 3 * number


# ---- Containers ---------------------------------------------------------------------------------

LENGTHS = [3, 300, 1_025, 10_001, 70_001]


def make(kind, length):
    if kind in (dict, OrderedDict):
        return kind((i, i) for i in range(length))
    if kind is Counter:
        return Counter({i: i for i in range(length)})
    if kind is defaultdict:
        return defaultdict(list, {i: i for i in range(length)})
    if kind == "bounded":
        return deque(range(length), maxlen=length)
    return kind(range(length))


def append(container, value):
    if isinstance(container, dict):
        container[("new", value)] = value
    elif isinstance(container, set):
        container.add(("new", value))
    else:
        container.append(value)


def rewrite(container, value):
    """Change the first entry, in place of it or not."""
    if isinstance(container, OrderedDict):
        container.move_to_end(next(iter(container)))
    elif isinstance(container, dict):
        container[next(iter(container))] = value
    elif isinstance(container, set):
        container.discard(min(x for x in container if isinstance(x, int)))
        container.add(("new", value))
    else:
        container[0] = ("new", value)


def listed(container):
    if isinstance(container, dict):
        return list(container.items())
    return sorted(map(repr, container)) if isinstance(container, set) else list(container)


KINDS = [list, dict, OrderedDict, Counter, defaultdict, set, deque, "bounded"]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: getattr(k, "__name__", k))


@each_kind
@pytest.mark.parametrize("write", [append, rewrite])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_container_of_any_length_changes_once_in_each_update(kind, length, write):
    owner = Bag(value=make(kind, length), count=0)
    objects = owner.value
    twin = make(kind, length)
    tracker = StateTracker([owner])

    def step():
        owner.count += 1
        write(owner.value, owner.count)

    for number in range(1, 4):
        write(twin, number)
        once, again = both_passes(tracker, step, lambda: listed(owner.value))
        assert once == again == listed(twin)
        assert owner.value is objects and type(owner.value) is type(twin)
    assert getattr(owner.value, "maxlen", None) == getattr(twin, "maxlen", None)


def test_of_a_very_long_list_no_copy_is_made_after_the_first_pass():
    before = lists_of(70_000)
    owner = Bag(data=list(range(70_000)), rewritten=[0] * 70_000)
    tracker = StateTracker([owner])

    def write():
        owner.data.append(1)
        owner.rewritten[0] += 1

    both_passes(tracker, write, lambda: (len(owner.data), owner.rewritten[0]))
    assert (len(owner.data), owner.rewritten[0]) == (70_001, 1)
    tracker.capture()
    assert lists_of(70_000) - before == 3  # both lists, and a copy of `rewritten`


def lists_of(length):
    """How many lists of this length or more there are."""
    gc.collect()
    return sum(type(x) is list and len(x) >= length for x in gc.get_objects())


@pytest.mark.parametrize("kind", [list, deque], ids=["list", "deque"])
@pytest.mark.parametrize("length", [3, 300, 70_001])
def test_a_buffer_that_fills_up_and_is_rotated_from_then_on_is_rotated_once(kind, length):
    """As replay buffers are: at first, passes only append to it."""
    owner, twin = Bag(buffer=kind(range(length)), count=0), kind(range(length))
    tracker = StateTracker([owner])

    def rotate(buffer, number):
        buffer.append(("new", number))
        if len(buffer) > length + 2:
            del buffer[0]

    def write():
        owner.count += 1
        rotate(owner.buffer, owner.count)

    for number in range(1, 7):
        rotate(twin, number)
        repeated(tracker, write)
        assert owner.buffer == twin


def test_a_container_that_another_thread_writes_is_left_to_it(monkeypatch):
    class Hurried(deque):
        def copy(self):
            raise RuntimeError("deque mutated during iteration")

    owner = Owner()
    owner.queue = Hurried([1])
    monkeypatch.setattr(state_module, "_CONTAINERS", (*state_module._CONTAINERS, Hurried))
    before = StateTracker([owner]).capture()
    owner.queue.append(2)
    owner.metrics["eval"]["x"] = 1
    before.restore()
    assert list(owner.queue) == [1, 2] and owner.metrics["eval"] == {}


@pytest.mark.parametrize("kind", [list, set, dict, Counter, defaultdict])
def test_a_container_that_nothing_was_done_to_stays_valid_for_who_iterates_over_it(kind):
    owner = Bag(value=make(kind, 3))
    iterator = iter(owner.value)
    next(iterator)
    StateTracker([owner]).capture().restore()
    assert next(iterator) == 1  # of a container that was refilled, it would end or raise here


def test_an_output_of_a_model_that_is_held_does_not_stop_a_restore():
    """It is a dictionary that forbids what putting dictionaries back needs."""
    owner = Owner()
    tracker = StateTracker([owner])
    for number in range(1, 4):

        def write():
            owner.count += 1
            owner.output = SequenceClassifierOutput(logits=torch.full((1,), float(owner.count)))

        once, again = both_passes(tracker, write, lambda: (owner.count, owner.output.logits))
        assert once == again == (number + 1, torch.full((1,), number + 1.0))


# ---- Buffers and frozen weights -----------------------------------------------------------------


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


class Bank(nn.Module):
    """A queue of more numbers than any limit would allow, as MoCo keeps one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(200, 500))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.queue[int(self.position)] = x.sum()
        self.position += 1
        return x


@pytest.mark.parametrize(
    "layer",
    [
        Normalises(),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, momentum=None),
        nn.BatchNorm1d(3, affine=False),
        nn.InstanceNorm1d(3, track_running_stats=True),
        Counts(),
        Bank(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_buffers_written_in_a_forward_pass_are_written_once(layer):
    model = nn.Sequential(nn.Identity(), layer)
    tracker, x = StateTracker([], model.modules()), torch.randn(4, 3, 5)
    for _ in range(3):  # the second update finds a known writer
        found = {name: b.clone() for name, b in model.named_buffers()}
        before = tracker.capture()
        model(x)
        tracker.observe(before)
        once = {name: b.clone() for name, b in model.named_buffers()}
        objects = dict(model.named_buffers())
        after = tracker.capture(since=before)
        before.restore()
        assert all(torch.equal(b, found[name]) for name, b in model.named_buffers())
        model(x * 10 + 3)
        assert any(not torch.equal(b, once[name]) for name, b in model.named_buffers())
        after.restore()
        for name, b in model.named_buffers():
            assert torch.equal(b, once[name]) and b is objects[name]


def test_batch_norm_that_is_set_to_train_late_is_written_once():
    model = nn.BatchNorm1d(3).eval()
    tracker, x = StateTracker([], model.modules()), torch.randn(4, 3)
    for number in range(4):
        if number == 2:
            model.train()
        both_passes(
            tracker,
            lambda: model(x),
            lambda: (model.running_mean.tolist(), int(model.num_batches_tracked)),
        )
        assert model.num_batches_tracked == max(0, number - 1)


@pytest.mark.parametrize("how", ["in place", "data"])
@pytest.mark.parametrize("size", [2, 200])
def test_frozen_weights_that_a_forward_pass_writes_are_written_once(how, size):
    model = nn.ModuleDict({"teacher": nn.Linear(size, size), "student": nn.Linear(size, size)})
    model["teacher"].requires_grad_(False)

    def forward():
        for slow, fast in zip(*(m.parameters() for m in model.values()), strict=True):
            with torch.no_grad():
                if how == "data":
                    slow.data = slow.data.lerp(fast.data, 0.5)
                else:
                    slow.lerp_(fast, 0.5)

    tracker = StateTracker([], model.modules())
    for _ in range(3):
        before = tracker.capture()
        forward()
        tracker.observe(before)
        once = [p.clone() for p in model["teacher"].parameters()]
        after = tracker.capture(since=before)
        forward()
        assert not torch.equal(model["teacher"].weight, once[0])
        after.restore()
        for p, value in zip(model["teacher"].parameters(), once, strict=True):
            assert torch.equal(p, value)


@pytest.mark.parametrize("how", ["in place", "data"])
def test_frozen_weights_that_outweigh_the_trained_ones_are_not_copied_unless_they_are_written(how):
    """A base model under adapters: its copy would not fit the memory budget."""
    base, adapter = nn.Linear(300, 300).requires_grad_(False), nn.Linear(2, 2)
    teacher = nn.Linear(200, 200, bias=False).requires_grad_(False)
    tracker = StateTracker([], [base, adapter, teacher])
    start = bytes_of_tensors()
    held = tracker.capture()
    assert bytes_of_tensors() == start
    held.restore()

    def forward():
        with torch.no_grad():
            if how == "data":
                teacher.weight.data = teacher.weight.data + 1
            else:
                teacher.weight.add_(1)

    for number in range(3):
        before = tracker.capture()
        forward()
        is_known = tracker.observe(before)
        assert is_known == (number > 0)  # its copy is missing once
        once, after = teacher.weight.clone(), None
        start = bytes_of_tensors()
        after = tracker.capture(since=before)
        assert bytes_of_tensors() - start == teacher.weight.nbytes
        forward()
        after.restore()
        assert torch.equal(teacher.weight, once)


def test_large_buffers_that_nobody_writes_are_not_copied_after_the_first_pass():
    model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 3))
    model[1].register_buffer("large", torch.zeros(LARGE))
    tracker = StateTracker([], model.modules())
    start = bytes_of_tensors()
    before = tracker.capture()
    model(torch.randn(2, 3))
    tracker.observe(before)
    assert bytes_of_tensors() - start < 1000
    later = tracker.capture()
    assert bytes_of_tensors() - start < 1000
    later.restore()


def test_attributes_of_modules_come_back():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.history, self.latest = 0, [], torch.zeros(70_000)

        def forward(self, x):
            self.calls += 1
            self.history.append(self.calls)
            self.latest = self.latest + 1
            return x

    model = nn.Sequential(Layer())
    tracker = StateTracker([], model.modules())
    for number in range(1, 4):
        once, again = both_passes(
            tracker,
            lambda: model(torch.ones(1)),
            lambda: (model[0].calls, list(model[0].history), float(model[0].latest[0])),
        )
        assert once == again == (number, list(range(1, number + 1)), number)


# ---- The tools ----------------------------------------------------------------------------------


def test_undo_is_called_again_if_an_interrupt_hits_it():
    calls = []

    def undo():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), always_restore(undo):
        pass
    assert len(calls) == 2
    with pytest.raises(ZeroDivisionError), always_restore(lambda: calls.append(2)):
        1 / 0  # noqa: B018
    assert calls == [1, 1, 2]


def test_patched_attributes_of_one_object_are_taken_away_again():
    class Thing:
        def method(self):
            return "class"

    thing = Thing()
    thing.own = 1
    with pytest.raises(ZeroDivisionError), patched(thing, method=lambda: "patched", own=2):
        assert (thing.method(), thing.own) == ("patched", 2)
        1 / 0  # noqa: B018
    assert vars(thing) == {"own": 1} and thing.method() == "class"

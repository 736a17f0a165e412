"""State of the trainer and of modules that the recorded calls read and write.

The second pass finds it as the recorded call found it, and leaves it as the first pass left it,
whatever its size and wherever it is kept.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlp import MLP, TINY_RHO, above, assert_same_weights, below, build, plain, trained
from slow import slow_unless
from tiny import FEATURES, Spy
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close
from transformers import Trainer
from twin_runs import RHO

from sam_hf import SAMTrainer

SETTINGS = [(1, "batch"), (3, "batch"), (3, "micro_batch")]
all_settings = pytest.mark.parametrize(("accumulation", "scope"), SETTINGS)


def runs(
    accumulation: int, scope: str, theirs: type | None = None, place: Any = above, model: Any = MLP
) -> list[Any]:
    """The trainer with SAM at a tiny rho, and the plain one, both trained."""
    classes = (place(theirs), plain(theirs)) if theirs else (SAMTrainer, Trainer)
    sam = {"sam_rho": TINY_RHO, "sam_scope": scope}
    return [trained(c, model, accumulation, sam=sam) for c in classes]


# ---- The trainer's -------------------------------------------------------------------------------

PLACES: dict[str, tuple[Callable[[Any, Any], None], Callable[[Any], Any]]] = {
    "an attribute": (lambda t, v: setattr(t, "kept", v), lambda t: t.kept),
    "a dict": (lambda t, v: setattr(t, "kept", {"bank": v}), lambda t: t.kept["bank"]),
    "a nested dict": (lambda t, v: setattr(t, "kept", {0: {1: v}}), lambda t: t.kept[0][1]),
    "a list": (lambda t, v: setattr(t, "kept", [0, v]), lambda t: t.kept[1]),
    "a tuple": (lambda t, v: setattr(t, "kept", (0, v)), lambda t: t.kept[1]),
    "an object": (lambda t, v: setattr(t, "kept", SimpleNamespace(b=v)), lambda t: t.kept.b),
    "the model": (lambda t, v: setattr(t.model, "kept", v), lambda t: t.model.kept),
    "a submodule": (lambda t, v: setattr(t.model.head, "kept", v), lambda t: t.model.head.kept),
    "a dict of a submodule": (
        lambda t, v: setattr(t.model.head, "kept", {"bank": v}),
        lambda t: t.model.head.kept["bank"],
    ),
    "a buffer": (lambda t, v: t.model.register_buffer("kept", v), lambda t: t.model.kept),
}


def keeping(place: str, make: Callable[[], Any], use: Callable[[Any], float]) -> type:
    """Overrides `compute_loss` by one that multiplies the loss by `use(state)`, which writes it."""
    put, get = PLACES[place]

    class Keeping:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            put(self, make())

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return use(get(self)) * super().compute_loss(model, inputs, *args, **kwargs)

    return Keeping


def bank(numbers: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(numbers, dtype=torch.float64)


def average(bank: Tensor) -> float:
    found = bank[0].item()
    bank.mul_(0.9).add_(0.1)
    return 1 + found + bank[-1].item()


@slow_unless(numbers=[20_000], scope=["micro_batch"])
@slow_unless(place=["an attribute"], accumulation=[3], scope=["batch"])
@all_settings
@pytest.mark.parametrize("numbers", [500, 20_000, 300_000])
@pytest.mark.parametrize("place", PLACES)
def test_a_memory_bank_is_as_in_plain_training_whatever_its_size_and_place(
    place, numbers, accumulation, scope
):
    theirs = keeping(place, bank(numbers), average)
    ours, expected = runs(accumulation, scope, theirs)
    kept = PLACES[place][1](ours)
    assert kept[0].item() == pytest.approx(1 - 0.9 ** (3 * accumulation))
    assert torch.equal(kept, PLACES[place][1](expected))
    assert_same_weights(ours.model, expected.model)


def overwrite(state: Any) -> float:
    state[7] *= 0.9
    return float(state[7])


def append(state: Any) -> float:
    state.append(0.9 * state[-1])
    return state[-1]


def count(state: dict[str, int]) -> float:
    state["calls"] = state.get("calls", 0) + 1
    return 1 / state["calls"]


def shrink(state: np.ndarray) -> float:
    found = state[0]
    state *= 0.9
    return found + state[-1]


def add_to_set(state: set[int]) -> float:
    state.add(len(state))
    return 1 / len(state)


def pop(state: list[float]) -> float:
    return state.pop()


def enqueue(state: dict[str, Any]) -> float:
    """A queue of keys, as MoCo has it: a pointer, and rows that are written at it."""
    found, pointer = state["queue"].sum().item(), state["pointer"]
    state["queue"][pointer : pointer + 4] = 1.0
    state["pointer"] = (pointer + 4) % len(state["queue"])
    return 1 / (1 + found)


def grow(state: dict[str, Tensor]) -> float:
    state["rows"] = torch.cat([state["rows"], state["rows"][-1:] * 0.9])
    return state["rows"][-1].item()


def average_data(bank: Tensor) -> float:
    """Through `.data`, whose writes the tensor's version does not count."""
    found = bank[0].item()
    bank.data.mul_(0.9).add_(0.1)
    return 1 + found + bank[-1].item()


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "a list that grows": (lambda: [1.0], append),
    "a list of 100,000 that grows": (lambda: [1.0] * 100_000, append),
    "a list of 100,000 with an overwritten entry": (lambda: [1.0] * 100_000, overwrite),
    "a list of 100,000 that shrinks": (lambda: [i / 1e5 for i in range(100_000)], pop),
    "a deque": (lambda: deque([1.0] * 5, maxlen=5), append),
    "a deque of 100,000": (lambda: deque([1.0] * 100_000, maxlen=100_000), append),
    "a dict counter": (dict, count),
    "a Counter": (Counter, count),
    "a dict of 100,000": (lambda: dict.fromkeys(range(100000), 1.0), overwrite),
    "a set": (set, add_to_set),
    "an array of 100": (lambda: np.ones(100), shrink),
    "an array of 300,000": (lambda: np.ones(300_000), shrink),
    "an array with an overwritten entry": (lambda: np.ones(300_000), overwrite),
    "a tensor with an overwritten entry": (
        lambda: torch.ones(300_000, dtype=torch.float64),
        overwrite,
    ),
    "a queue with a pointer": (lambda: {"queue": torch.zeros(5000, 8), "pointer": 0}, enqueue),
    "a tensor in a dict that is replaced": (lambda: {"rows": torch.ones(20_000)}, grow),
    "a tensor of 500 written through .data": (bank(500), average_data),
    "a tensor of 20,000 written through .data": (bank(20_000), average_data),
}


def assert_equal(actual: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert np.array_equal(actual, expected)
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif any(isinstance(value, Tensor) for value in getattr(expected, "values", list)()):
        assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert actual == expected


@slow_unless(place=["a dict"], scope=["micro_batch"])
@slow_unless(place=["an attribute"], accumulation=[3], scope=["batch"])
@all_settings
@pytest.mark.parametrize("place", ["an attribute", "a dict", "a submodule"])
@pytest.mark.parametrize("kind", STATES)
def test_containers_that_compute_loss_reads_and_writes_are_as_in_plain_training(
    kind, place, accumulation, scope
):
    theirs = keeping(place, *STATES[kind])
    ours, expected = runs(accumulation, scope, theirs)
    assert_equal(PLACES[place][1](ours), PLACES[place][1](expected))
    assert_same_weights(ours.model, expected.model)


@all_settings
@pytest.mark.parametrize("kind", ["a list of 100,000 that grows", "an array of 300,000"])
def test_state_of_a_trainer_given_to_with_sam_is_as_in_plain_training(kind, accumulation, scope):
    ours, expected = runs(accumulation, scope, keeping("a dict", *STATES[kind]), below)
    assert_equal(ours.kept["bank"], expected.kept["bank"])
    assert_same_weights(ours.model, expected.model)


class Coefficient:
    """Numbers, a text and tensors that are attributes, and are replaced rather than written."""

    factor, name, running = 1.0, "a", torch.ones(20_000, dtype=torch.float64)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.factor *= 0.9
        self.running = self.running * 0.9
        self.name += "a"
        factor = self.factor + self.running[0].item() + 1 / len(self.name)
        return factor * super().compute_loss(*args, **kwargs)


@all_settings
@pytest.mark.parametrize("place", [above, below])
def test_attributes_that_compute_loss_replaces_are_as_in_plain_training(place, accumulation, scope):
    ours, expected = runs(accumulation, scope, Coefficient, place)
    assert (ours.factor, ours.name) == (expected.factor, expected.name)
    assert torch.equal(ours.running, expected.running)
    assert_same_weights(ours.model, expected.model)


# ---- Teachers ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "lerp_": lambda teacher, student: teacher.lerp_(student, 0.3),
    "mul_ and add_": lambda teacher, student: teacher.mul_(0.7).add_(student, alpha=0.3),
    "copy_": lambda teacher, student: teacher.copy_(0.7 * teacher + 0.3 * student),
    ".data": lambda teacher, student: teacher.data.mul_(0.7).add_(student.data, alpha=0.3),
    "a new .data": lambda t, s: setattr(t, "data", 0.7 * t.data + 0.3 * s.data),
}
all_writes = pytest.mark.parametrize("write", WRITES)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, write: str) -> None:
    for name, weight in teacher.named_parameters():
        WRITES[write](weight, student.get_parameter(name))


class WithTeacher:
    """Distils from an exponential moving average of the model that the trainer holds."""

    write = "lerp_"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.teacher = MLP().requires_grad_(False)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        follow(self.teacher, model, self.write)
        outputs = model(**inputs)
        target = self.teacher(inputs["x"])["logits"]
        return outputs["loss"] + (outputs["logits"] - target).square().mean()


class Distilled(MLP):
    """The same with the teacher within the model, which its forward pass writes."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.teacher = write, MLP().requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(x, labels)
        if self.training:
            follow(self.teacher, self, self.write)
            difference = outputs["logits"] - self.teacher(x)["logits"]
            outputs["loss"] = outputs["loss"] + difference.square().mean()
        return outputs


@slow_unless(place=[above], accumulation=[3])
@slow_unless(write=["lerp_"])
@all_settings
@all_writes
@pytest.mark.parametrize("place", [above, below])
def test_a_teacher_of_the_trainer_is_as_in_plain_training(place, write, accumulation, scope):
    theirs = type("Theirs", (WithTeacher,), {"write": write})
    ours, expected = runs(accumulation, scope, theirs, place)
    assert_same_weights(ours.teacher, expected.teacher)
    assert_same_weights(ours.model, expected.model)


@slow_unless(accumulation=[3])
@all_settings
@all_writes
def test_a_teacher_within_the_model_is_as_in_plain_training(write, accumulation, scope):
    ours, expected = runs(accumulation, scope, model=lambda: Distilled(write))
    assert_same_weights(ours.model, expected.model)


@slow_unless(accumulation=[3])
@all_settings
@all_writes
def test_a_teacher_is_an_average_of_w_and_never_of_w_plus_e(write, accumulation, scope):
    spy = Spy()
    trainer = build(
        above(type("Theirs", (WithTeacher,), {"write": write})),
        accumulation=accumulation,
        sam={"sam_rho": RHO, "sam_scope": scope},
        trainer_kwargs={"callbacks": [spy]},
    )
    teacher, student = copy.deepcopy(trainer.teacher), copy.deepcopy(trainer.model)
    trainer.train()
    for w in [student.state_dict(), *spy.weights][:3]:
        student.load_state_dict(w)
        for _ in range(accumulation):
            follow(teacher, student, write)
    assert_close(trainer.teacher.state_dict(), teacher.state_dict(), rtol=0, atol=1e-12)


# ---- Numbers of modules --------------------------------------------------------------------------


class Counting(nn.Linear):
    """Divides by the number of its training calls, which is a Python number."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x) / self.calls


class CountingInDict(nn.Linear):
    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.seen = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"] += 1
        return super().forward(x) / self.seen["calls"]

    @property
    def calls(self) -> int:
        return self.seen["calls"]


def hooked(kind: str) -> nn.Linear:
    """A Linear whose calls are counted, and annealed, by a hook."""

    def before(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        module.calls += 1
        return args[0] / module.calls

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        module.calls += 1
        return output / module.calls

    linear = nn.Linear(FEATURES, FEATURES)
    linear.calls = 0
    if kind == "before":
        linear.register_forward_pre_hook(before)
    else:
        linear.register_forward_hook(after)
    return linear


COUNTERS: dict[str, Callable[[], Any]] = {
    "in forward": lambda: Counting(FEATURES, FEATURES),
    "in a dict": CountingInDict,
    "by a forward hook": lambda: hooked("after"),
    "by a forward pre-hook": lambda: hooked("before"),
}


@all_settings
@pytest.mark.parametrize("kind", COUNTERS)
def test_a_module_counts_its_calls_once_and_replays_with_the_count_that_it_found(
    kind, accumulation, scope
):
    ours, expected = runs(accumulation, scope, model=lambda: MLP(COUNTERS[kind]()))
    assert ours.model.middle.calls == expected.model.middle.calls == 3 * accumulation
    assert_same_weights(ours.model, expected.model)


def test_the_model_itself_counts_its_calls_once():
    class Model(MLP):
        calls, losses = 0, ()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            self.losses = (*self.losses, self.calls)
            return super().forward(x, labels)

    model = trained(SAMTrainer, Model, sam={"sam_rho": RHO}).model
    assert model.calls == 3 and model.losses == (1, 2, 3)


# ---- Buffers that a module reads and writes ------------------------------------------------------


class Anneals(nn.Module):
    """Divides by a number of steps that is a buffer: written in place, or replaced."""

    def __init__(self, replaces: bool = False, persistent: bool = True) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("steps", torch.zeros(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1 if self.replaces else self.steps.add_(1)
        return x / self.steps


class ReadsThenWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(20_000))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale[:FEATURES].clone()
        if self.training:
            self.scale.mul_(0.9)
        return x


class RunningMean(nn.Module):
    """Centres by the mean of its inputs so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.mean


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "a step counter": lambda: nn.Sequential(linear(), Anneals()),
    "a step counter that is replaced": lambda: nn.Sequential(linear(), Anneals(replaces=True)),
    "a step counter that is not saved": lambda: nn.Sequential(linear(), Anneals(persistent=False)),
    "a scale that is read first": lambda: nn.Sequential(linear(), ReadsThenWrites()),
    "a running mean": lambda: nn.Sequential(linear(), RunningMean()),
    "spectral norm": lambda: spectral_norm(linear()),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(linear()),
    "cumulative batch norm": lambda: nn.Sequential(linear(), nn.BatchNorm1d(5, momentum=None)),
    "spectral norm of two iterations": lambda: spectral_norm(linear(), n_power_iterations=2),
}


@slow_unless(accumulation=[3])
@all_settings
@pytest.mark.parametrize("kind", MIDDLES)
def test_a_module_that_reads_a_buffer_it_writes_is_as_in_plain_training(kind, accumulation, scope):
    ours, expected = runs(accumulation, scope, model=lambda: MLP(MIDDLES[kind]()))
    assert_same_weights(ours.model, expected.model)
    buffers = dict(ours.model.named_buffers())
    assert_close(buffers, dict(expected.model.named_buffers()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_each_replayed_call_finds_the_buffer_as_its_recorded_call_found_it(scope):
    found = []

    class Looks(Anneals):
        def forward(self, x: Tensor) -> Tensor:
            found.append(self.steps.item())
            return super().forward(x)

    trained(
        SAMTrainer,
        lambda: MLP(nn.Sequential(linear(), Looks())),
        3,
        sam={"sam_rho": RHO, "sam_scope": scope},
        max_steps=2,
    )
    if scope == "batch":
        assert found == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    else:
        assert found == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@all_settings
def test_a_list_slot_that_is_filled_later_and_a_late_entry_count_once(accumulation, scope):
    class Slots:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.slots, self.late, self.calls = [None], [0] * 1000, 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.slots[0] is None:
                self.slots[0] = torch.zeros(1)
            self.slots[0].add_(1)
            if self.calls > 1:
                self.late[500] += 1
            return super().compute_loss(*args, **kwargs)

    ours, expected = runs(accumulation, scope, Slots)
    assert ours.slots[0].item() == expected.slots[0].item() == 3 * accumulation
    assert ours.late == expected.late


def test_a_teacher_whose_weights_require_a_gradient_is_averaged_once_per_batch():
    class Teaches:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.teacher = copy.deepcopy(self.model)

        @torch.no_grad()
        def average(self, model: nn.Module) -> None:
            for t, p in zip(self.teacher.parameters(), model.parameters(), strict=True):
                t.mul_(0.9).add_(p, alpha=0.1)

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.average(model)
            return super().compute_loss(model, inputs, *args, **kwargs)

    ours, expected = runs(1, "batch", Teaches)
    assert_same_weights(ours.teacher, expected.teacher)

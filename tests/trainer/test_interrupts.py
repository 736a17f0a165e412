"""Ctrl-C at every line of sam_hf, out of memory in every operation, and a real signal."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from faulty import Notice, all_scopes, forward_number, watch_lines, watched
from tiny import Spy, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, set_seed

from sam_hf import SAMTrainer

K = 2  # micro-batches of an update


class Update:
    """One update, micro-batch by micro-batch as the Trainer's loop runs it, up to its step."""

    def __init__(self, sam: dict[str, Any] | None) -> None:
        self.trainer = watched(sam, gradient_accumulation_steps=K)
        self.trainer.current_gradient_accumulation_steps = K
        self.training_step = functools.partial(
            (SAMTrainer if sam else Trainer).training_step, self.trainer
        )
        self.model = self.trainer.model
        self.start = weights(self.model)
        rows = self.trainer.train_dataset.rows
        self.batches = [self.trainer.data_collator(rows[4 * i : 4 * i + 4]) for i in range(K)]
        self.run()  # what happens once has happened
        self.rewind()
        # Before the update, and after each micro-batch, if nothing goes wrong.
        self.looks = [self.trainer._look(), *(self.trainer._look() for _ in self.steps())]

    def rewind(self) -> None:
        """The model and the generators as in the beginning. Not what else the trainer holds."""
        set_seed(0)
        self.model.load_state_dict(self.start)
        self.model.zero_grad()
        self.model.forwards = self.trainer.calls = self.micro_batch = 0
        self.trainer.metrics = {"loss": []}

    def steps(self) -> Iterator[None]:
        for i, inputs in enumerate(self.batches):
            self.micro_batch = i
            self.trainer.accelerator.gradient_state._set_sync_gradients(i == K - 1)
            self.training_step(self.model, dict(inputs), None)
            yield

    def run(self) -> None:
        for _ in self.steps():
            pass


# ---- What strikes -----------------------------------------------------------------------------


def watch_allocations(function: Callable[[], None], notice: Notice) -> None:
    """Call `notice` before every operation of the function that makes a tensor."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not operation._schema.is_mutable:
                notice(str(operation))
            return operation(*args, **(kwargs or {}))

    with Watch():
        function()


@contextmanager
def struck(
    watch: Callable[..., None], function: Callable[[], None], where: str, number: int
) -> Iterator[BaseException | None]:
    """Raise before a line or operation, when it comes for that time (from 0).

    Yields:
        The exception, which is alive in the block; None if it did not come so often.
    """
    kind = KeyboardInterrupt if watch is watch_lines else torch.OutOfMemoryError
    numbers = iter(range(sys.maxsize))

    def strike(place: str) -> None:
        if place == where and next(numbers) == number:
            raise kind(place)

    try:
        watch(function, strike)
    except kind as error:
        assert str(error) == where
        yield error
    else:
        yield None


# ---- What must hold ---------------------------------------------------------------------------


def equal(xs: dict[str, Tensor | None], ys: dict[str, Tensor | None]) -> bool:
    return all(
        x is y or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(xs.values(), ys.values(), strict=True)
    )


def broken_guarantees(update: Update, plain: Update, scope: str, is_exact: bool) -> Iterator[str]:
    """Look at a trainer whose training step was cut short.

    Args:
        plain: the same update of a plain Trainer, whose gradients are those of the ascent.
        is_exact: no forward or backward pass was cut, so that an ascent is whole or not begun.
    """
    left, i, forwards = update.trainer._look(), update.micro_batch, update.model.forwards
    ascents = min(forwards, K) if scope == "batch" else (forwards + 1) // 2
    is_descending = forwards > K if scope == "batch" else forwards == 2 * ascents > 0
    expected = update.looks[ascents]
    if not equal(left.weights, update.looks[0].weights):
        yield "weights"
    if left.replaced_methods:
        yield "methods"
    if not torch.is_grad_enabled():
        yield "grad mode"
    if update.trainer.label_names != ["labels"]:
        yield "attributes"
    if is_exact or is_descending:
        if left.generators != expected.generators:
            yield "generators"
        if not equal(left.statistics, expected.statistics):
            yield "statistics"
        if left.counters != expected.counters:
            yield "counters"
    if scope == "micro_batch":
        whole = [update.looks[i], update.looks[i + 1]]
    elif is_descending:
        whole = [update.looks[0], update.looks[K]]
    else:
        whole = [plain.looks[i], plain.looks[i + 1], update.looks[0]]
    can_tell = scope == "micro_batch" or is_descending or is_exact
    if can_tell and not any(equal(left.gradients, look.gradients) for look in whole):
        yield "gradients"

    logs = len(update.trainer.state.log_history)
    update.trainer.log({"x": 1.0})
    if len(update.trainer.state.log_history) == logs:
        yield "logs"


def sweep(watch: Callable[..., None], scope: str, every: int = 1) -> dict[str, dict[str, int]]:
    """Strike in one of so many places, or everywhere.

    Returns:
        For each guarantee, the places at which it did not hold, and how often.
    """
    sam = {"sam_method": "asam", "sam_scope": scope}
    update, plain = Update(sam), Update(None)
    places: list[str] = []
    update.rewind()
    watch(update.run, places.append)
    # Of many times, as in a loop over the parameters, the first and the last.
    chosen = [(place, i) for place, n in Counter(places).items() for i in sorted({0, n - 1})]
    chosen = chosen[::every]

    broken: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    skipped = []  # what is not done in every update, such as sums over many of them
    for place, number in chosen:
        update.rewind()
        with struck(watch, update.run, place, number) as error:
            if error is None:
                skipped.append(place)
                continue
            names = list(broken_guarantees(update, plain, scope, watch is watch_lines))
        torch.set_grad_enabled(True)
        update.trainer.state.log_history.clear()
        update.rewind()
        update.run()
        if not equal(update.trainer._look().gradients, update.looks[-1].gradients):
            names.append("next update")
        for name in names:
            broken[name][place] += 1
        if names:
            update = Update(sam)
    assert len(skipped) < 0.05 * len(chosen), skipped
    return {name: dict(where) for name, where in broken.items()}


@all_scopes
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_leaves_w_bit_for_bit_and_nothing_half_done(
    scope: str, every: int
) -> None:
    broken = sweep(watch_lines, scope, every)
    assert broken.pop("weights", {}) == {}
    assert broken == {}


@all_scopes
def test_no_memory_for_any_tensor_leaves_w_bit_for_bit_and_nothing_half_done(scope: str) -> None:
    broken = sweep(watch_allocations, scope)
    assert broken.pop("weights", {}) == {}
    assert broken == {}


# ---- Signals ----------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Sends the signal of Ctrl-C from another thread; it is an exception in this one."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread receives signals")
    if sys.platform == "win32":
        pytest.skip("os.kill cannot send Ctrl-C there: it ends the process")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, before)


@all_scopes
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_ctrl_c_in_the_descent_leaves_the_weights_of_the_last_update_and_training_can_go_on(
    scope: str, where: str, ctrl_c: Callable[[], None]
) -> None:
    def take_long(hidden: Tensor) -> Tensor:
        ctrl_c()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            torch.tanh(hidden)
        raise AssertionError("no signal came")

    def in_backward(hidden: Tensor) -> Tensor:
        hidden.register_hook(take_long)
        return hidden

    spy = Spy()
    number = forward_number("descent", scope, 1, update=1)
    sam = {"sam_scope": scope}
    trainer = watched(sam, {number: take_long if where == "forward" else in_backward})
    trainer.add_callback(spy)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    left = trainer.snapshots[-1]
    assert equal(left.weights, {name: spy.weights[0][name] for name in left.weights})
    trainer.train()
    assert trainer.state.global_step == 2

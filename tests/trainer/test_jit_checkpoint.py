"""SIGTERM at any moment of an update: the Trainer's just-in-time checkpoint holds w.

The Trainer's handler starts a timer, the timer sets a flag, and callbacks look at the flag before
the optimizer steps, and at the beginning and the end of an update. Nothing is saved inside a
training step. Here the timer is due at once.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faulty import TINY_RHO, Faulty, K, all_scopes, forward_number, watch_lines
from safetensors.torch import load_file
from slow import slow_unless
from tiny import Spy, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, set_seed
from twin_runs import losses, optimizer_state

from sam_hf import SAMTrainer

jit_checkpoint = pytest.importorskip("transformers.trainer_jit_checkpoint")

UPDATES, STRUCK = 4, 1  # the signal comes in the second of four updates
SCOPES = ["batch", "micro_batch"]


class AtOnce:
    """A timer that does not wait."""

    def __init__(self, _: float, function: Callable[[], None]) -> None:
        self.start = function


@pytest.fixture(autouse=True)
def _handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread receives signals")
    monkeypatch.setattr(jit_checkpoint, "threading", SimpleNamespace(Timer=AtOnce))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def strike(*_: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


class At(TrainerCallback):
    """Brings the signal at an event of the update, after the Trainer's own callbacks."""

    def __init__(self, event: str) -> None:
        def handler(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STRUCK:
                strike()

        setattr(self, event, handler)


def build(
    scope: str | None,
    faults: dict[int, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    noise: float = 0.0,
    sam_rho: float = 0.3,
    **args: Any,
) -> Any:
    set_seed(0)
    return sam_trainer(
        Faulty(faults, noise=noise),
        examples(4 * K * UPDATES),
        Trainer if scope is None else SAMTrainer,
        {"callbacks": callbacks or []},
        None if scope is None else {"sam_rho": sam_rho, "sam_scope": scope},
        gradient_accumulation_steps=K,
        max_steps=UPDATES,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        train_sampling_strategy="random",
        **({"enable_jit_checkpoint": True} | args),
    )


def checkpoint(trainer: Any) -> Path:
    (folder,) = Path(trainer.args.output_dir).glob("checkpoint-*")
    assert not (folder / "checkpoint-is-incomplete.txt").exists()
    return folder


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (torch.load(folder / name) for folder in (actual, expected))
        assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def in_backward(hidden: Tensor) -> Tensor:
    hidden.register_hook(strike)
    return hidden


def in_forward(hidden: Tensor) -> Tensor:
    strike()
    return hidden


def moments(scope: str | None) -> dict[str, tuple[dict[int, Any], list[TrainerCallback]]]:
    """The faults and callbacks that bring the signal."""
    inside = {}
    for failing_pass in ("ascent", "descent") if scope else ("ascent",):
        for where, fault in (("forward", in_forward), ("backward", in_backward)):
            for index in (0, K - 1):
                number = (
                    forward_number(failing_pass, scope, index, STRUCK)
                    if scope
                    else K * STRUCK + index
                )
                inside[f"{failing_pass}-{where}-{index}"] = ({number: fault}, [])
    events = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
    return inside | {event: ({}, [At(event)]) for event in events}


def struck_run(scope: str | None, moment: str, noise: float = 0.0, **sam: Any) -> Any:
    faults, callbacks = moments(scope)[moment]
    trainer = build(scope, faults, callbacks, noise, **sam)
    trainer.train()
    assert not trainer.model.faults
    assert trainer.state.global_step == STRUCK + 1  # the optimizer's step is not undone
    return trainer


@functools.cache
def straight(scope: str | None, noise: float = 0.0) -> tuple[Any, Spy]:
    """A run that nothing disturbs, with a checkpoint after each update."""
    spy = Spy()
    trainer = build(
        scope, None, [spy], noise, enable_jit_checkpoint=False, save_strategy="steps", save_steps=1
    )
    trainer.train()
    return trainer, spy


@pytest.mark.parametrize("moment", moments("batch"))
@all_scopes
def test_a_signal_at_any_moment_saves_w_and_resuming_ends_as_if_it_had_never_come(
    scope: str, moment: str
) -> None:
    stopped, (expected, spy) = struck_run(scope, moment), straight(scope)
    is_late = moment in ("on_pre_optimizer_step", "on_optimizer_step")
    name = f"checkpoint-{STRUCK + is_late}"
    assert checkpoint(stopped).name == name
    assert_same_checkpoint(checkpoint(stopped), Path(expected.args.output_dir) / name)
    assert_same_bits(stopped.model, spy.weights[STRUCK])
    resumed = build(scope)
    resumed.train(resume_from_checkpoint=str(checkpoint(stopped)))
    assert resumed.state.global_step == UPDATES
    assert_same_bits(resumed.model, weights(expected.model))
    assert_close(optimizer_state(resumed), optimizer_state(expected), rtol=0, atol=0)
    assert losses(resumed)[-(UPDATES - 2) :] == losses(expected)[-(UPDATES - 2) :]


@pytest.mark.parametrize("moment", ["on_pre_optimizer_step", "on_optimizer_step"])
@pytest.mark.parametrize("scope", [None, "batch", "micro_batch"], ids=["plain", *SCOPES])
def test_with_noise_a_signal_in_the_optimizers_step_is_survived_to_the_last_bit(
    scope: str | None, moment: str
) -> None:
    stopped, (expected, _) = struck_run(scope, moment, noise=0.1), straight(scope, noise=0.1)
    resumed = build(scope, noise=0.1)
    resumed.train(resume_from_checkpoint=str(checkpoint(stopped)))
    assert_same_bits(resumed.model, weights(expected.model))
    assert_close(optimizer_state(resumed), optimizer_state(expected), rtol=0, atol=0)


@slow_unless(moment=lambda moment: "backward" in moment)
@all_scopes
@pytest.mark.parametrize("moment", [name for name in moments("batch") if "scent" in name])
def test_with_noise_a_signal_in_a_pass_saves_what_the_plain_trainer_saves(
    scope: str, moment: str
) -> None:
    # Which is not enough to resume to the last bit: the update's random numbers are drawn, and its
    # running statistics counted, but its optimizer step is not in the checkpoint.
    stopped = struck_run(scope, moment, noise=0.1, sam_rho=TINY_RHO)
    plain = struck_run(None, moment.replace("descent", "ascent"), noise=0.1)
    assert_same_checkpoint(checkpoint(stopped), checkpoint(plain))
    ours, theirs = (
        torch.load(checkpoint(t) / "rng_state.pth", weights_only=False) for t in (stopped, plain)
    )
    assert torch.equal(ours["cpu"], theirs["cpu"])
    assert ours["python"] == theirs["python"]
    assert (ours["numpy"][1] == theirs["numpy"][1]).all() and ours["numpy"][2] == theirs["numpy"][2]


@all_scopes
@pytest.mark.parametrize("every", [45, pytest.param(8, marks=pytest.mark.slow)])
def test_a_signal_at_any_line_saves_w(scope: str, every: int) -> None:
    def run(number: int | None, places: list[str]) -> Any:
        """Train, with the signal before line `number` of the second update."""
        trainer = build(scope)
        step = type(trainer).training_step

        def notice(place: str) -> None:
            if trainer.state.global_step == STRUCK:
                if len(places) == number:
                    strike()
                places.append(place)

        trainer.training_step = lambda *args: watch_lines(lambda: step(trainer, *args), notice)
        trainer.train()
        return trainer

    expected, spy = straight(scope)
    run(None, places := [])
    first = {place: number for number, place in reversed(list(enumerate(places)))}
    assert len(first) > 100
    for place, number in list(first.items())[::every]:
        stopped = run(number, again := [])
        assert again[number] == place
        folder = checkpoint(stopped)
        assert folder.name == f"checkpoint-{STRUCK}", place
        assert_same_checkpoint(folder, Path(expected.args.output_dir) / folder.name)
        assert_same_bits(stopped.model, spy.weights[STRUCK])


@slow_unless(moment=lambda moment: "backward" in moment)
@all_scopes
@pytest.mark.parametrize("moment", [name for name in moments("batch") if "scent" in name])
def test_a_stop_that_a_handler_of_the_users_asks_for_is_not_undone(scope: str, moment: str) -> None:
    faults, callbacks = moments(scope)[moment]
    trainer = build(scope, faults, callbacks, enable_jit_checkpoint=False)

    def stop(*_: Any) -> None:
        trainer.control.should_save = trainer.control.should_training_stop = True

    signal.signal(signal.SIGTERM, stop)
    trainer.train()
    # The Trainer stops after the micro-batch, also where it is not the last one of its update.
    assert trainer.state.global_step <= STRUCK + 1
    assert checkpoint(trainer).name == f"checkpoint-{trainer.state.global_step}"
    assert_same_bits(trainer.model, straight(scope)[1].weights[trainer.state.global_step - 1])

"""A model whose passes fail where they are told to, and trainers that are looked at afterwards."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from combinations import OFTEN, has_two_passes, methods_and_scopes
from tiny import FEATURES, examples, sam_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, set_seed

import sam_hf
from sam_hf import SAMTrainer
from sam_hf.methods import METHODS

K = 3  # micro-batches of an update
# A perturbation that rounding swallows. With it, SAM has to be the plain Trainer, bit for bit.
TINY_RHO = 1e-30

PASSES = ("ascent", "descent")
all_scopes = pytest.mark.parametrize("scope", ["batch", "micro_batch"])
both_passes = pytest.mark.parametrize("failing_pass", PASSES)
all_methods_and_scopes = pytest.mark.parametrize(("method", "scope"), methods_and_scopes())
forward_and_backward = pytest.mark.parametrize("where", ["forward", "backward"])
every_micro_batch = pytest.mark.parametrize("index", range(K))


def _at_micro_batches(*cases: tuple[str, ...]) -> list[tuple[str | int, ...]]:
    """The cases, which begin with a method, with each micro-batch for SAM itself.

    With the middle one alone for the others: they say what e is, and the code that fails is SAM's.
    """
    return [(*case, i) for case in cases for i in (range(K) if case[0] == "sam" else (K // 2,))]


all_methods_at_micro_batches = pytest.mark.parametrize(
    ("method", "scope", "index"), _at_micro_batches(*methods_and_scopes())
)
all_passes_at_micro_batches = pytest.mark.parametrize(
    ("method", "scope", "failing_pass", "index"),
    _at_micro_batches(
        *(
            (method, scope, failing_pass)
            for method, scope in methods_and_scopes(lambda method: method.perturbs)
            # The one pass of a method at w + e counts as an ascent.
            for failing_pass in PASSES[: 1 + has_two_passes(METHODS[method])]
        )
    ),
)

Fault = Callable[[Tensor], Tensor]
Notice = Callable[[str], None]
PACKAGE = str(Path(sam_hf.__file__).parent)


class _Script:
    """Counts every forward pass, in an object that SAM does not take for state of the model."""

    def __init__(self, faults: dict[int, Fault]) -> None:
        self.faults, self.forwards, self.marker = faults, 0, object()


class Faulty(nn.Module):
    """Draws from every generator, keeps running statistics, and fails where it is told to.

    Args:
        faults: for the number of a forward pass, what happens to the hidden layer in it, once.
        noise: 0 for a model without noise and without running statistics.
    """

    def __init__(self, faults: dict[int, Fault] | None = None, noise: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(7, dtype=torch.float64) if noise else nn.Identity()
        self.dropout = nn.Dropout(noise)
        self.second = nn.Linear(7, 3, dtype=torch.float64)
        self.noise = noise
        self._script = _Script(faults or {})

    @property
    def faults(self) -> dict[int, Fault]:
        return self._script.faults

    @faults.setter
    def faults(self, faults: dict[int, Fault]) -> None:
        self._script.faults = faults

    @property
    def forwards(self) -> int:
        return self._script.forwards

    @forwards.setter
    def forwards(self, forwards: int) -> None:
        self._script.forwards = forwards

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        fault = self.faults.pop(self.forwards, None)
        self.forwards += 1
        hidden = self.dropout(torch.tanh(self.norm(self.first(x))))
        hidden = hidden + self.noise * (random.random() + np.random.random())
        logits = self.second(hidden if fault is None else fault(hidden))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def failure(where: str, kind: type[BaseException] = RuntimeError) -> Fault:
    """Raise in the forward pass, or in the backward pass when half of the gradients are there."""

    def in_forward(_: Tensor) -> Tensor:
        raise kind("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def in_backward(hidden: Tensor) -> Tensor:
        hidden.register_hook(in_forward)
        return hidden

    return in_forward if where == "forward" else in_backward


def bad_gradient(value: float) -> Fault:
    """One number of the gradient at the hidden layer is not finite; the loss is."""

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0] = value
        return gradient

    def fault(hidden: Tensor) -> Tensor:
        hidden.register_hook(poison)
        return hidden

    return fault


def options(
    method: str, scope: str, chosen: dict[str, dict[str, Any]] | None = None, **more: Any
) -> dict[str, Any]:
    """Those of a SAM run, of which every update has both passes.

    Args:
        chosen: for some methods, options to be set besides.
    """
    own = (OFTEN if chosen is None else chosen).get(method, {})
    return {"sam_method": method, "sam_scope": scope, **own, **more}


def forward_number(
    failing_pass: str, scope: str, index: int, update: int = 0, steps: int = K, method: str = "sam"
) -> int:
    """Which forward pass of a SAM run is that of micro-batch `index` in that pass of the update."""
    if not has_two_passes(METHODS[method]):
        return steps * update + index
    is_descent = failing_pass == "descent"
    in_update = is_descent * steps + index if scope == "batch" else 2 * index + is_descent
    return 2 * steps * update + in_update


@dataclass
class Snapshot:
    """What a training step leaves."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    generators: list[bytes]
    statistics: dict[str, Tensor]
    counters: dict[str, Any]
    replaced_methods: list[str]
    marker: object = field(
        default_factory=object, compare=False
    )  # no state of the trainer, as above


_REPLACED_FOR_A_RUN = {"floating_point_ops"}


class _Watched:
    """A trainer with a state of its own, that is looked at after every training step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.snapshots: list[Snapshot] = []
        self.metrics: dict[str, list[float]] = {"loss": []}
        self.calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        loss = super().compute_loss(*args, **kwargs)
        self.metrics["loss"].append(loss.item())
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.snapshots.append(self._look())

    def _active_hooks(self) -> list[str]:
        """What would still record or repeat calls of `compute_loss`."""
        training = getattr(self, "_sam_training", None)
        names = ("record", "repeated", "latest", "is_running") if training is not None else ()
        return [name for name in names if getattr(training.calls, name)]

    def _look(self) -> Snapshot:
        parameters = dict(self.model.named_parameters())
        numpy_state = np.random.get_state(legacy=False)["state"]
        return Snapshot(
            weights={name: p.detach().clone() for name, p in parameters.items()},
            gradients={
                name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()
            },
            generators=[
                torch.get_rng_state().numpy().tobytes(),
                pickle.dumps(random.getstate()),
                numpy_state["key"].tobytes() + bytes(str(numpy_state["pos"]), "ascii"),
            ],
            statistics={name: buffer.clone() for name, buffer in self.model.named_buffers()},
            counters={
                "calls": self.calls,
                "metrics": copy.deepcopy(self.metrics),
                "accumulation_steps": self.current_gradient_accumulation_steps,
                "flos": self.current_flos,
                "control": copy.copy(vars(self.control)),
                "logs": len(self.state.log_history),
                "updates": self.state.global_step,
            },
            replaced_methods=[
                name
                for name in vars(self)
                if callable(getattr(type(self), name, None)) and name not in _REPLACED_FOR_A_RUN
            ]
            + self._active_hooks(),
        )


class WatchedTrainer(_Watched, Trainer): ...


class WatchedSAMTrainer(_Watched, SAMTrainer): ...


def watched(
    sam: dict[str, Any] | None,
    faults: dict[int, Fault] | None = None,
    model: nn.Module | None = None,
    **args: Any,
) -> Any:
    """A watched SAM trainer, or a plain one where `sam` is None. All of them start alike."""
    set_seed(0)
    return sam_trainer(
        model or Faulty(faults),
        examples(4 * K * 2),
        WatchedTrainer if sam is None else WatchedSAMTrainer,
        sam=None if sam is None else {"sam_rho": 0.3} | sam,
        **{"gradient_accumulation_steps": K, "max_steps": 2, "optim": "adamw_torch"} | args,
    )


def failed(trainer: Any, kind: type[BaseException] = RuntimeError) -> Snapshot:
    """What a training leaves that is cut short by its fault."""
    with pytest.raises(kind, match="out of memory"):
        trainer.train()
    assert not trainer.model.faults
    assert not _REPLACED_FOR_A_RUN & vars(trainer).keys()
    return trainer.snapshots[-1]


@functools.cache
def undisturbed(method: str | None, scope: str = "") -> list[Snapshot]:
    trainer = watched(method and options(method, scope))
    trainer.train()
    return trainer.snapshots


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        other = actual[name]
        assert (other is None) == (value is None), name
        assert value is None or torch.equal(other, value), f"{name} differs"


def gradients_before(index: int, method: str, scope: str) -> dict[str, Tensor | None]:
    """What the micro-batches before this one have accumulated in an undisturbed run."""
    snapshots = undisturbed(method, scope)
    return snapshots[index - 1].gradients if index else dict.fromkeys(snapshots[0].gradients)


def watch_lines(function: Callable[[], Any], notice: Notice) -> Any:
    """Call `notice` before every line of sam_hf that the function runs."""

    def trace_lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            notice(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return trace_lines

    def trace_calls(frame: FrameType, *_: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        return function()
    finally:
        sys.settrace(before)

"""What must be the same in both passes, and what the second pass must leave as it was.

Four things make the pass at w + e comparable with the pass at w, and invisible afterwards:

* the recorded calls (`Tape`): the same inputs, even if the callee popped or overwrote them;
* the random state (`RandomState`): the same dropout masks and noise;
* the buffers (`BufferGuard`): running statistics are updated once for each batch;
* the trainer's own attributes (`side_effects.SideEffects`): counters and metric lists count once.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .side_effects import undoing, version

_VALUES = (bool, int, float, str, Tensor)


class RandomState:
    """The state of the global generators: torch's on the CPU and on `devices`, Python's, NumPy's.

    Args:
        devices: the accelerators that hold parameters. Their generators' states live on the host,
            so that reading them does not wait for the device.
    """

    def __init__(self, devices: Collection[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._accelerators = [
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        ]
        self._python = random.getstate()
        # SpecAugment masks are drawn with NumPy. It is not imported for this: if nobody did,
        # nobody draws from it.
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def clone_inputs(value: Any) -> Any:
    """A copy that nothing done to the original can reach: containers and tensors are copied.

    Inputs are small beside the activations that are computed from them, so the copy costs little,
    and it lets a callee pop `labels`, or mask its inputs in place, without the replay seeing it.
    Modules and other objects are shared.

    Raises:
        RuntimeError: a tensor was computed with gradients: a copy would cut it off from its origin.
    """
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            raise RuntimeError(
                f"compute_loss was given a tensor of shape {tuple(value.shape)} that was computed "
                "with gradients before the call. The second pass could not compute it again. "
                "Compute it in compute_loss, or set sam_rho=0."
            )
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        duplicate = copy.copy(value)
        if hasattr(duplicate, "__setitem__"):
            for key, item in value.items():
                duplicate[key] = clone_inputs(item)
        return duplicate
    if type(value) in (list, tuple):
        return type(value)(clone_inputs(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(clone_inputs(item) for item in value))
    return value


_SMALL = 10_000


def _values_of(owner: Any) -> dict[str, Any]:
    """Its numbers, texts and tensors as they are now: small tensors may be changed in place."""

    def kept(value: Any) -> Any:
        # What is trained stays the same tensor: its gradient belongs to it.
        if isinstance(value, Tensor) and not value.requires_grad and value.numel() <= _SMALL:
            return value.clone()
        return value

    found = {k: v for k, v in vars(owner).items() if v is None or isinstance(v, _VALUES)}
    return {name: kept(value) for name, value in found.items()}


Cut = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any], float]]
"""``cut(args, kwargs)``: the same arguments for a part of the examples, and which part it is."""


def _loss_in(result: Any) -> Tensor:
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


@dataclass
class RecordedCall:
    """One call: its arguments, and what it found that may decide what it computes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState | None
    """As the call found it; None for a call that was put off."""
    attributes: dict[str, Any]
    """Of the trainer: numbers, texts and tensors, such as coefficients that the calls adapt."""
    num_items_in_batch: Any
    share: float = 1.0
    """The part of its examples that the first pass used."""
    weight: float = 1.0
    """Its part in the pass over its micro-batch."""
    loss: Tensor | None = None
    """What it returned, detached; of the replay, once it was replayed."""
    is_running: bool = False

    @property
    def inputs(self) -> Any:
        """The `inputs` of a recorded `compute_loss(model, inputs, ...)`."""
        return self.kwargs["inputs"] if "inputs" in self.kwargs else self.args[1]

    def make(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function`, and keep the loss that it returns, alone or first in a tuple."""
        self.is_running = True
        try:
            result = function(*args, **kwargs)
        finally:
            self.is_running = False
        loss = _loss_in(result).detach()
        # A copy: the caller may rescale the loss in place. `DataParallel` gives one per device.
        self.loss = loss.mean() if loss.ndim else loss.clone()
        return result

    def repeat(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` as it was called before, whatever it is given now; the loss alone.

        A call from within it is its own affair, and is made as it is asked for.
        """
        if self.is_running:
            return function(*args, **kwargs)
        return _loss_in(self.make(function, *self.args, **self.kwargs))


class Tape:
    """The calls of an update, in their order."""

    def __init__(self, devices: Collection[torch.device]) -> None:
        self._devices = devices
        self._calls: list[RecordedCall] = []

    def __len__(self) -> int:
        return len(self._calls)

    def since(self, start: int) -> list[RecordedCall]:
        """The calls from number `start` on."""
        return self._calls[start:]

    @contextmanager
    def recording(
        self,
        owner: Any,
        function: Callable[..., Any],
        num_items_in_batch: Any,
        cut: Cut | None = None,
    ) -> Iterator[Callable[..., Any]]:
        """Give a function that does what the owner's `function` does, and records its calls.

        With `cut`, `function` gets a part of the examples, and all of them are recorded. A block
        that fails leaves no trace: its gradient is not complete, so it is not replayed.
        """
        before = len(self._calls)

        def recorder(*args: Any, **kwargs: Any) -> Any:
            # A measurement, and no loss to replay; or a part of a call that is recorded already.
            if not torch.is_grad_enabled() or any(call.is_running for call in self.since(before)):
                return function(*args, **kwargs)
            call = RecordedCall(
                clone_inputs(args),
                clone_inputs(kwargs),
                RandomState(self._devices),
                _values_of(owner),
                num_items_in_batch,
            )
            self._calls.append(call)
            if cut is not None:
                args, kwargs, call.share = cut(args, kwargs)
            return call.make(function, *args, **kwargs)

        try:
            yield recorder
        except BaseException:
            del self._calls[before:]
            raise

    def put_off(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a call that was not made, to be made with the others."""
        kept = clone_inputs(args), clone_inputs(kwargs)
        count = kwargs.get("num_items_in_batch")
        self._calls.append(RecordedCall(*kept, None, {}, count, share=0.0))

    def count_recorded(self) -> int:
        """How many of the calls were made."""
        return sum(call.random_state is not None for call in self._calls)

    def take(self) -> list[RecordedCall]:
        """The calls so far; the tape is empty afterwards."""
        calls, self._calls = self._calls, []
        return calls


class BufferGuard:
    """Finds what a forward pass writes, buffers and frozen weights, and undoes such writing.

    A module counts as a writer once a buffer of it was replaced or changed in place between `watch`
    and `preserved`. All buffers of a writer are restored: the kernels of batch norm do not tell
    that they wrote the running mean, but PyTorch's modules count the batches. Other modules that
    have a `running_mean` count as writers while they train. Frozen weights that the first pass of a
    run writes (an average of the trained ones, a teacher) are restored too: the second one would
    write them from w + e.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = [m for m in model.modules() if any(True for _ in m.buffers(recurse=False))]
        self._writers: dict[nn.Module, None] = {}
        self._seen: list[tuple[nn.Module, list[tuple[Tensor, int]]]] = []
        # Looked at in the first update alone: a base under adapters has many.
        self._frozen = [
            p
            for p in model.parameters()
            # Shards and quantized numbers are replaced by others who know what they do.
            if not p.requires_grad and p.is_floating_point() and not hasattr(p, "to_local")
        ]
        self._frozen_seen: list[tuple[int, int]] = []
        self._written: list[Tensor] = []

    def watch(self) -> None:
        """Remember what the buffers are before the first pass."""
        self._frozen_seen = [_state(p) for p in self._frozen]
        self._seen = [(m, _versions(m)) for m in self._owners if m not in self._writers]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Whatever happens to the writers' buffers inside the block is undone at its end."""
        self._writers.update(
            (module, None)
            for module, seen in self._seen
            if _differ(seen, _versions(module))
            or (module.training and "running_mean" in module._buffers)
        )
        self._seen = []
        if self._frozen_seen:
            pairs = zip(self._frozen, self._frozen_seen, strict=True)
            self._written += [p for p, before in pairs if _state(p) != before]
            self._frozen, self._frozen_seen = [], []
        weights = [(p, p.detach().clone()) for p in self._written]
        kept = [
            (module, name, buffer, buffer.clone())
            for module in self._writers
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

        def undo() -> None:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
                for weight, value in weights:
                    weight.copy_(value)

        with undoing(undo):
            yield


def _versions(module: nn.Module) -> list[tuple[Tensor, int]]:
    return [(b, version(b)) for b in module._buffers.values() if b is not None]


def _state(weight: Tensor) -> tuple[int, int]:
    """It changes with what is written in place, and with another tensor in the place of `.data`."""
    return version(weight), weight.data_ptr()


def _differ(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    return len(before) != len(after) or any(
        x is not y or version != now for (x, version), (y, now) in zip(before, after, strict=True)
    )

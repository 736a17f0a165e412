"""The recorded calls of an update, which are replayed at w + e."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .random_state import RandomState
from .state import StateSnapshot


@dataclass
class RecordedCall:
    """A closure that computes a loss and its gradient, and the state when it was first run."""

    closure: Callable[[], Tensor]
    """Runs forward and backward at the current weights; returns the detached loss."""
    random_state: RandomState | None = None
    """At the start of the call; None for a call that was deferred to the descent pass."""
    state: StateSnapshot | None = None
    """At the start of the call."""
    share: float = 1.0
    """Fraction of its examples that the ascent pass used."""
    weight: float = 1.0
    """Fraction of a micro-batch's pass that the call is."""


@dataclass
class CallRecorder:
    """The recorded calls of a scope, in their order."""

    calls: list[RecordedCall] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.calls)

    def take(self) -> list[RecordedCall]:
        """The calls so far; the recorder is empty afterwards."""
        calls, self.calls = self.calls, []
        return calls


class InputKeeper:
    """Keeps the inputs of calls, so that a callee that changes them does not change the replay.

    Containers are copied, since callees pop `labels`. Tensors are shared with the caller, who holds
    them in any case. Those that a callee writes in place are copied: in the first call all are, and
    their version counters show which of them need to be.
    """

    def __init__(self) -> None:
        self._written: set[tuple[Any, ...]] | None = None

    def keep(self, inputs: Any) -> KeptInputs:
        """Inputs for the replay.

        Raises:
            RuntimeError: a tensor was computed with gradients, and a replay cannot recompute it.
        """
        kept = KeptInputs(self)
        kept.value = kept.copy(inputs, ())
        return kept

    @property
    def copies_all(self) -> bool:
        """Whether no call was observed yet."""
        return self._written is None

    def needs_copy(self, path: tuple[Any, ...], tensor: Tensor) -> bool:
        return tensor.requires_grad or self._written is None or path in self._written

    def observe(self, kept: KeptInputs) -> None:
        """After the first pass: note which tensors it wrote."""
        written = {path for path, tensor, version in kept.shared if tensor._version != version}
        if not written and self._written is not None:
            return
        kept.shared = [(path, tensor, tensor._version) for path, tensor, _ in kept.shared]
        if self._written is None:
            self._written = written
            kept.share_unwritten(written)
        elif new := written - self._written:
            self._written |= new
            names = ", ".join(repr(".".join(map(str, path))) for path in sorted(new, key=str))
            warnings.warn(
                f"The loss function wrote into the input {names} in place, for the first time in "
                "this run: in this update the second pass sees the modified input. From now on it "
                "is copied.",
                stacklevel=2,
            )


class KeptInputs:
    """Inputs of one call."""

    def __init__(self, keeper: InputKeeper) -> None:
        self._keeper = keeper
        self.value: Any = None
        self.shared: list[tuple[tuple[Any, ...], Tensor, int]] = []

    def copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if value is None or isinstance(value, nn.Module):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if type(value) is dict:
            return {key: self.copy(item, (*path, key)) for key, item in value.items()}
        if type(value) is not tuple and isinstance(value, Mapping):  # a slow check
            duplicate = copy.copy(value)
            if hasattr(duplicate, "__setitem__"):
                for key, item in value.items():
                    duplicate[key] = self.copy(item, (*path, key))
            return duplicate
        if type(value) in (list, tuple):
            return type(value)([self.copy(item, (*path, i)) for i, item in enumerate(value)])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.copy(item, (*path, i)) for i, item in enumerate(value)))
        return value

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        if value.grad_fn is not None:
            raise RuntimeError(
                f"The loss function reads a tensor of shape {tuple(value.shape)} that was computed "
                "with gradients before the call. The second pass cannot recompute it. "
                "Compute it in the loss function (compute_loss, or the closure of sam.backward), "
                "detach it if it is a constant, or set sam_rho=0."
            )
        if not value.is_inference():  # PyTorch does not count writes to those
            self.shared.append((path, value, value._version))
            if not self._keeper.needs_copy(path, value):
                return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    def share_unwritten(self, written: set[tuple[Any, ...]]) -> None:
        """Free the copies of tensors that turned out not to be written."""
        originals = {path: t for path, t, _ in self.shared if path not in written}
        self.value = _replaced(self.value, originals, ())


def _replaced(value: Any, originals: dict[tuple[Any, ...], Tensor], path: tuple[Any, ...]) -> Any:
    if isinstance(value, Tensor):
        original = originals.get(path, value)
        return value if original.requires_grad else original
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        for key in list(value):
            value[key] = _replaced(value[key], originals, (*path, key))
    elif type(value) in (list, tuple):
        return type(value)(_replaced(v, originals, (*path, i)) for i, v in enumerate(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(v, originals, (*path, i)) for i, v in enumerate(value)))
    return value

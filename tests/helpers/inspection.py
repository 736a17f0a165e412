"""What an object holds, all the way down, for comparing it before and after."""

from __future__ import annotations

from collections import deque
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_hf.engine.update import UpdateEngine

# Large, and nobody's counters: the model, what its data come from, and the clock of its logs.
_SKIPPED = (
    nn.Module,
    torch.optim.Optimizer,
    torch.utils.data.Dataset,
    torch.utils.data.DataLoader,
    torch.Generator,
)
_SKIPPED_NAMES = ("datasets.", "tokenizers.", "threading", "_thread", "logging")


def snapshot(owner: Any) -> dict[str, Any]:
    """The numbers, texts and tensors that can be reached from an object, by their path."""
    found: dict[str, Any] = {}
    _enter(owner, "", found, set())
    return found


def changes_in_second_passes(trainer: Any, monkeypatch: Any) -> list[set[str]]:
    """For each second pass of a run: what of the trainer it has left changed, by its path.

    Returns:
        A list that is filled while the trainer trains.
    """
    replay, changes = UpdateEngine._replay, []

    def look() -> dict[str, Any]:
        # What SAM itself keeps holds references to all else.
        return snapshot({k: v for k, v in vars(trainer).items() if not k.startswith("_sam_")})

    def watched(*args: Any) -> Tensor:
        before = look()
        loss = replay(*args)
        after = look()
        changes.append({k for k in before.keys() | after if before.get(k) != after.get(k)})
        return loss

    monkeypatch.setattr(UpdateEngine, "_replay", watched)
    return changes


def _enter(value: Any, path: str, found: dict[str, Any], seen: set[int]) -> None:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum)):
        found[path] = value
    elif isinstance(value, np.ndarray):
        found[path] = value.tolist() if value.size < 5000 else value.shape
    elif isinstance(value, Tensor):
        found[path] = (value.dtype, value.tolist()) if value.numel() < 5000 else value.shape
    elif (
        id(value) in seen
        or isinstance(value, (*_SKIPPED, type, FunctionType, MethodType))
        or type(value).__module__.startswith(_SKIPPED_NAMES)
    ):
        return
    elif isinstance(value, dict):
        seen.add(id(value))
        found[path] = len(value)
        for key, item in value.items():
            _enter(item, f"{path}[{key!r}]", found, seen)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        seen.add(id(value))
        found[path] = len(value)
        for i, item in enumerate(value):
            _enter(item, f"{path}[{i}]", found, seen)
    else:
        seen.add(id(value))
        slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ())]
        names = [*getattr(value, "__dict__", {}), *(s for s in slots if hasattr(value, s))]
        for name in names:
            _enter(getattr(value, name, None), f"{path}.{name}", found, seen)

"""What a block of code did to objects, undone at its end, however it ends."""

from __future__ import annotations

import copy
import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Tensors up to this size are taken for counters and running means, and are restored by value.
_SMALL_TENSOR = 1024
# Longer containers are taken for data: their entries are restored, what those hold is not.
_LONG_CONTAINER = 256
# These types and no subclasses, which may forbid what a restore does (`ModelOutput.update` raises).
_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)
# What an object may hold beside them and still be taken for a meter or a metric.
_NUMBERS = (bool, int, float, complex, str, bytes, tuple, Tensor, torch.device, torch.dtype)
_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, functools.partial)


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` at the end of the block, however it ends.

    An interrupt (Ctrl-C) may come in the middle of `undo`, or between `finally` and its first line:
    then it is called again. It must bear that.
    """
    is_undone = False
    try:
        try:
            yield
        finally:
            undo()
            is_undone = True
    finally:
        if not is_undone:
            undo()


class SideEffects:
    """Puts the attributes of some objects back to what they were, as deep as plain values go.

    Rebound attributes, grown or changed lists, dictionaries, sets and deques, and small tensors
    that were changed in place are restored, also in objects that hold nothing else: meters and
    metrics. Other objects are not entered: models, data sets, optimizers and callbacks stay as they
    are.

    Args:
        owners: the objects. The attributes of the first one are followed, those of the others only
            rebound.
        skip: names of attributes that are data, not state.
    """

    def __init__(self, *owners: Any, skip: Collection[str] = ()) -> None:
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
        self._contents: dict[int, tuple[Any, Any]] = {id(owner): (None, ()) for owner in owners}
        for name, value in self._attributes[0][1].items():
            if name not in skip:
                self._keep(value)

    def _keep(self, value: Any) -> None:
        if id(value) in self._contents:
            return
        if isinstance(value, Tensor):
            if value.numel() <= _SMALL_TENSOR:
                self._contents[id(value)] = (value, (value._version, value.detach().clone()))
        elif type(value) in _CONTAINERS:
            self._contents[id(value)] = (value, copy.copy(value))
            if len(value) <= _LONG_CONTAINER:
                for item in value.values() if isinstance(value, dict) else value:
                    self._keep(item)
        elif isinstance(value, tuple) and len(value) <= _LONG_CONTAINER:
            for item in value:
                self._keep(item)
        elif _is_meter(value):
            attributes = vars(value)
            self._contents[id(value)] = (attributes, dict(attributes))
            for item in attributes.values():
                self._keep(item)

    def restore(self) -> None:
        for attributes, kept in self._attributes:
            for name in attributes.keys() - kept.keys():
                del attributes[name]
            attributes.update(kept)
        for value, kept in self._contents.values():
            if isinstance(value, Tensor):
                version, content = kept
                if value._version != version:
                    with torch.no_grad():
                        value.copy_(content)
            elif value is not None and not _same(value, kept):
                value.clear()
                if isinstance(value, (dict, set)):
                    value.update(kept)
                else:
                    value.extend(kept)


def _is_meter(value: Any) -> bool:
    """Whether an object holds plain values alone: numbers, text, tensors, containers, functions."""
    if isinstance(value, (*_CODE, torch.optim.Optimizer)):
        return False
    if isinstance(value, nn.Module) and any(True for _ in value.parameters()):
        return False  # a model; torchmetrics' metrics are modules too
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and all(
        item is None or isinstance(item, (*_NUMBERS, *_CONTAINERS, *_CODE))
        for item in attributes.values()
    )


def _same(container: Any, kept: Any) -> bool:
    """Whether a container still holds the same objects, in the same order."""
    if len(container) != len(kept):
        return False
    if isinstance(container, set):
        return bool(container == kept)
    if isinstance(container, dict):
        pairs = zip(container.items(), kept.items(), strict=True)
        return all(k is kept_k and v is kept_v for (k, v), (kept_k, kept_v) in pairs)
    return all(item is kept_item for item, kept_item in zip(container, kept, strict=True))


@contextmanager
def shadowed(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Put functions in the place of methods, on this object alone, for the length of a block."""
    attributes = vars(owner)
    before = {name: attributes[name] for name in functions if name in attributes}

    def undo() -> None:
        for name in functions:
            attributes.pop(name, None)
        attributes.update(before)

    with undoing(undo):
        attributes.update(functions)
        yield

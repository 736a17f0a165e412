"""What a block of code did to objects, undone at its end, however it ends."""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Tensors and arrays up to this size are taken for counters and running means, and restored.
_SMALL = 1024
# Longer containers are taken for data: their entries are restored, what those hold is not. Of very
# long ones no copy is made; what was appended to a list goes again.
_LONG = 256
_VERY_LONG = 65536
# These types and no subclasses, which may forbid what a restore does (`ModelOutput.update` raises).
_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)
# What an object may hold beside them and still be taken for a meter or a metric.
_NUMBERS: tuple[type, ...] = (bool, int, float, complex, str, bytes, Enum, PurePath, tuple, Tensor)
_NUMBERS += (torch.device, torch.dtype)
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

    Rebound attributes, grown or changed lists, dictionaries, sets and deques, and small tensors and
    arrays that were changed in place are restored, also in objects that hold nothing else: meters
    and metrics. Other objects are not entered: models, data sets, optimizers and callbacks stay as
    they are. So do containers that another thread writes while they are copied.

    Args:
        owners: the objects. The attributes of the first one are followed, those of the others only
            rebound.
        skip: names of attributes that are data, not state.
    """

    def __init__(self, *owners: Any, skip: Collection[str] = ()) -> None:
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
        self._contents: list[tuple[Any, Any]] = []
        self._seen = {id(owner) for owner in owners}
        for name, value in self._attributes[0][1].items():
            if name not in skip:
                self._keep(value)

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        inside: Any = ()
        if isinstance(value, Tensor):
            if value.numel() <= _SMALL:
                self._contents.append((value, (version(value), value.detach().clone())))
        elif _is_array(value):
            if value.size <= _SMALL:
                self._contents.append((value, value.copy()))
        elif type(value) in _CONTAINERS:
            self._keep_container(value)
            inside = value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            inside = value
        elif _is_meter(value):
            self._keep_container(vars(value))
            inside = vars(value).values()
        if len(inside) > _LONG:
            return
        items: tuple[Any, ...] = ()
        with suppress(RuntimeError):  # another thread writes to it: it is left to that
            items = tuple(inside)
        for item in items:
            self._keep(item)

    def _keep_container(self, value: Any) -> None:
        if len(value) <= _VERY_LONG:
            with suppress(RuntimeError):  # as above
                self._contents.append((value, copy.copy(value)))
        elif isinstance(value, list):
            self._contents.append((value, len(value)))

    def restore(self) -> None:
        for attributes, kept in self._attributes:
            for name in attributes.keys() - kept.keys():
                del attributes[name]
            attributes.update(kept)
        for value, kept in self._contents:
            if isinstance(value, Tensor):
                _write_back(value, *kept)
            elif _is_array(value):
                value[...] = kept
            elif isinstance(kept, int):
                del value[kept:]
            elif not _same(value, kept):
                value.clear()
                if isinstance(value, (dict, set)):
                    value.update(kept)
                else:
                    value.extend(kept)


def _write_back(value: Tensor, seen: int, content: Tensor) -> None:
    if value.is_inference():
        with torch.inference_mode():
            value.copy_(content)
    elif version(value) != seen:
        with torch.no_grad():
            if value.shape != content.shape:
                value.resize_(content.shape)
            value.copy_(content)


def version(value: Tensor) -> int:
    """How often a tensor was written in place; 0 where torch does not count it."""
    return 0 if value.is_inference() else value._version


def _is_array(value: Any) -> bool:
    """Whether this is an array of NumPy, which is not imported for this."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_meter(value: Any) -> bool:
    """Whether an object holds plain values alone: numbers, text, tensors, containers, functions."""
    if isinstance(value, (*_CODE, torch.optim.Optimizer)):
        return False
    if isinstance(value, nn.Module) and any(True for _ in value.parameters()):
        return False  # a model; torchmetrics' metrics are modules too
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and all(
        item is None or isinstance(item, (*_NUMBERS, *_CONTAINERS, *_CODE)) or _is_array(item)
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

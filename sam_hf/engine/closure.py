"""Closures of training loops, replayed with the variables of the first pass."""

from __future__ import annotations

import dis
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .state import call_and_restore

_SHORT = 64  # longer containers are not searched for tensors and functions


class ClosureKeeper:
    """Keeps closures for the replay.

    A loop rebinds its variables (`batch`) before the update is complete, and a closure may change
    what it refers to (``batch.pop("labels")``). For the replay, the variables of the closure, and
    of the functions and objects that it refers to, are rebound to their values in the first pass,
    and afterwards to their current ones. The contents of containers are restored by a
    `StateTracker` with the owner `variables`; tensors written in place are restored here.

    Args:
        budget: bytes of inputs that may be copied in a call of the first update. Later, only those
            are copied that a closure or the loop writes, according to their version counters.

    Attributes:
        is_first: whether the first update is still incomplete.
        variables: an owner for the tracker, with the values that the latest closure refers to.
    """

    def __init__(self, budget: int) -> None:
        self.variables = SimpleNamespace(values=())
        self._budget = budget
        self.written: set[str] = set()  # paths of inputs that are copied
        self.is_first = True

    def keep(self, closure: Callable[[], Any]) -> KeptClosure:
        """
        Raises:
            RuntimeError: the closure reads from an iterator, or from a tensor with a graph.
        """
        search = _Search(closure)
        self.variables.values = search.values
        room, inputs = self._budget, list[_Input]()
        for path, tensor in search.tensors.items():
            is_copied = path in self.written
            if self.is_first and tensor.nbytes <= room:
                room, is_copied = room - tensor.nbytes, True
            copy = tensor.detach().clone() if is_copied else None
            inputs.append(_Input(path, tensor, copy, tensor._version))
        return KeptClosure(closure, search, inputs, self)


@dataclass
class _Input:
    """A tensor that a closure reads, and a copy of its value in the first pass."""

    path: str
    tensor: Tensor
    copy: Tensor | None
    version: int
    is_written: bool = False

    @property
    def is_changed(self) -> bool:
        return self.tensor._version != self.version


class KeptClosure:
    """A closure with its variables in the first pass."""

    def __init__(
        self,
        closure: Callable[[], Any],
        search: _Search,
        inputs: list[_Input],
        keeper: ClosureKeeper,
    ) -> None:
        self._closure, self._inputs, self._keeper = closure, inputs, keeper
        self._cells, self._namespaces = search.cells, search.namespaces
        self._values = search.values  # the tracker forgets unreferenced objects

    def observe(self) -> None:
        """Learn which inputs were written since they were kept or observed."""
        written = [x for x in self._inputs if x.is_changed]
        self._keeper.written.update(x.path for x in written)
        if lost := sorted(x.path for x in written if x.copy is None):
            warnings.warn(
                f"The input {', '.join(map(repr, lost))} of a closure was written in place, for "
                "the first time in this run: in this update the second pass sees the modified "
                "input. From now on it is copied.",
                stacklevel=2,
            )
        for x in written:
            x.is_written, x.version = True, x.tensor._version

    def replay(self, backward: Callable[[Callable[[], Any]], Tensor]) -> Tensor:
        """Call ``backward(closure)`` with the variables that the first pass found."""
        by_the_loop = [x for x in self._inputs if x.copy is not None and x.is_changed]
        self.observe()
        tensors = [(x.tensor, x.tensor.detach().clone()) for x in by_the_loop]
        cells = [(cell, _content(cell)) for cell, _ in self._cells]
        namespaces = [
            (names, {name: names.get(name, _UNSET) for name in found})
            for names, found in self._namespaces
        ]

        def undo() -> None:
            _bind(cells, namespaces)
            with torch.no_grad():
                for tensor, content in tensors:
                    tensor.copy_(content)

        def run() -> Tensor:
            _bind(self._cells, self._namespaces)
            with torch.no_grad():
                for x in self._inputs:
                    if x.copy is not None and x.is_written:
                        x.tensor.copy_(x.copy)
            return backward(self._closure)

        return call_and_restore(run, undo)


_UNSET = object()
Cells = list[tuple[CellType, Any]]
Namespaces = list[tuple[dict[str, Any], dict[str, Any]]]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _UNSET


def _bind(cells: Cells, namespaces: Namespaces) -> None:
    for cell, value in cells:
        if value is not _UNSET:
            cell.cell_contents = value
        elif _content(cell) is not _UNSET:
            del cell.cell_contents
    for names, values in namespaces:
        for name, value in values.items():
            if value is not _UNSET:
                names[name] = value
            else:
                names.pop(name, None)


class _Search:
    """The variables of a closure, of the functions that it refers to, and of its objects.

    Attributes:
        cells, namespaces: each with its bindings; of a namespace, the names that are read.
        values: containers, modules, generators and other objects among them.
        tensors: by the names that lead to them.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        self.cells: Cells = []
        self.namespaces: Namespaces = []
        self.values: list[Any] = []
        self.tensors: dict[str, Tensor] = {}
        self._seen: set[int] = set()
        self._module = getattr(closure, "__module__", None)
        self._visit(closure, "", is_variable=True)

    def _visit(self, value: Any, path: str, is_variable: bool = False) -> None:
        """`is_variable`: of a function, and not an item or an attribute."""
        if value is None or isinstance(value, (bool, int, float, str, type, ModuleType)):
            return
        if isinstance(value, Tensor):
            self._add_tensor(value, path)
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self.values.append(value)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, functools.partial):
            self._visit(value.func, path)
            self._visit((value.args, value.keywords), path)
        elif isinstance(value, MethodType):
            self._visit(value.__func__, path)
            self._visit(value.__self__, f"{path}.self", is_variable=True)
        elif type(value) is dict or isinstance(value, (list, tuple, Mapping)):
            self.values.append(value)
            if len(value) <= _SHORT:
                items = value.items() if isinstance(value, Mapping) else enumerate(value)
                for key, item in list(items):
                    self._visit(item, f"{path}.{key}")
        elif is_variable and isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise RuntimeError(
                f"The closure reads from {path!r}, a {type(value).__name__}, from which the second "
                "pass would get the next item. Fetch the batch before sam.backward."
            )
        else:
            self.values.append(value)
            is_own = type(value).__module__ == self._module and hasattr(value, "__dict__")
            if is_variable and is_own:  # not objects nested in it
                self.namespaces.append((vars(value), dict(vars(value))))
                for name, item in list(vars(value).items()):
                    self._visit(item, f"{path}.{name}")

    def _visit_function(self, function: FunctionType) -> None:
        names, written = _global_names(function.__code__)
        is_own = function.__module__ == self._module
        if not (is_own or function.__closure__):
            return  # a library function
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            value = _content(cell)
            self.cells.append((cell, value))
            if name not in written:  # otherwise an earlier call may have left it there
                self._visit(value, name, is_variable=True)
        if is_own:
            scope = function.__globals__
            found = {
                name: scope.get(name, _UNSET) for name in names if name in scope or name in written
            }
            self.namespaces.append((scope, found))
            for name, value in found.items():
                if name not in written:
                    self._visit(value, name, is_variable=True)
        for name, value in _defaults(function):
            self._visit(value, name, is_variable=True)
        if function.__dict__:
            self.values.append(function.__dict__)
            self._visit(function.__dict__.get("__wrapped__"), "")

    def _add_tensor(self, tensor: Tensor, path: str) -> None:
        if tensor.grad_fn is not None:
            raise RuntimeError(
                f"The closure reads {path!r}, a tensor of shape {tuple(tensor.shape)} that was "
                "computed with gradients before the call, and that the second pass cannot "
                "recompute. Compute it in the closure, or detach it if it is a constant."
            )
        if not isinstance(tensor, nn.Parameter) and not tensor.is_inference():
            self.tensors.setdefault(path, tensor)


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The arguments that have a default, with the default."""
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    yield from zip(names, values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Globals that a function and those defined in it refer to; globals and cells they assign."""
    read, written = set[str](), set[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            read.add(instruction.argval)
        if instruction.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            written.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            inner_read, inner_written = _global_names(inner)
            read |= inner_read
            written |= inner_written
    return frozenset(read), frozenset(written)


def loss_of(result: Any) -> Tensor:
    """The loss that a closure returned: a tensor, or the `.loss` of a model's output.

    Raises:
        TypeError: it returned no loss.
        ValueError: the loss is not one number, or no parameter has contributed to it.
    """
    loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        what = (
            "nothing (is a `return` missing?)" if result is None else f"a {type(result).__name__}"
        )
        raise TypeError(
            f"The closure of sam.backward returned {what}. Allowed: the loss as a tensor, or a "
            "model's output with a loss (transformers computes it where `labels` are given)."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"The closure of sam.backward returned a loss of shape {tuple(loss.shape)}. Allowed: "
            "one number, such as loss.mean()."
        )
    if not loss.requires_grad:
        where = "" if torch.is_grad_enabled() else " (gradients are disabled: torch.no_grad)"
        raise ValueError(
            f"The closure of sam.backward returned a loss without a graph{where}: compute it from "
            "the model inside the closure, and do not detach it."
        )
    return loss

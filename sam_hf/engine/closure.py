"""The user's closures: replayed with the variables that the first pass found."""

from __future__ import annotations

import dis
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, GeneratorType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .recorder import InputKeeper, KeptInputs

# Consumed by reading: a replay would read the next item.
_ITERATORS = (GeneratorType, zip, map, enumerate, filter, _BaseDataLoaderIter)
_LONG = 4096  # longer containers are data: shared, not copied


@dataclass
class _Variables:
    """The variables that a function reads, by name: cells, globals and defaults."""

    function: FunctionType
    kept: dict[str, Any] = field(default_factory=dict)  # copied as inputs are
    shared: dict[str, Any] = field(default_factory=dict)


class ClosureKeeper:
    """Keeps closures for the replay.

    A loop rebinds its variables (`batch`) before the update is complete, and a closure may change
    what it refers to (``batch.pop("labels")``). The replay therefore runs a copy of the function
    whose variables are those that the first pass found: containers are copied, tensors and
    everything else shared, as for the inputs of a Trainer's loss function. What the copy assigns to
    its variables stays its own, so that a closure's side effects on them happen once.

    Copied are the closure and the functions of its module that it refers to.

    Attributes:
        modules: those that closures refer to (a teacher, a discriminator), as attributes.
    """

    def __init__(self) -> None:
        self._inputs = InputKeeper()
        self.modules = SimpleNamespace()

    @property
    def copies_all(self) -> bool:
        """Whether no pass was observed yet."""
        return self._inputs.copies_all

    def keep(self, closure: Callable[[], Any]) -> KeptClosure:
        """
        Raises:
            RuntimeError: the closure reads from an iterator, or from a tensor with a graph.
        """
        whole, partials = closure, list[Any]()
        while isinstance(whole, functools.partial):
            partials.append((list(whole.args), whole.keywords))
            whole = whole.func
        functions: dict[int, _Variables] = {}
        if isinstance(whole, FunctionType):
            self._collect(whole, functions)
        variables = {_place(v.function): v.kept for v in functions.values()}
        kept = self._inputs.keep((variables, partials))
        return KeptClosure(self._inputs, whole, functions, kept)

    def _collect(self, function: FunctionType, functions: dict[int, _Variables]) -> None:
        variables = functions[id(function)] = _Variables(function)
        written = _assigned_names(function.__code__)
        for name, value in _read(function):
            if name in written:  # the copy's own, whatever an earlier call has left there
                pass
            elif isinstance(value, FunctionType):
                if value.__globals__ is function.__globals__ and id(value) not in functions:
                    self._collect(value, functions)
            elif isinstance(value, _ITERATORS):
                raise RuntimeError(
                    f"The closure reads from {name!r}, a {type(value).__name__}, of which the "
                    "second pass would get the next item. Take the batch before sam.backward."
                )
            elif isinstance(value, nn.Module):
                setattr(self.modules, str(id(value)), value)
            elif isinstance(value, Tensor):
                if not isinstance(value, nn.Parameter):
                    variables.kept[name] = value
                    continue
            elif isinstance(value, (Mapping, list, tuple)) and len(value) <= _LONG:
                variables.kept[name] = value
                continue
            elif isinstance(value, (set, deque)):
                value = value.copy()
            variables.shared[name] = value


class KeptClosure:
    """A closure with the variables that it found. It can be called once."""

    def __init__(
        self,
        keeper: InputKeeper,
        function: Callable[..., Any],
        functions: dict[int, _Variables],
        kept: KeptInputs,
    ) -> None:
        self._keeper, self._function = keeper, function
        self._functions, self._kept = functions, kept

    def observe(self) -> None:
        """After a pass: learn which tensors the closure writes in place."""
        self._keeper.observe(self._kept)

    def __call__(self) -> Any:
        self.observe()
        variables, partials = self._kept.value
        copies: dict[int, FunctionType] = {}
        for i, v in self._functions.items():
            code, found = v.function.__code__, v.function.__globals__
            scope: dict[str, Any] = {"__builtins__": found["__builtins__"]}
            cells = tuple([CellType() for _ in code.co_freevars])
            copies[i] = FunctionType(code, scope, code.co_name, closure=cells)
        for i, v in self._functions.items():
            copy, code = copies[i], v.function.__code__
            values = {**v.shared, **variables[_place(v.function)]}
            for name, value in values.items():
                values[name] = copies.get(id(value), value)
            for name, cell in zip(code.co_freevars, copy.__closure__ or (), strict=True):
                if name in values:
                    cell.cell_contents = values[name]
            copy.__globals__.update((n, values[n]) for n in _global_names(code) if n in values)
            copy.__defaults__ = tuple(values[n] for n in _default_names(v.function)) or None
            keywords = v.function.__kwdefaults__ or ()
            copy.__kwdefaults__ = {name: values[name] for name in keywords} or None
        function: Callable[..., Any] = copies.get(id(self._function), self._function)
        for args, keywords in reversed(partials):
            function = functools.partial(function, *args, **keywords)
        return function()


def _place(function: FunctionType) -> str:
    """Tells the functions of a loop apart, and is the same in every update."""
    return f"{function.__name__}:{function.__code__.co_firstlineno}"


def _default_names(function: FunctionType) -> tuple[str, ...]:
    """The positional arguments that have a default."""
    code, count = function.__code__, len(function.__defaults__ or ())
    return code.co_varnames[code.co_argcount - count : code.co_argcount]


def _read(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of a function, by name; unset ones are left out."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    scope = function.__globals__
    for name in _global_names(code):
        if name in scope:
            yield name, scope[name]
    yield from zip(_default_names(function), function.__defaults__ or (), strict=True)
    yield from (function.__kwdefaults__ or {}).items()


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """Names that a function and those defined in it may read as globals."""
    nested = (c for c in code.co_consts if isinstance(c, CodeType))
    return tuple({*code.co_names, *(name for c in nested for name in _global_names(c))})


@functools.lru_cache(maxsize=1024)
def _assigned_names(code: CodeType) -> frozenset[str]:
    """Global and nonlocal names that a function assigns."""
    stores = ("STORE_GLOBAL", "STORE_DEREF")
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in stores)


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

"""Captures and restores the state, besides gradients, that a training pass reads and writes.

The pass at w + e repeats a pass at w. Counters, metric lists, running statistics, memory banks and
the like must change once for each batch, and the repeated pass must find them as the first pass
found them.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Pairs = list[tuple[Any, Any]]
# Exact types: subclasses may forbid what restoring does (`ModelOutput.update` raises).
_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)
# Attributes, in addition to containers and arrays, of objects that count as meters or metrics.
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_PLAIN = (*_SCALARS, Enum, PurePath, tuple, Tensor, torch.device, torch.dtype)
_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, functools.partial)
# Longer containers are copied only if a pass was seen to change their entries: what it appends is
# known from the length.
_LONG = 4096
# Entries of longer containers are not visited at all: they are data.
_VERY_LONG = 65536
# Larger tensors are copied only if passes write them.
_SMALL_BYTES = 65536


@contextmanager
def always_restore(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` at the end of the block, however it ends.

    An interrupt (Ctrl-C) may come in the middle of `undo`, or between `finally` and its first line:
    then it is called again. It must be idempotent.
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


def call_and_restore(function: Callable[[], T], undo: Callable[[], None]) -> T:
    """As `always_restore` around the call of a function, at a tenth of its cost."""
    is_undone = False
    try:
        try:
            return function()
        finally:
            undo()
            is_undone = True
    finally:
        if not is_undone:
            undo()


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of one object, such as functions in place of its methods, during the block."""
    namespace = vars(owner)
    before = {name: namespace[name] for name in attributes if name in namespace}

    def undo() -> None:
        for name in attributes:
            namespace.pop(name, None)
        namespace.update(before)

    with always_restore(undo):
        namespace.update(attributes)
        yield


class StateTracker:
    """Finds the state that a pass may write, and captures what passes do write.

    Tracked are the attributes of the owners; the containers, meters (objects that hold plain
    values), tensors, arrays and random generators in them; and the buffers, frozen weights and
    attributes of modules: those given, and those that an owner holds, such as a teacher. Other
    objects (datasets, optimizers, callbacks) are not entered.

    What exists is found once, by walking everything. The first capture copies all of it. After
    that, large tensors and long containers are copied only if passes write them, which `observe`
    learns from the first pass by comparison, and later from version counters and lengths.

    Args:
        owners: objects whose attributes are tracked.
        modules: modules whose buffers, frozen weights and attributes are tracked.
        skip: names of attributes of the owners that are not state.
        ignored: modules, and trained parameters, that are not tracked even if an owner holds them.
        variables: an owner with one attribute, `values`, that is replaced as a whole. Its tensors
            are not tracked, but those of modules among them are.
    """

    def __init__(
        self,
        owners: Iterable[Any],
        modules: Iterable[nn.Module] = (),
        skip: Collection[str] = (),
        ignored: Iterable[Any] = (),
        variables: Any = None,
    ) -> None:
        self.skip = frozenset(skip)
        self._roots = [_Attributes(vars(owner), self.skip) for owner in owners]
        self._variables = variables
        self._latest_values: Any = None
        if variables is not None:
            self._roots.append(_Attributes(vars(variables), frozenset()))
        # Ids of containers.
        self._of_roots = {id(self._roots[-1])} if variables is not None else set[int]()
        self._without_tensors = set(self._of_roots)
        self._modules, self._ignored = list(modules), list(ignored)
        self._rewritten: set[int] = set()  # ids of long containers
        self._is_first = True
        self._large_frozen: list[Tensor] = []
        self._walk()
        self._is_searching = True  # what an owner gets before the first pass is found too

    def _walk(self) -> None:
        """Find everything that there is."""
        self._is_searching = True  # until it is done, which an interrupt may prevent
        self._skips_tensors = False
        self._seen = {id(x) for x in (*(root.namespace for root in self._roots), *self._ignored)}
        self._of_modules: dict[int, _Attributes] = {}  # by the module's id
        self._of_layers: set[int] = set()  # ids of those of PyTorch's layers
        self._containers: list[Any] = [*self._roots]
        # What the latest search found in each of them.
        self._contents: list[Any] = []
        self._ids: list[Any] = []
        self._copied: list[Tensor] = []
        self._watched: list[Tensor] = []  # large ones that no pass was seen to write
        self._arrays: list[Any] = []
        self._large_arrays: list[Any] = []
        self._generators: list[Any] = []
        self._found = (
            self._copied,
            self._watched,
            self._containers,
            self._arrays,
            self._generators,
        )
        for module in self._modules:
            self._add_module(module)
        for root in self._roots:
            self._visit_all(root.values(), root)
        frozen: list[Tensor] = [t for t in self._watched if isinstance(t, nn.Parameter)]
        trained = sum(x.nbytes for x in self._ignored if isinstance(x, nn.Parameter))
        # A copy of a base model under adapters would not fit the memory budget: their norms show
        # whether the first pass writes them.
        self._large_frozen = frozen if sum(t.nbytes for t in frozen) > trained else []
        self._is_searching = False

    # ---- Finding the state -------------------------------------------------------------------

    def _visit(self, value: Any) -> None:
        if isinstance(value, _CODE) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            if not self._skips_tensors:
                self._add_tensor(value)
        elif _is_array(value):
            self._seen.add(id(value))
            if value.flags.writeable:
                is_known = value.nbytes <= _SMALL_BYTES or not self._is_first
                (self._arrays if is_known else self._large_arrays).append(value)
        elif type(value) in _CONTAINERS:
            self._add_container(value)
        elif isinstance(value, tuple):
            self._visit_all(value)
        elif isinstance(value, nn.Module):
            skips, self._skips_tensors = self._skips_tensors, False
            for module in value.modules():
                self._add_module(module)
            self._skips_tensors = skips
        elif get_generator_state(value) is not None:
            self._seen.add(id(value))
            self._generators.append(value)
        elif _is_meter(value):
            self._add_container(vars(value))

    def _visit_all(self, values: Iterable[Any], container: Any = None) -> None:
        skips = self._skips_tensors
        self._skips_tensors |= id(container) in self._without_tensors
        try:
            for value in tuple(values):
                self._visit(value)
        except RuntimeError:  # another thread writes to it: left to that thread
            return
        finally:
            self._skips_tensors = skips

    def _add_container(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._containers.append(value)
        if self._skips_tensors:
            self._without_tensors.add(id(value))
        if len(value) > _LONG and not self._is_first:
            self._rewritten.add(id(value))  # unknown, since it appeared after the first pass
        if len(value) <= _VERY_LONG:
            self._visit_all(value.values() if isinstance(value, dict) else value)

    def _add_tensor(self, tensor: Tensor) -> None:
        is_computed = tensor.grad_fn is not None
        is_sharded = hasattr(tensor, "to_local")  # a DTensor: FSDP2 manages it
        if not (id(tensor) in self._seen or is_computed or is_sharded or tensor.is_meta):
            self._seen.add(id(tensor))
            # The kernels of batch norm do not count that they write the running statistics: small
            # tensors are copied whether they are written or not.
            is_small = tensor.nbytes <= _SMALL_BYTES and not isinstance(tensor, nn.Parameter)
            (self._copied if is_small else self._watched).append(tensor)

    def _add_module(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if any(b is not None for b in module._buffers.values()):
            self._add_container(module._buffers)
        for p in module._parameters.values():
            if p is not None and p.is_floating_point():
                self._add_tensor(p)
        if not _is_wrapper(module):
            attributes = _Attributes(vars(module), _OF_EVERY_MODULE)
            self._of_modules[id(module)] = attributes
            self._containers.append(attributes)
            if _is_a_layer_of_pytorch(module):
                self._of_layers.add(id(attributes))
            for value in attributes.values():
                if not isinstance(value, nn.Module):
                    self._visit(value)

    # ---- What a pass writes ------------------------------------------------------------------

    def capture(self, since: StateSnapshot | None = None) -> StateSnapshot:
        """Copy what passes may write, as it is now.

        Args:
            since: the latest snapshot, if it is from before the pass that ran last. What that pass
                created is not searched for: it is unreachable once the state is restored.

        Returns:
            The snapshot; `since` itself if nothing has changed.
        """
        if since is None:
            self._search()
        contents, copied, arrays = self._contents, self._copied, self._arrays
        if since is not None:
            ids = list(map(self._ids_in, self._containers))
            if ids == self._ids and not (copied or arrays or self._generators):
                return since
            found = zip(self._containers, contents, ids, self._ids, strict=True)
            contents = [kept if a == b else self._copy(c) for c, kept, a, b in found]
        if self._is_first:
            large = set(map(id, self._large_frozen))
            copied = [*copied, *(t for t in self._watched if id(t) not in large)]
            arrays = [*arrays, *self._large_arrays]
        return StateSnapshot(
            self._is_first,
            list(zip(self._containers, contents, strict=True)),
            _copies(copied) if copied else [],
            [(array, array.copy()) for array in arrays] if arrays else [],
            [(g, get_generator_state(g)) for g in self._generators] if self._generators else [],
            [(t, _version(t)) for t in self._watched] if since is None and self._watched else [],
            _norms(self._large_frozen) if self._is_first else [],
        )

    def _search(self) -> None:
        """Find what was added to attributes and containers since the latest search."""
        if self._is_searching:  # that one was interrupted, or this is the first one
            self._walk()
        self._is_searching = True
        stale = set[int]()
        if self._variables is not None and self._variables.values is not self._latest_values:
            # A loop may hold all of its batches: those of earlier closures are not state.
            self._latest_values = self._variables.values
            stale = self._without_tensors - self._of_roots - set(map(id, self._latest_values))
        known = len(self._ids)
        for i, container in enumerate(self._containers):  # which grows during the loop
            ids = self._ids_in(container)
            if i >= known:
                self._contents.append(self._copy(container))
                self._ids.append(ids)
            elif ids != self._ids[i]:
                content = self._copy(container)
                if new := _new_values(content, self._ids[i]):
                    self._visit_all(new, container)
                self._contents[i], self._ids[i] = content, ids
        self._drop(stale)
        self._is_searching = False

    def _ids_in(self, container: Any) -> Any:
        """A key that changes if a container holds other objects, or in another order."""
        if type(container) is _Attributes:
            return container.ids()
        if len(container) > _LONG:
            return object() if self._is_copied(container) else _Ends(container).ids()
        if isinstance(container, dict):
            return [*map(id, container), *map(id, container.values())]
        return list(map(id, container))

    def _is_copied(self, container: Any) -> bool:
        # The length of a set or a bounded queue does not show what was added.
        is_short = len(container) <= _LONG or self._is_first or id(container) in self._rewritten
        return is_short or isinstance(container, set) or hasattr(container, "maxlen")

    def _copy(self, container: Any) -> Any:
        try:
            return container.copy() if self._is_copied(container) else _Ends(container)
        except RuntimeError:  # another thread writes to it: left to that thread
            return None

    def _drop(self, ids: set[int]) -> None:
        """Forget these, and objects that are no longer referenced elsewhere."""
        for items in self._found:
            if items:
                ids |= {id(x) for x in items if sys.getrefcount(x) <= _NO_OTHER_REFERENCE}
        modules = self._of_modules
        gone = {i for i, x in modules.items() if sys.getrefcount(x.namespace) <= _NO_OWNER}
        self._forget(ids | {id(modules.pop(i)) for i in gone})
        self._seen -= gone

    def _forget(self, ids: set[int]) -> None:
        if not ids:
            return
        self._seen -= ids
        self._without_tensors -= ids
        self._contents, self._ids = (
            [x for c, x in zip(self._containers, kept, strict=True) if id(c) not in ids]
            for kept in (self._contents, self._ids)
        )
        for items in self._found:
            items[:] = [x for x in items if id(x) not in ids]

    def observe(self, before: StateSnapshot) -> bool:
        """Learn what a pass wrote.

        Args:
            before: captured before the pass. The copies of tensors that are not written are freed.

        Returns:
            Whether `before` holds all that the pass wrote. False if a large tensor is written, or a
            long list rewritten, for the first time after the first pass.
        """
        written = {id(t) for t, version in before.versions if _version(t) != version}
        known = {id(t) for t, _ in before.tensors}
        if before.is_first:
            # By the values too: PyTorch does not count writes to `tensor.data`.
            written |= before.ids_of_changed(self._large_frozen)
            self._arrays += [a for a in self._large_arrays if id(a) in written]
        if written:
            self._copied += [t for t in self._watched if id(t) in written]
            self._watched[:] = [t for t in self._watched if id(t) not in written]
        if before.is_first:
            before.keep({id(x) for x in (*self._copied, *self._arrays)})
            self._learn_containers(before)
        self._is_first = False
        moved = {id(c) for c, kept in before.contents if type(kept) is _Ends and kept.moved(c)}
        self._rewritten |= moved
        return written <= known and not moved

    def _learn_containers(self, before: StateSnapshot) -> None:
        """After the first pass: which containers it rewrote, and did not only append to."""
        copied = [(c, kept) for c, kept in before.contents if type(kept) in _CONTAINERS]
        self._rewritten |= {id(c) for c, kept in copied if not _starts_with(c, kept)}
        found = zip(self._containers, self._ids, strict=True)
        self._forget({id(c) for c, ids in found if id(c) in self._of_layers and c.ids() == ids})


class _Attributes:
    """The attributes of an owner that are state."""

    def __init__(self, namespace: dict[str, Any], skip: frozenset[str]) -> None:
        self.namespace, self._skip = namespace, skip
        self._length, self._names, self._latest = -1, list[str](), list[Any]()

    def __len__(self) -> int:
        return len(self._names)

    def values(self) -> list[Any]:
        namespace = self.namespace
        try:
            if len(namespace) == self._length:
                return list(map(namespace.__getitem__, self._names))
        except KeyError:  # one was deleted, another one set
            pass
        self._length = len(namespace)
        self._names = [name for name in namespace if name not in self._skip]
        return [namespace[name] for name in self._names]

    def ids(self) -> list[int]:
        self._latest = self.values()
        return [id(self._names), *map(id, self._latest)]

    def copy(self) -> tuple[list[str], list[Any]]:
        """Names and values, as `ids` has found them."""
        return self._names, self._latest

    def restore(self, names: list[str], values: list[Any]) -> None:
        namespace = self.namespace
        namespace.update(zip(names, values, strict=True))
        if names is not self._names or len(namespace) != self._length:
            for name in namespace.keys() - set(names) - self._skip:
                del namespace[name]


class _Ends:
    """Length of a long container and, of a list, its ends, which show growth and rotation."""

    def __init__(self, container: Any) -> None:
        self.length = len(container)
        self._ends = (container[0], container[-1]) if isinstance(container, list) else ()

    def ids(self) -> list[int]:
        return [self.length, *map(id, self._ends)]

    def moved(self, container: Any) -> bool:
        """Whether the container has changed other than by growing."""
        if len(container) < self.length:
            return True
        if not self._ends:
            return False
        return not (container[0] is self._ends[0] and container[self.length - 1] is self._ends[1])


@dataclass
class StateSnapshot:
    """State as a tracker captured it: pairs of what is tracked and what it was."""

    is_first: bool
    contents: Pairs
    tensors: Pairs
    arrays: Pairs
    generators: Pairs
    versions: Pairs
    norms: list[float]

    def ids_of_changed(self, large: list[Tensor]) -> set[int]:
        """Ids of what has other values than in the snapshot. Waits for the device."""
        changed: list[Any] = [
            t for t, was in self.tensors if not (t.shape == was.shape and torch.equal(t, was))
        ]
        changed += [a for a, was in self.arrays if a.tobytes() != was.tobytes()]
        changed += [t for t, a, b in zip(large, self.norms, _norms(large), strict=True) if a != b]
        return set(map(id, changed))

    def keep(self, ids: set[int]) -> None:
        """Free the copies of all other tensors and arrays."""
        self.tensors = [pair for pair in self.tensors if id(pair[0]) in ids]
        self.arrays = [pair for pair in self.arrays if id(pair[0]) in ids]

    def restore(self) -> None:
        """Restore the state. May be called repeatedly."""
        for container, content in self.contents:
            try:
                _restore_container(container, content)
            except RuntimeError:  # another thread writes to it
                continue
        for array, was in self.arrays:
            array[...] = was
        for generator, state in self.generators:
            _set_generator_state(generator, state)
        if self.tensors:
            _write_back(self.tensors)


def get_generator_state(value: Any) -> Any:
    """The state of a random number generator; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state(legacy=False)
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return value.bit_generator.state
    return None


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


# The reference count of an object that only a list and a loop variable refer to.
_NO_OTHER_REFERENCE = [sys.getrefcount(x) for x in [object()]][0]  # noqa: RUF015
_NO_OWNER = [sys.getrefcount(x.namespace) for x in [_Attributes({}, frozenset())]][0]  # noqa: RUF015
# Attributes of every nn.Module that are not state, or that are tracked elsewhere.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()).keys() - {"training"})
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.", "deepspeed.")


def _is_wrapper(module: nn.Module) -> bool:
    """Whether the module's attributes belong to a layout (DDP) and must not be touched."""
    return str(getattr(type(module).forward, "__module__", "")).startswith(_WRAPPERS)


def _is_a_layer_of_pytorch(module: nn.Module) -> bool:
    """Whether forward passes set no attributes of the module: one of PyTorch's layers, unhooked."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks
    return not is_hooked and type(module).__module__.startswith("torch.nn.modules.")


def _is_array(value: Any) -> bool:
    """Whether this is a NumPy array. NumPy is not imported for it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_meter(value: Any) -> bool:
    """Whether an object holds plain values alone: numbers, text, tensors, containers, functions."""
    if isinstance(value, (*_CODE, *_PLAIN, torch.optim.Optimizer)):
        return False
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and all(
        isinstance(item, (*_PLAIN, *_CONTAINERS, *_CODE)) or _is_array(item)
        for item in attributes.values()
    )


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; 0 where PyTorch does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _starts_with(container: Any, kept: Any) -> bool:
    """Whether a container holds the same objects as before, in their order, or more after them."""
    if isinstance(container, set):
        return bool(kept == container)
    if len(container) < len(kept):
        return False
    if isinstance(container, dict):
        values = map(operator.is_, container.values(), kept.values())
        return all(map(operator.is_, container, kept)) and all(values)
    return all(map(operator.is_, container, kept))


def _new_values(content: Any, ids: Any) -> list[Any]:
    """The values in the copy of a container whose ids are not among the earlier ones."""
    if content is None or type(content) is _Ends or len(content) > _VERY_LONG:
        return []
    known = set(ids) if isinstance(ids, list) else ()
    if isinstance(content, tuple):
        content = content[1]  # of an owner
    elif isinstance(content, dict):
        content = content.values()
    return [x for x in content if type(x) not in _SCALARS and id(x) not in known]


def _restore_container(container: Any, content: Any) -> None:
    if type(container) is _Attributes:
        container.restore(*content)
        return
    if type(container) is type(content) is dict and len(container) == len(content):
        container.update(content)
        if len(container) == len(content):
            return
    if content is None:  # another thread wrote to it
        return
    elif type(content) is _Ends:  # only appended to
        excess = len(container) - content.length
        if excess > 0 and isinstance(container, list):
            del container[content.length :]
        else:
            for _ in range(excess):
                container.popitem() if isinstance(container, dict) else container.pop()
    elif isinstance(container, list):
        container[:] = content
    elif isinstance(container, (set, deque)):
        if container != content or isinstance(container, deque):
            container.clear()
            container.update(content) if isinstance(container, set) else container.extend(content)
    elif not (len(container) == len(content) and _starts_with(container, content)):
        container.clear()
        # `Counter.update` adds; `dict.update` does not know the order of an OrderedDict.
        update = OrderedDict.update if isinstance(container, OrderedDict) else dict.update
        update(container, content)


def _norms(tensors: list[Tensor]) -> list[float]:
    return [norm.item() for norm in torch._foreach_norm(tensors)] if tensors else []


def _copies(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = [(torch.empty_like(t), t) for t in tensors]
    if pairs:
        _write_back(pairs)
    return [(t, copy) for copy, t in pairs]


def _write_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, in one multi-tensor operation per dtype."""
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for t, was in pairs:
        if t.is_inference():
            with torch.inference_mode():
                t.copy_(was)
        elif t.shape != was.shape:
            t.resize_(was.shape).copy_(was)
        else:
            by_dtype[t.dtype].append((t, was))
    with torch.no_grad():
        for some in by_dtype.values():
            torch._foreach_copy_([t for t, _ in some], [was for _, was in some])

"""The state that methods keep between updates, saved with every checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..config import SAMConfig
from ..config.file import replacing
from ..methods.base import Method, Named, State
from .layout import Layout

_NAME = "sam_state"


class MethodStateCheckpoint:
    """State of a method, `sam_trigger` and the automatic radius, saved in `sam_state.safetensors`.

    If all processes hold the same state, one of them writes the file. If each holds its own shards,
    or makes its own perturbations, each writes one: `sam_state_0-of-4.safetensors`, ...
    """

    def __init__(
        self, config: SAMConfig, method: Method, layout: Layout, parameters: Named
    ) -> None:
        self.state: State = {}
        has_rule = config.sam_trigger != "always" or config.sam_rho is None
        self._is_used = method.has_state or has_rule
        self._method, self._layout, self._parameters = config.sam_method, layout, parameters
        # The state of a rule is the same on all processes.
        each_alone = config.sam_scope == "micro_batch"
        self.is_shared = not method.has_state or layout.shares_state(each_alone)
        self._before: tuple[int, State] = (-1, {})

    def keep(self, update: int) -> None:
        """Copy the state at the start of an update, for a checkpoint that is made within it."""
        if self._is_used:
            copied = {k: {n: t.clone() for n, t in v.items()} for k, v in self.state.items()}
            self._before = (update, copied)

    def save(self, folder: Path, update: int, is_writer: bool) -> None:
        """Write the state before optimizer step number `update`, atomically.

        State shared by all processes is written only where `is_writer` is set.
        """
        if not self._is_used or (self.is_shared and not is_writer):
            return
        state = self._before[1] if self._before[0] == update else self.state
        flat = {
            f"{slot}/{name}": tensor.contiguous().clone()  # two names may share memory
            for slot, tensors in state.items()
            for name, tensor in tensors.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(folder)) as temporary:
            save_file(flat, temporary, metadata={"sam_method": self._method})

    def load(self, folder: Path) -> None:
        """Load the state of a checkpoint, each tensor onto the device of its parameter.

        If the checkpoint has no state, or that of another method, the state stays empty, with a
        warning. ValueError if another number of processes wrote it, or for another model.
        """
        if not self._is_used:
            return
        path = self._path(folder)
        restarts = f"the state of sam_method={self._method!r} starts empty."
        if not path.is_file():
            if others := sorted(file.name for file in folder.glob(f"{_NAME}*.safetensors")):
                raise ValueError(
                    f"{folder} holds SAM's state as {', '.join(others)}, but this process needs "
                    f"{path.name}. Resume with the same number of processes, the same layout and "
                    "the same sam_scope, or remove these files to start with an empty state."
                )
            warnings.warn(f"{folder} holds no {path.name}: {restarts}", stacklevel=2)
            return
        with safe_open(path, "pt") as file:
            writer = (file.metadata() or {}).get("sam_method")
            if writer != self._method:
                warnings.warn(
                    f"{path} was written with sam_method={writer!r}: {restarts}", stacklevel=2
                )
                return
            state: State = {}
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                slot, name = key.split("/", 1)
                state.setdefault(slot, {})[name] = file.get_tensor(key)
            self.set(state, f"{path}: ")

    def set(self, state: State, origin: str = "") -> None:
        """Replace the state, each tensor copied to the device of its parameter.

        ValueError for a tensor that fits no parameter.
        """
        local = self._layout.local(list(self._parameters.values()))
        weights = dict(zip(self._parameters, local, strict=True))
        self.state.clear()
        for slot, tensors in state.items():
            for name, tensor in tensors.items():
                weight = weights.get(name)
                if tensor.ndim and (weight is None or weight.shape != tensor.shape):
                    raise ValueError(
                        f"{origin}{slot}/{name} has the shape {tuple(tensor.shape)}, which is not "
                        "that of a parameter of this model in this layout. Resume with the model "
                        "and the layout that wrote it, or remove the file to start empty."
                    )
                device = self._layout.device if weight is None else weight.device
                # A copy: memory-mapped tensors are not aligned, which changes the summation order.
                self.state.setdefault(slot, {})[name] = tensor.to(device, copy=True)

    def _path(self, folder: Path) -> Path:
        rank, count = self._layout.place
        suffix = "" if self.is_shared else f"_{rank}-of-{count}"
        return folder / f"{_NAME}{suffix}.safetensors"

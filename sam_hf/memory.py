"""What is remembered from one update to the next, and saved with every checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .backends import Backend
from .config import SAMConfig
from .methods import Method, State
from .options_file import replacing

_NAME = "sam_state"
_BETWEEN = "/"  # the slot and the parameter's name


class Memory:
    """The state of a method and of a trigger: in memory, and as `sam_state.safetensors`.

    Where all processes hold the same, one of them writes the file. Where each holds its own shards,
    or makes its own perturbations, each writes one: `sam_state_0-of-4.safetensors`, ...

    Args:
        parameters: those of the model by name, frozen ones too.
    """

    def __init__(
        self, config: SAMConfig, method: Method, backend: Backend, parameters: Mapping[str, Tensor]
    ) -> None:
        self.state: State = {}
        self._is_used = method.has_state or config.sam_trigger != "always"
        self._method, self._backend, self._parameters = config.sam_method, backend, parameters
        self._is_shared = backend.shares_state(config.sam_scope == "micro_batch")
        self._before: tuple[int, State] | None = None

    def keep(self, update: int) -> None:
        """Copy the state of before an update, which a checkpoint made within it must hold."""
        if self._is_used:
            copied = {k: {n: t.clone() for n, t in v.items()} for k, v in self.state.items()}
            self._before = (update, copied)

    def save(self, folder: Path, update: int, is_writer: bool) -> None:
        """Write the state of before the optimizer step number `update`, whole or not at all.

        Args:
            is_writer: whether this process writes what all processes share.
        """
        if not self._is_used or not (is_writer or not self._is_shared):
            return
        is_within = self._before is not None and self._before[0] == update
        state = self._before[1] if is_within and self._before is not None else self.state
        flat = {
            f"{slot}{_BETWEEN}{name}": tensor.contiguous().clone()  # two names may share memory
            for slot, tensors in state.items()
            for name, tensor in tensors.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(folder)) as temporary:
            save_file(flat, temporary, metadata={"sam_method": self._method})

    def load(self, folder: Path) -> None:
        """Go on with the state of a checkpoint, each tensor on the device of its parameter.

        A checkpoint without one, or one of another method, leaves the state empty, with a warning.

        Raises:
            ValueError: the state is that of another number of processes, or of another model.
        """
        if not self._is_used:
            return
        path = self._path(folder)
        begins_anew = f"the state of sam_method={self._method!r} begins anew."
        if not path.is_file():
            others = sorted(file.name for file in folder.glob(f"{_NAME}*.safetensors"))
            if others:
                raise ValueError(
                    f"{folder} holds SAM's state as {', '.join(others)}, and this process needs "
                    f"{path.name}. Resume with as many processes, the same layout and the same "
                    "sam_scope, or remove these files to begin the state anew."
                )
            warnings.warn(f"{folder} holds no {path.name}: {begins_anew}", stacklevel=2)
            return
        local = self._backend.local(list(self._parameters.values()))
        weights = dict(zip(self._parameters, local, strict=True))
        with safe_open(path, "pt") as file:
            writer = (file.metadata() or {}).get("sam_method")
            if writer != self._method:
                warnings.warn(
                    f"{path} was written with sam_method={writer!r}: {begins_anew}", stacklevel=2
                )
                return
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                slot, name = key.split(_BETWEEN, 1)
                tensor = file.get_tensor(key)
                weight = weights.get(name)
                if tensor.ndim and (weight is None or weight.shape != tensor.shape):
                    raise ValueError(
                        f"{path}: {key} has the shape {tuple(tensor.shape)}, which is not that of "
                        "a parameter of this model in this layout. Resume with the model and the "
                        "layout that wrote it, or remove the file to begin the state anew."
                    )
                device = (weight if weight is not None else local[0]).device
                # A copy: tensors in a file are not aligned, and would be summed in another order.
                self.state.setdefault(slot, {})[name] = tensor.to(device, copy=True)

    def _path(self, folder: Path) -> Path:
        rank, count = self._backend.place
        suffix = "" if self._is_shared else f"_{rank}-of-{count}"
        return folder / f"{_NAME}{suffix}.safetensors"

"""The state of the global random number generators."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch

_WORDS = 625  # MT19937's key of 624 words, and a position


class RandomState:
    """The global generators' state: PyTorch's on the CPU and on `devices`, Python's and NumPy's.

    The states of the accelerators' generators are kept on the host, so that reading them does not
    wait for the device.
    """

    def __init__(self, devices: Collection[torch.device] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._accelerators = [
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        ]
        # If nobody imported NumPy, nobody draws from it.
        others = [_PYTHON, _NUMPY] if "numpy" in sys.modules else [_PYTHON]
        self._states = {generator: generator.state() for generator in others}

    def restore(self, current: RandomState | None = None) -> None:
        """Put the state back. `current` is what the state is, if that is known."""
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, state in self._states.items():
            known = None if current is None else current._states.get(generator)
            if state is not known and state is not generator.state():
                generator.write(state)
                generator._seen = None  # a left-over Gaussian may differ where the words do not


class _Generator:
    """A global Mersenne Twister, whose state is read and written only if it has changed.

    Reading it takes 10 us (Python) or 40 us (NumPy). Whether it changed shows in the memory of the
    generator, and in the Gaussian that is left over from a pair, which is not in that memory.
    """

    look: Callable[[], Any]
    """What changes whenever the state does; None if that is not known."""
    read: Callable[[], Any]
    write: Callable[[Any], None]
    _latest: Any = None
    _seen: Any = None

    def state(self) -> Any:
        seen = self.look()
        if seen is None or seen != self._seen:
            self._latest, self._seen = self.read(), seen
        return self._latest


class _Python(_Generator):
    read, write = staticmethod(random.getstate), staticmethod(random.setstate)

    def __init__(self) -> None:
        self._generator: Any = getattr(random, "_inst", None)
        # Where CPython keeps the words; verified, since no interface promises it.
        self._address = id(self._generator) + object.__basicsize__
        size = getattr(type(self._generator), "__basicsize__", 0)
        self._is_known = size >= object.__basicsize__ + 4 * _WORDS
        if self._is_known:
            *key, position = random.getstate()[1]
            words = struct.pack(f"{_WORDS}I", position, *key)
            self._is_known = ctypes.string_at(self._address, 4 * _WORDS) == words

    def look(self) -> Any:
        if not self._is_known:
            return None
        return ctypes.string_at(self._address, 4 * _WORDS), self._generator.gauss_next


class _NumPy(_Generator):
    def look(self) -> Any:
        generator = sys.modules["numpy"].random.get_bit_generator()
        has_gaussian = self._latest is not None and self._latest.get("has_gauss")
        if has_gaussian or type(generator).__name__ != "MT19937":
            return None
        return ctypes.string_at(generator.ctypes.state_address, 4 * _WORDS)

    def read(self) -> Any:
        return sys.modules["numpy"].random.get_state(legacy=False)

    def write(self, state: Any) -> None:
        sys.modules["numpy"].random.set_state(state)


_PYTHON, _NUMPY = _Python(), _NumPy()

"""The state of the global random number generators."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Collection
from typing import Any

import torch

_WORDS = 625  # MT19937's key of 624 words, and a position
_SEEN = 64  # bytes of them that are compared


class RandomState:
    """The global generators' state: PyTorch's on the CPU and on `devices`, Python's and NumPy's.

    The states of the accelerators' generators are kept on the host, so that reading them does not
    wait for the device.
    """

    def __init__(self, devices: Collection[torch.device] = ()) -> None:
        self._cpu = torch.default_generator.get_state()
        self._accelerators = [
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        ]
        self._python, self._numpy = _PYTHON.state(), _NUMPY.state()

    def restore(self, current: RandomState | None = None) -> None:
        """Put the state back. `current` is what the state is, if that is known."""
        torch.default_generator.set_state(self._cpu)
        for device, state in self._accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        if self._python is not (_PYTHON.state() if current is None else current._python):
            _PYTHON.write(self._python)
        if self._numpy is not (_NUMPY.state() if current is None else current._numpy):
            _NUMPY.write(self._numpy)


class _Python:
    """Python's global Mersenne Twister, whose state is read only if it has changed.

    Reading it takes 10 us (and NumPy's 40 us). Whether it changed shows in the position and in a
    few of the 624 words: every number that is drawn moves the position, and where that wraps
    around, all words change. The Gaussian that is left over from a pair is kept elsewhere.
    """

    def __init__(self) -> None:
        self._generator: Any = getattr(random, "_inst", None)
        self._latest: Any = None
        self._seen: Any = None
        self._memory: Any = None  # the position and the first words; None if they are not found
        # Where CPython keeps the words; verified, since this is not documented.
        size = getattr(type(self._generator), "__basicsize__", 0)
        if size >= object.__basicsize__ + 4 * _WORDS:
            address = id(self._generator) + object.__basicsize__
            *key, position = random.getstate()[1]
            words = struct.pack(f"{_WORDS}I", position, *key)
            if ctypes.string_at(address, 4 * _WORDS) == words:
                self._memory = (ctypes.c_char * _SEEN).from_address(address)

    def state(self) -> Any:
        if self._memory is None:
            return random.getstate()
        seen = self._memory.raw, self._generator.gauss_next
        if seen != self._seen:
            self._latest, self._seen = random.getstate(), seen
        return self._latest

    def write(self, state: Any) -> None:
        random.setstate(state)
        self._seen = None  # a left-over Gaussian may differ where the words do not


class _NumPy:
    """The same for NumPy's global generator, which is unused as long as NumPy is not imported."""

    def __init__(self) -> None:
        self._generator: Any = None
        self._latest: Any = None
        self._seen: Any = None
        self._memory: Any = None  # the last words and the position; None for another algorithm

    def state(self) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        generator = numpy.random.get_bit_generator()
        if generator is not self._generator:
            self._generator, self._seen, self._memory = generator, None, None
            if type(generator).__name__ == "MT19937":
                address = generator.ctypes.state_address + 4 * _WORDS - _SEEN
                self._memory = (ctypes.c_char * _SEEN).from_address(address)
        if self._seen is None or self._memory.raw != self._seen:
            self._latest = state = numpy.random.get_state(legacy=False)
            is_known = self._memory is not None and not state["has_gauss"]
            self._seen = self._memory.raw if is_known else None
        return self._latest

    def write(self, state: Any) -> None:
        if state is not None:
            sys.modules["numpy"].random.set_state(state)
            self._seen = None


_PYTHON, _NUMPY = _Python(), _NumPy()

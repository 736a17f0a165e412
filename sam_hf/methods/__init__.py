"""The methods, one file each. A new method is a new file and a row here."""

from __future__ import annotations

from .asam import ASAM
from .base import Dot, Method
from .sam import SAM

METHODS: dict[str, type[Method]] = {
    "sam": SAM,
    "asam": ASAM,
}

__all__ = ["ASAM", "METHODS", "SAM", "Dot", "Method"]

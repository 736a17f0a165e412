"""Checks of options: the error names the field, quotes its value and says what is allowed."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any


class OptionChecks:
    """What a dataclass of options checks its fields with. Each check raises `ValueError`."""

    def _check_number(
        self,
        name: str,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
        below: float = math.inf,
    ) -> None:
        """Refuse what is no finite number in [low, high] and in (above, below)."""
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = is_number and low <= value <= high and above < value < below
        if inside and math.isfinite(value):
            return
        ends = (("from", low), ("above", above), ("to", high), ("below", below))
        bounds = [f"{word} {end:g}" for word, end in ends if math.isfinite(end)]
        is_open = not (math.isfinite(high) or math.isfinite(below))
        words = ["a finite number" if is_open else "a number", *bounds]
        self.refuse(name, " ".join([*words, "up"] if is_open and bounds else words))

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in tuple(choices):
            self.refuse(name, "one of " + ", ".join(repr(choice) for choice in choices))

    def _check_params(self, name: str) -> None:
        allowed = "'all', 'norms', 'matrices' or a regular expression on parameter names"
        value = getattr(self, name)
        if not isinstance(value, str) or not value:
            self.refuse(name, allowed)
        try:
            re.compile(value)
        except re.error as error:
            self.refuse(name, f"{allowed} (this one does not compile: {error})")

    def refuse(self, name: str, allowed: str) -> None:
        """Raise, with a suggestion where the value looks like one that is allowed."""
        value = getattr(self, name)
        hint = ""
        if isinstance(value, str):
            close = difflib.get_close_matches(value, re.findall(r"'([^']+)'", allowed), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r} is not allowed. Allowed: {allowed}.{hint}")

"""Which tests and cases wait until `RUN_SLOW=1` asks for them, as in Transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import pytest

RUN_SLOW = os.environ.get("RUN_SLOW") == "1"
WITHOUT_SLOW = pytest.mark.skip(reason="slow: RUN_SLOW=1 runs it")

Kept = Collection[Any] | Callable[[Any], bool]


def slow_unless(**kept: Kept) -> pytest.MarkDecorator:
    """A test that is quick with these values of its parameters, and slow with others.

    Of several such marks on a test, one that holds makes a case quick.

    Args:
        kept: for some parameters, the values, or what is true of them.
    """
    return pytest.mark.slow_unless(**kept)


def is_slow(item: pytest.Item) -> bool:
    """Whether the test, or this case of it, is marked as slow."""

    def holds(kept: Kept, value: Any) -> bool:
        return kept(value) if callable(kept) else value in kept

    if item.get_closest_marker("slow") is not None:
        return True
    marks = list(item.iter_markers("slow_unless"))
    return bool(marks) and not any(
        all(holds(kept, item.callspec.params[name]) for name, kept in mark.kwargs.items())
        for mark in marks
    )


def cases_to_run(cases: dict[str, Any], quick: Collection[str]) -> dict[str, Any]:
    """Those of a launch: the quick ones alone, unless slow tests run too."""
    return cases if RUN_SLOW else {name: cases[name] for name in quick}

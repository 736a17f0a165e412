"""Which methods and scopes go together, as the methods and the options say themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from sam_hf import SAMConfig
from sam_hf.methods import METHODS, Method

SCOPES = ("batch", "micro_batch")
MOVING = [name for name, method in METHODS.items() if method.perturbs]
"""The methods that move the weights for a pass."""

# Options with which every update of a method has both passes; over all perturbed parameters; and
# such that where e is 0 the optimizer gets nothing but g_s, to the last bit.
OFTEN: dict[str, dict[str, Any]] = {"looksam": {"sam_method_args": {"k": 1}}}
WHOLE: dict[str, dict[str, Any]] = OFTEN | {"esam": {"sam_method_args": {"beta": 1.0}}}
PURE: dict[str, dict[str, Any]] = OFTEN | {"gsam": {"sam_method_args": {"alpha": 0.0}}}


def has_two_passes(method: type[Method]) -> bool:
    return method.perturbs and not method.along_momentum


def has_one_pass_at_w_plus_e(method: type[Method]) -> bool:
    return method.perturbs and method.along_momentum


def is_allowed(**sam: Any) -> bool:
    """Whether the options exclude each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            SAMConfig(**sam)
        except ValueError:
            return False
    return True


def methods_and_scopes(
    accepts: Callable[[type[Method]], bool] = has_two_passes, **sam: Any
) -> list[tuple[str, str]]:
    """The names of the methods that the test accepts, with every scope that they allow.

    Args:
        sam: options that the test sets besides.
    """
    return [
        (name, scope)
        for name, method in METHODS.items()
        if accepts(method)
        for scope in SCOPES
        if is_allowed(sam_method=name, sam_scope=scope, **sam)
    ]


def every_method_and_scope(
    accepts: Callable[[type[Method]], bool] = has_two_passes, **sam: Any
) -> pytest.MarkDecorator:
    """Run a test with each `method` and `scope` of `methods_and_scopes`."""
    return pytest.mark.parametrize(("method", "scope"), methods_and_scopes(accepts, **sam))

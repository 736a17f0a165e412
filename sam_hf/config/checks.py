"""Checks of options. Every error names the option, quotes its value and says what is allowed."""

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, fields
from typing import Any, NoReturn

from ..methods import METHODS, Method

PARAMETER_SETS = ("all", "norms", "matrices")

_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "low": ("from", operator.ge),
    "above": ("above", operator.gt),
    "high": ("to", operator.le),
    "below": ("below", operator.lt),
}


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise `ValueError`, with a suggestion where the value resembles one that is allowed."""
    hint = did_you_mean(value, re.findall(r"'([^']+)'", allowed)) if isinstance(value, str) else ""
    raise ValueError(f"{name}={value!r} is not allowed. Allowed: {allowed}.{hint}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of the words, or nothing."""
    by_lower = {w.lower(): w for w in words}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def check_number(name: str, value: Any, whole: bool = False, **limits: float) -> None:
    """Refuse what is not a finite number within ``limits``, whose keys are those of `_LIMITS`."""
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    within = (_LIMITS[key][1](value, end) for key, end in limits.items())
    if is_number and math.isfinite(value) and all(within):
        return
    is_open = not limits.keys() & {"high", "below"}
    words = ["a whole number" if whole else "a finite number" if is_open else "a number"]
    words += [f"{word} {limits[key]:g}" for key, (word, _) in _LIMITS.items() if key in limits]
    refuse(name, value, " ".join([*words, "up"] if is_open and limits else words))


def parse_rho(name: str, value: Any) -> float | None:
    """The radius: None where it is automatic. A command line gives it as a string."""
    allowed = "a finite number from 0 up, or 'auto' (None)"
    if isinstance(value, str):
        if value.strip().lower() in ("auto", "none"):
            return None
        try:
            value = float(value)
        except ValueError:
            refuse(name, value, allowed)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value >= 0):
        refuse(name, value, allowed)
    rho: float | None = value
    return rho


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if value not in tuple(choices):
        refuse(name, value, "one of " + ", ".join(repr(choice) for choice in choices))


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def check_params(name: str, value: Any) -> None:
    """Check the selection. A misspelt set is rejected, not taken for a regular expression."""
    allowed = f"{', '.join(map(repr, PARAMETER_SETS))} or a regular expression on parameter names"
    if not isinstance(value, str) or not value:
        refuse(name, value, allowed)
    try:
        re.compile(value)
    except re.error as error:
        refuse(name, value, f"{allowed} (this one does not compile: {error})")
    if value not in PARAMETER_SETS and value.isalpha() and did_you_mean(value, PARAMETER_SETS):
        refuse(name, value, f"{allowed} (such as `.*{value}`)")


def method_options(method: type[Method]) -> dict[str, Field[Any]]:
    """The options that a method declares itself, by name."""
    return {f.name: f for f in fields(method) if "limits" in f.metadata}


def describe_method_options() -> str:
    """Help of `sam_method_args`: the options of all methods, with their defaults."""
    options = {name: method_options(method).items() for name, method in METHODS.items()}
    texts = {n: ", ".join(f"{key} ({f.default})" for key, f in own) for n, own in options.items()}
    listed = "; ".join(f"{name}: {text}" for name, text in texts.items() if text)
    return f"Options of the chosen method only, as JSON or key=value,key=value. {listed}"


def parse_method_args(value: Any) -> dict[str, Any]:
    """`sam_method_args` as a dictionary, from one, from JSON or from "key=value,key=value"."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    name, allowed = "sam_method_args", "a dictionary, a JSON object or 'key=value,key=value'"
    if not isinstance(value, str):
        refuse(name, value, allowed)
    text = value.strip()
    if not text or text.startswith("{"):
        try:
            return dict(json.loads(text or "{}"))
        except ValueError as error:
            refuse(name, value, f"{allowed} (invalid JSON: {error})")
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key.strip() and sign for key, sign, _ in pairs):
        refuse(name, value, allowed)
    return {key.strip(): _parsed(word.strip()) for key, _, word in pairs}


def _parsed(word: str) -> Any:
    try:
        return json.loads(word.lower() if word.lower() in ("true", "false") else word)
    except ValueError:
        return word


def check_method_args(method_name: str, given: Mapping[str, Any]) -> None:
    """Refuse keys that the method does not declare, and values outside its declared limits."""
    options = method_options(METHODS[method_name])
    for key, value in given.items():
        if key not in options:
            names = ", ".join(map(repr, options))
            has = f"takes {names}" if names else "has no options of its own"
            raise ValueError(
                f"sam_method_args={dict(given)!r}: {key!r} is not an option of "
                f"sam_method={method_name!r}, which {has}.{did_you_mean(key, options)}"
            )
        option, label = options[key], f"sam_method_args[{key!r}]"
        kind: type = type(option.default)
        if kind is bool:
            check_flag(label, value)
        elif kind is str:
            check_choice(label, value, option.metadata["choices"])
        else:
            check_number(label, value, whole=kind is int, **option.metadata["limits"])


def check_exclusions(config: Any, method: Method) -> None:
    """Refuse mutually exclusive options of a `SAMConfig` whose fields have been checked."""
    name, triggered = f"sam_method={config.sam_method!r}", config.sam_trigger != "always"
    one_pass, combines, reuses = method.has_one_pass, method.combines, method.reuses
    # DDP requires that every training pass has the auxiliary factors, hence no plain updates.
    auxiliary, no_plain = method.needs_auxiliary, f"with {name}, which has no plain updates"
    full_g = "with sam_trigger, whose plain updates step with the gradient of the ascent pass"
    auto = config.sam_rho is None
    with_auto = "with sam_rho=None, the automatic radius (or set a number)"
    without_loss = f"with {name}, whose updates compute no loss at w next to one at w + e"
    # Option, allowed values, the condition that excludes all others, and the message.
    rules: tuple[tuple[str, tuple[Any, ...], bool, str], ...] = (
        ("sam_scope", ("batch",), combines, f"with {name}, which needs g of the whole update"),
        ("sam_scope", ("batch",), one_pass, f"with {name}, which acts once per update"),
        ("sam_scope", ("batch",), triggered, "with sam_trigger, which decides once per update"),
        ("sam_trigger", ("always",), one_pass or reuses, f"with {name}, which has its own rule"),
        ("sam_ascent_fraction", (1.0,), combines, f"with {name}, which needs g of all examples"),
        ("sam_ascent_fraction", (1.0,), one_pass, f"with {name}, which has no ascent pass"),
        ("sam_ascent_fraction", (1.0,), triggered, full_g),
        ("sam_params", ("all",), not method.perturbs, f"with {name}, which acts on the adapters"),
        ("sam_interval", (1,), auxiliary, no_plain),
        ("sam_start_ratio", (0.0,), auxiliary, no_plain),
        ("sam_rho_warmup_ratio", (0.0,), auxiliary, no_plain),
        ("sam_rho_schedule", ("constant", "linear", "cosine"), auxiliary, f"with {name}"),
        ("sam_rho", (), auto and one_pass, f"a number {without_loss}"),
        ("sam_rho_schedule", ("constant",), auto, with_auto),
        ("sam_rho_warmup_ratio", (0.0,), auto, with_auto),
        ("sam_ascent_fraction", (1.0,), auto, f"{with_auto}, which compares the same examples"),
        ("sam_replay_rng", (True,), auto, f"{with_auto}, which needs equal masks in both passes"),
        ("sam_interval", (1,), reuses, f"with {name}: set sam_method_args={{'k': ...}} instead"),
    )
    for option, allowed, excluded, why in rules:
        value = getattr(config, option)
        if excluded and value not in allowed:
            refuse(option, value, f"{' or '.join(map(repr, allowed))} {why}".strip())

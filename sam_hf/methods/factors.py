"""The two factors of LoRA's layers, found by the names that PEFT gives them."""

from __future__ import annotations

from collections.abc import Sequence

AUXILIARY = "sam_ascent"
"""The name of the second pair of factors, which Bi-LoRA perturbs with."""


def is_auxiliary(name: str) -> bool:
    return f".{AUXILIARY}." in f".{name}."


def factor_pairs(names: Sequence[str], auxiliary: bool) -> list[tuple[int, int]]:
    """The positions of (A, B) for each layer of which both are there.

    Args:
        names: of parameters, such as ``...q_proj.lora_A.default.weight``.
        auxiliary: those of the auxiliary pair, or those of the others.
    """
    positions = {name: i for i, name in enumerate(names)}
    pairs = []
    for name, i in positions.items():
        partner = name.replace(".lora_A.", ".lora_B.")
        if partner != name and partner in positions and is_auxiliary(name) == auxiliary:
            pairs.append((i, positions[partner]))
    return pairs

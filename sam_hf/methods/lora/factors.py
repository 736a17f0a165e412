"""The two factors of LoRA layers, identified by the parameter names of PEFT."""

from collections.abc import Sequence

AUXILIARY = "sam_ascent"
"""Adapter name of the auxiliary pair of factors, which holds Bi-LoRA's perturbation."""


def is_auxiliary(name: str) -> bool:
    return f".{AUXILIARY}." in f".{name}."


def factor_pairs(names: Sequence[str], auxiliary: bool) -> list[tuple[int, int]]:
    """Positions of (A, B) for each layer for which both are in ``names``.

    Args:
        names: parameter names such as ``...q_proj.lora_A.default.weight``.
        auxiliary: return the auxiliary pairs, or the others.
    """
    positions = {name: i for i, name in enumerate(names)}
    pairs = []
    for name, i in positions.items():
        partner = name.replace(".lora_A.", ".lora_B.")
        if partner != name and partner in positions and is_auxiliary(name) == auxiliary:
            pairs.append((i, positions[partner]))
    return pairs

"""Options that exclude each other."""

from __future__ import annotations

from typing import Any

from .methods import METHODS


def check_exclusions(config: Any) -> None:
    """Raise where two options exclude each other.

    Args:
        config: a `SAMConfig` whose single fields have been checked.

    Raises:
        ValueError: the message names one field, its value, what is allowed and the other field.
    """
    refuse = config.refuse
    method, name = METHODS[config.sam_method], f"sam_method={config.sam_method!r}"
    keeps_gradient, has_own_rule = method.keeps_gradient(), method.has_plain_updates()
    is_partial = config.sam_ascent_fraction < 1
    if config.sam_scope == "micro_batch":
        if keeps_gradient:
            refuse("sam_scope", f"'batch' with {name}, which needs the whole gradient g")
        if method.has_one_pass():
            refuse("sam_scope", f"'batch' with {name}, which works once in an update")
        if config.sam_trigger != "always":
            refuse("sam_scope", "'batch' with sam_trigger, which decides for an update")
    if config.sam_trigger != "always" and (method.has_one_pass() or has_own_rule):
        refuse("sam_trigger", f"'always' with {name}, which has passes of its own rule")
    if is_partial and (keeps_gradient or method.has_one_pass()):
        why = "needs the whole gradient g" if keeps_gradient else "has no ascent pass"
        refuse("sam_ascent_fraction", f"1.0 with {name}, which {why}")
    if is_partial and config.sam_trigger != "always":
        refuse(
            "sam_ascent_fraction",
            "1.0 with sam_trigger, which steps with the gradient of the ascent where it does "
            "not perturb",
        )
    if not method.perturbs and config.sam_params != "all":
        refuse("sam_params", f"'all' with {name}, which works on the adapters")
    if method.needs_auxiliary:
        # Every training pass must have the second pair: DDP would wait for it.
        for field_name, none in (
            ("sam_interval", 1),
            ("sam_start_ratio", 0.0),
            ("sam_rho_warmup_ratio", 0.0),
        ):
            if getattr(config, field_name) != none:
                refuse(field_name, f"{none} with {name}, which has no plain updates")
        if config.sam_rho_schedule == "learning_rate":
            refuse("sam_rho_schedule", f"'constant', 'linear' or 'cosine' with {name}")
    if config.sam_interval > 1 and has_own_rule:
        refuse("sam_interval", f"1 with {name}: set sam_k, its own interval")

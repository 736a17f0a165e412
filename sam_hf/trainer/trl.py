"""State of TRL's trainers outside of `compute_loss` that the second pass needs.

TRL is not imported: its trainers are recognised by the methods and attributes named here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..engine.recorder import KeptInputs

_LOG_PROBABILITIES = "_get_per_token_logps_and_entropies"  # a method of GRPO and RLOO


def policy_recorders(
    trainer: Any, latest: Callable[[], KeptInputs | None]
) -> dict[str, Callable[..., Any]]:
    """Methods that add the log-probabilities at w to recorded inputs without a sampling policy.

    GRPO's surrogate weighs each sample by the ratio of the policy to the sampling policy (arXiv
    2402.03300, eq. 3). Without an update since sampling, TRL uses the current policy as the latter.
    At w + e that is another policy: the ratio would be 1 for every e, and nothing would be clipped.
    With the log-probabilities at w among its inputs, the second pass uses the same surrogate.

    `latest` returns the kept inputs of the call that is being recorded, or None. The result, by
    name, replaces methods of the trainer; it is empty for trainers that are not TRL's.
    """
    compute = getattr(trainer, _LOG_PROBABILITIES, None)
    if compute is None:
        return {}

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        # Not while samples are drawn, and not for a reference model, which is not trained.
        kept = latest()
        if kept is not None and result[0].requires_grad:
            args, kwargs = kept.value
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            inputs.setdefault("old_per_token_logps", result[0].detach())
        return result

    return {_LOG_PROBABILITIES: keep}


def refuse_automatic_radius(trainer: Any) -> None:
    """Raise a ValueError if a trainer of policy gradients (GRPO, RLOO) has no number for `sam_rho`.

    Their loss is near 0 throughout: it does not show what was learned, which the rule needs.
    """
    is_policy = hasattr(trainer, "reward_funcs") and hasattr(trainer, _LOG_PROBABILITIES)
    if is_policy and trainer.sam_config.sam_rho is None:
        raise ValueError(
            f"sam_rho=None (auto) is not allowed with {type(trainer).__name__}: the loss of a "
            "policy gradient does not show what was learned. Set a number, such as sam_rho=0.05."
        )


def activation_offloading(trainer: Any) -> AbstractContextManager[Any]:
    """The context in which TRL's `training_step` runs its pass, to offload activations."""
    context: AbstractContextManager[Any] = getattr(
        trainer, "maybe_activation_offload_context", nullcontext()
    )
    return context

"""What trainers of TRL keep outside `compute_loss`, and the second pass needs all the same.

TRL is not imported: its trainers are known by the methods and attributes that are named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .replay import Tape
from .side_effects import shadowed


@contextmanager
def sampling_policy_kept(trainer: Any, tape: Tape) -> Iterator[None]:
    """Record the log-probabilities at w with the call, for those that were not handed any.

    The surrogate of GRPO weighs each sample with the ratio of the policy to the one that drew it
    (arXiv 2402.03300, eq. 3). Where nothing has been updated since, TRL takes the policy at hand
    for the latter, which is right at w. At w + e it would be another policy: the ratio would be 1
    whatever e is, nothing would be clipped, and the samples would count as drawn from a policy that
    drew none. With the log-probabilities at w among its inputs, the second pass computes the
    surrogate that the first one did.
    """
    method = "_get_per_token_logps_and_entropies"
    compute = getattr(trainer, method, None)
    if compute is None:
        yield
        return

    calls_before = len(tape)

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        # Not while samples are drawn, and not of another model, which is not trained.
        if len(tape) > calls_before and result[0].requires_grad:
            inputs = tape.since(calls_before)[-1].inputs
            inputs.setdefault("old_per_token_logps", result[0].detach())
        return result

    with shadowed(trainer, **{method: keep}):
        yield


def activation_offloading(trainer: Any) -> AbstractContextManager[Any]:
    """The context that TRL's `training_step` opens around the passes, to offload activations."""
    context: AbstractContextManager[Any] = getattr(
        trainer, "maybe_activation_offload_context", nullcontext()
    )
    return context

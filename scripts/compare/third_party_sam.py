"""SAM as the package pytorch-optimizer has it, in a Trainer: rows to compare with.

Its classes wrap an optimizer. Used as its documentation shows: the gradient at w is computed first,
then `step(closure)` perturbs, calls the closure for the gradient at w + e, and lets the wrapped
optimizer step. So every update has two passes; its LookSAM too, which needs the second pass in one
update of k alone. All else (data, order, schedule, clipping) is the Trainer's.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
from importlib.util import find_spec
from typing import Any

import torch
from common.script_utils import InputError, closest
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

PACKAGE = "pytorch-optimizer"
OPTIMIZERS = ("SAM", "LookSAM", "FriendlySAM")


def is_installed() -> bool:
    return find_spec("pytorch_optimizer") is not None


def version() -> str:
    return importlib.metadata.version(PACKAGE)


def check(where: str, optimizer: str | None, options: dict[str, Any]) -> None:
    """Raise `InputError` for a class or an option that the package does not have."""
    if optimizer not in OPTIMIZERS:
        raise InputError(
            f"{where}: optimizer {optimizer!r} is not allowed. Allowed: {', '.join(OPTIMIZERS)}"
        )
    parameters = inspect.signature(_optimizer_class(optimizer).__init__).parameters
    known = [n for n in parameters if n not in ("self", "params", "base_optimizer", "kwargs")]
    for name in options:
        if name not in known:
            raise InputError(
                f"{where}: {PACKAGE}'s {optimizer} has no option {name!r}{closest(name, known)}. "
                f"Allowed: {', '.join(known)}"
            )


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    import pytorch_optimizer

    return getattr(pytorch_optimizer, name)


class _StepsWithClosure:
    """Stands before a class of the package: the Trainer calls `step` without a closure."""

    closure: Any = None

    def step(self, closure: Any = None) -> Any:
        return super().step(self.closure)


class ThirdPartyTrainer(Trainer):
    """A Trainer whose optimizer is wrapped in one of pytorch-optimizer's.

    Args:
        optimizer: the name of the class.
        options: its options, rho among them.

    Raises:
        ValueError: the arguments ask for what this loop does not do.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        optimizer: str,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if args.gradient_accumulation_steps > 1 or args.fp16:
            raise ValueError(
                f"{PACKAGE}: gradient_accumulation_steps={args.gradient_accumulation_steps} "
                f"with fp16={args.fp16} is not allowed. Allowed: 1, without fp16."
            )
        inner, inner_options = Trainer.get_optimizer_cls_and_kwargs(args)
        wrapper = type(optimizer, (_StepsWithClosure, _optimizer_class(optimizer)), {})
        # The Trainer would clip the gradient at w, between the two passes. The closure clips.
        self._max_grad_norm, args = args.max_grad_norm, copy.copy(args)
        args.max_grad_norm = 0.0
        super().__init__(
            args=args,
            optimizer_cls_and_kwargs=(
                wrapper,
                {"base_optimizer": inner, **options, **inner_options},
            ),
            **kwargs,
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The pass at w. The second one waits for the optimizer to ask for it."""
        from pytorch_optimizer.optimizer.utils import disable_running_stats, enable_running_stats

        step = super().training_step
        loss = step(model, inputs, num_items_in_batch)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            disable_running_stats(model)  # the package's own answer to BatchNorm's second update
            second_loss = step(model, inputs, num_items_in_batch)
            enable_running_stats(model)
            if self._max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self._max_grad_norm)
            return second_loss

        self.optimizer.optimizer.closure = closure  # inside Accelerate's wrapper
        return loss

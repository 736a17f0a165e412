"""SAM of the package pytorch-optimizer in a Trainer, for comparison.

Its classes wrap an optimizer and are used as their documentation shows: the gradient at w is
computed first, then `step(closure)` perturbs, calls the closure for the gradient at w + e, and lets
the wrapped optimizer step. So every update has two passes, also with its LookSAM, which needs the
second one in one of k updates only. Data, order, schedule and clipping are the Trainer's.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from importlib.util import find_spec
from typing import Any

from common.cli import InputError, closest
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

PACKAGE = "pytorch-optimizer"
OPTIMIZERS = ("SAM", "LookSAM", "FriendlySAM")


def is_installed() -> bool:
    return find_spec("pytorch_optimizer") is not None


def check(where: str, optimizer: str | None, options: dict[str, Any]) -> None:
    """Raise an InputError for a class or an option that the package does not have."""
    if optimizer not in OPTIMIZERS:
        raise InputError(f"{where}: optimizer {optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    parameters = inspect.signature(_optimizer_class(optimizer).__init__).parameters
    known = [n for n in parameters if n not in ("self", "params", "base_optimizer", "kwargs")]
    for name in options:
        if name not in known:
            hint = closest(name, known)
            raise InputError(f"{where}: {PACKAGE}'s {optimizer} has no option {name!r}{hint}")


def _optimizer_class(name: str) -> Any:
    return getattr(importlib.import_module("pytorch_optimizer"), name)


class _StepsWithClosure:
    """Mixin for a class of the package: the Trainer calls `step` without a closure."""

    closure: Any = None

    def step(self, closure: Any = None) -> Any:
        return super().step(self.closure)


class ThirdPartyTrainer(Trainer):
    """A Trainer whose optimizer is wrapped in one of pytorch-optimizer's.

    Args:
        optimizer: the name of the class.
        options: its options, rho among them.
    """

    def __init__(
        self, *, args: TrainingArguments, optimizer: str, options: dict[str, Any], **kwargs: Any
    ) -> None:
        inner, inner_options = Trainer.get_optimizer_cls_and_kwargs(args)
        wrapper = type(optimizer, (_StepsWithClosure, _optimizer_class(optimizer)), {})
        # The Trainer would clip the gradient at w, between the two passes. The closure clips.
        self._max_grad_norm, args = args.max_grad_norm, copy.copy(args)
        args.max_grad_norm = 0.0
        wrapper_options = {"base_optimizer": inner, **options, **inner_options}
        super().__init__(args=args, optimizer_cls_and_kwargs=(wrapper, wrapper_options), **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The pass at w; the optimizer calls the closure for the second one."""
        from pytorch_optimizer.optimizer.utils import disable_running_stats, enable_running_stats

        step = super().training_step
        loss = step(model, inputs, num_items_in_batch)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            disable_running_stats(model)  # the package's own handling of BatchNorm's statistics
            second_loss = step(model, inputs, num_items_in_batch)
            enable_running_stats(model)
            if self._max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self._max_grad_norm)
            return second_loss

        self.optimizer.optimizer.closure = closure  # inside Accelerate's wrapper
        return loss

"""A micro-batch of a Trainer: its `compute_loss` calls become closures of the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..distributed.graph import mixes_losses
from ..engine.recorder import InputKeeper, KeptInputs, RecordedCall
from ..engine.state import patched
from .loss_scale import LossScaleCheck
from .trl import activation_offloading, policy_recorders

if TYPE_CHECKING:
    from .training_state import TrainingState


class LossCalls:
    """The calls of a trainer's `compute_loss`: recorded in the first pass, repeated in the second.

    Between `hook` and `unhook` the trainer's `compute_loss` is the one of this class.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._own = trainer, vars(trainer)
        self.inputs = InputKeeper()
        self.loss_scale = LossScaleCheck()
        self._before: dict[str, Any] = {}
        self._hooks: dict[str, Any] = {}
        self.unhook()
        self._hooks = {"compute_loss": self._on_call, "_prepare_inputs": self._on_inputs}
        self._hooks |= policy_recorders(trainer, lambda: self.latest)

    def hook(self) -> None:
        """Replace the trainer's methods, which may change between steps, with the hooks."""
        self._compute_loss = self._trainer.compute_loss
        self._prepare_inputs = self._trainer._prepare_inputs
        self._before = {name: self._own[name] for name in self._hooks if name in self._own}
        self._own.update(self._hooks)

    def unhook(self) -> None:
        """Restore the methods. May be called repeatedly."""
        self.record: Callable[[Any, Any], Any] | None = None  # takes a call's arguments in a pass
        self.latest: KeptInputs | None = None  # of the latest call in that pass
        self.repeated: KeptInputs | None = None  # of the call that is repeated
        self.is_running = False  # inside a recorded call, of which nested calls are a part
        for name, hook in self._hooks.items():
            if self._own.get(name) is hook:
                if name in self._before:
                    self._own[name] = self._before[name]
                else:
                    del self._own[name]

    def _on_call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_running:
            if self.repeated is not None:
                return loss_in(self.run(*self.repeated.value))
            if self.record is not None and torch.is_grad_enabled():  # not a measurement
                return self.record(args, kwargs)
        return self._compute_loss(*args, **kwargs)

    def _on_inputs(self, inputs: Any) -> Any:
        # Repeated inputs were prepared before they were recorded.
        return self._prepare_inputs(inputs) if self.repeated is None else inputs

    def run(self, args: Any, kwargs: Any) -> Any:
        """Call the trainer's own `compute_loss`."""
        self.is_running = True
        try:
            result = self._compute_loss(*args, **kwargs)
        finally:
            self.is_running = False
        if not self.loss_scale.is_done:
            self.loss_scale.add_loss(loss_in(result))
        return result

    def repeat(self, model: nn.Module, kept: KeptInputs, num_items: Any) -> Tensor:
        """Repeat a call through Trainer's own training step; returns its detached loss."""
        self.inputs.observe(kept)  # those written since the call that recorded them
        self.repeated = kept
        try:
            with activation_offloading(self._trainer):
                loss = Trainer.training_step(self._trainer, model, {}, num_items)
        finally:
            self.repeated = None
        if not self.loss_scale.is_done:
            self.loss_scale.compare(type(self._trainer).__name__, loss)
        return loss


class TrainerMicroBatch:
    """One call of `training_step` of the Trainer's class (an `engine.update.MicroBatch`)."""

    def __init__(
        self,
        training: TrainingState,
        arguments: tuple[nn.Module, dict[str, Any], Any],
        training_step: Callable[[nn.Module, dict[str, Any], Any], Tensor],
        rho: float | None,
    ) -> None:
        trainer = training.trainer
        self._training, self._trainer = training, trainer
        self._arguments, self._training_step = arguments, training_step
        self.rho = rho
        self.update, self.total_updates = trainer.state.global_step, trainer.state.max_steps
        self.is_end = training.layout.is_end_of_update
        self.divisor: int | None = None  # the Trainer divides by the actual number
        self._number = training.engine.micro_batches + 1
        self.is_deferred = training.subset.skips(
            self._number, trainer.current_gradient_accumulation_steps
        )

    def is_measured(self) -> bool:
        return self._training.is_logged()

    def plain(self) -> Tensor:
        auxiliary = self._trainer._sam_auxiliary
        with auxiliary.active() if auxiliary is not None else nullcontext():
            return self._training_step(*self._arguments)

    def ascent(self) -> Tensor:
        """The training step of the Trainer's class, with every `compute_loss` in it recorded."""
        engine, calls = self._training.engine, self._training.calls
        model, _, num_items = self._arguments
        cut = self._training.subset.cut(
            self.update, self._number, self._trainer.sam_select_examples
        )
        recorded: list[KeptInputs] = []
        graphs = set[Any]()

        def record(args: Any, kwargs: Any) -> Any:
            calls.latest = kept = calls.inputs.keep((args, kwargs))
            recorded.append(kept)
            call = RecordedCall(functools.partial(calls.repeat, model, kept, num_items))
            engine.record(call)
            if cut is not None:
                args, kwargs, call.share = cut(args, kwargs)
            if not engine.ledger.is_watched:
                return calls.run(args, kwargs)
            with engine.ledger.of_a_loss() as watch:
                result = calls.run(args, kwargs)
                watch(loss_in(result))
            graphs.add(loss_in(result).grad_fn)
            return result

        calls.record = record
        try:
            if engine.ledger.is_watched:
                with self._refusing_mixed_losses(graphs):
                    loss = self._training_step(*self._arguments)
            else:
                loss = self._training_step(*self._arguments)
        finally:
            calls.record = calls.latest = None
        if not recorded:
            raise RuntimeError(
                f"{type(self._trainer).__name__}.training_step never called compute_loss, so there "
                "is nothing that SAM could replay at w + e. Compute the loss in compute_loss, or "
                "set sam_rho=0."
            )
        if calls.inputs.copies_all:  # otherwise each is observed before it is repeated
            for kept in recorded:
                calls.inputs.observe(kept)
        if not calls.loss_scale.is_done:
            calls.loss_scale.end_ascent(loss)
        return loss

    def _refusing_mixed_losses(self, graphs: set[Any]) -> AbstractContextManager[None]:
        """Refuse to backpropagate more than recorded losses, whose `grad_fn` are in `graphs`."""
        accelerator = self._trainer.accelerator
        whole = accelerator.backward

        def backward(loss: Tensor, **kwargs: Any) -> None:
            if mixes_losses(loss, graphs):
                raise RuntimeError(
                    f"{type(self._trainer).__name__}.training_step adds something to the loss of "
                    "compute_loss, which the second pass would not repeat. Add it in compute_loss, "
                    "or set sam_rho=0."
                )
            whole(loss, **kwargs)

        return patched(accelerator, backward=backward)

    def defer(self) -> None:
        """Record the micro-batch without an ascent pass."""
        (model, inputs, num_items), calls = self._arguments, self._training.calls
        prepared = self._trainer._prepare_inputs(inputs)
        kept = calls.inputs.keep(((model, prepared), {"num_items_in_batch": num_items}))
        closure = functools.partial(calls.repeat, model, kept, num_items)
        self._training.engine.recorder.calls.append(RecordedCall(closure, share=0.0))


def loss_in(result: Any) -> Tensor:
    """The loss that `compute_loss` returned, alone or first in a tuple."""
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss

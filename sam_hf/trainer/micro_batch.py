"""A micro-batch of a Trainer: its `compute_loss` calls become closures of the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
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


class CallReplayer:
    """Repeats recorded calls of `compute_loss` through the Trainer's own training step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.inputs = InputKeeper()
        self.loss_scale = LossScaleCheck()
        self.is_running = False  # a recorded call, so that calls from within it are parts of it

    def run(self, compute_loss: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with patched(self, is_running=True):
            result = compute_loss(*args, **kwargs)
        if not self.loss_scale.is_done:
            self.loss_scale.add_loss(loss_in(result))
        return result

    def replay(self, model: nn.Module, kept: KeptInputs, num_items: Any) -> Tensor:
        """Repeat a recorded call; returns its detached loss."""
        trainer = self._trainer
        compute_loss = trainer.compute_loss
        self.inputs.observe(kept)  # what was written after the call that recorded them

        def repeat(*args: Any, **kwargs: Any) -> Any:
            if self.is_running:
                return compute_loss(*args, **kwargs)
            args, kwargs = kept.value
            return loss_in(self.run(compute_loss, args, kwargs))

        # The inputs were prepared before they were recorded.
        with (
            patched(trainer, compute_loss=repeat, _prepare_inputs=lambda inputs: inputs),
            activation_offloading(trainer),
        ):
            loss = Trainer.training_step(trainer, model, {}, num_items)
        if not self.loss_scale.is_done:
            self.loss_scale.compare(type(trainer).__name__, loss)
        return loss


class TrainerMicroBatch:
    """One call of `training_step` of the Trainer's class (an `engine.update.MicroBatch`)."""

    def __init__(
        self,
        training: TrainingState,
        arguments: tuple[nn.Module, dict[str, Any], Any],
        training_step: Callable[[nn.Module, dict[str, Any], Any], Tensor],
        rho: float,
    ) -> None:
        trainer = training.trainer
        self._training, self._trainer = training, trainer
        self._arguments, self._training_step = arguments, training_step
        self.rho = rho
        self.update, self.total_updates = trainer.state.global_step, trainer.state.max_steps
        self.is_end = training.layout.is_end_of_update
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
        trainer, engine, calls = self._trainer, self._training.engine, self._training.calls
        model, _, num_items = self._arguments
        compute_loss, subset = trainer.compute_loss, self._training.subset
        cut = subset.cut(self.update, self._number, trainer.sam_select_examples)
        recorded: list[KeptInputs] = []
        graphs, whole = set[Any](), trainer.accelerator.backward

        def record(*args: Any, **kwargs: Any) -> Any:
            # Not a measurement without gradients, and not a part of a call that is being recorded.
            if calls.is_running or not torch.is_grad_enabled():
                return compute_loss(*args, **kwargs)
            kept = calls.inputs.keep((args, kwargs))
            recorded.append(kept)
            call = RecordedCall(functools.partial(calls.replay, model, kept, num_items))
            engine.record(call)
            if cut is not None:
                args, kwargs, call.share = cut(args, kwargs)
            if not engine.ledger.is_watched:
                return calls.run(compute_loss, args, kwargs)
            with engine.ledger.of_a_loss() as watch:
                result = calls.run(compute_loss, args, kwargs)
                watch(loss_in(result))
            graphs.add(loss_in(result).grad_fn)
            return result

        def backward(loss: Tensor, **kwargs: Any) -> None:
            if mixes_losses(loss, graphs):
                raise RuntimeError(
                    f"{type(trainer).__name__}.training_step adds something to the loss of "
                    "compute_loss, which the second pass would not repeat. Add it in compute_loss, "
                    "or set sam_rho=0."
                )
            whole(loss, **kwargs)

        recorders = policy_recorders(trainer, lambda: recorded[-1] if recorded else None)
        watched = {"backward": backward} if engine.ledger.is_watched else {}
        with (
            patched(trainer, compute_loss=record, **recorders),
            patched(trainer.accelerator, **watched),
        ):
            loss = self._training_step(*self._arguments)
        if not recorded:
            raise RuntimeError(
                f"{type(trainer).__name__}.training_step never called compute_loss, so there is "
                "nothing that SAM could replay at w + e. Compute the loss in compute_loss, or "
                "set sam_rho=0."
            )
        for kept in recorded:
            calls.inputs.observe(kept)
        if not calls.loss_scale.is_done:
            calls.loss_scale.end_ascent(loss)
        return loss

    def defer(self) -> None:
        """Record the micro-batch without an ascent pass."""
        (model, inputs, num_items), calls = self._arguments, self._training.calls
        prepared = self._trainer._prepare_inputs(inputs)
        kept = calls.inputs.keep(((model, prepared), {"num_items_in_batch": num_items}))
        closure = functools.partial(calls.replay, model, kept, num_items)
        self._training.engine.recorder.calls.append(RecordedCall(closure, share=0.0))


def loss_in(result: Any) -> Tensor:
    """The loss that `compute_loss` returned, alone or first in a tuple."""
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss

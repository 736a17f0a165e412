"""How one update is made sharpness-aware: which passes, at which weights, with what effect.

One update, with the symbols of the SAM paper: the ascent pass at w is the trainer's own, untouched
training step, and it is recorded; when the scope is complete the method turns the gradient g into
the perturbation e; the recorded calls are replayed at w + e, which leaves g_s in `.grad`; w is put
back. What follows (clipping, the optimizer, the schedule, logging) is the Trainer's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .adapters import AuxiliaryAdapter
from .combination import momentum_of
from .config import SAMConfig
from .integrations import activation_offloading, sampling_policy_kept
from .perturbation import Perturbation
from .readings import log_is_due
from .replay import RandomState, RecordedCall
from .run import Run
from .sampling import select_examples
from .schedule import interval_of, learning_rate_share, rho_at
from .side_effects import SideEffects, shadowed, undoing

# Attributes of a trainer that the second pass leaves as they are: examples (large, and not changed
# by a training step), and the control, which a signal's handler may have asked to stop.
_NOT_RESTORED = ("train_dataset", "eval_dataset", "control")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class UpdateMixin(_Base):
    """The training step of `SAMTrainerMixin`."""

    if TYPE_CHECKING:
        _sam_run: Run | None
        _sam_auxiliary: AuxiliaryAdapter | None
        _sam_is_replaying: bool
        _sam_warned_of_rounding: bool

        @property
        def sam_config(self) -> SAMConfig: ...

        def _sam_new_run(self) -> Run: ...

    # ---- One micro-batch ---------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The Trainer's training step, and the second pass where the scope of e is complete.

        Returns the loss at w, detached (with MSAM, which never is at w, that at w + e). Nobody
        outside ever sees w + e.
        """
        config, update = self.sam_config, self.state.global_step
        if config.sam_rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._sam_run is None:
            self._sam_run = self._sam_new_run()
        run = self._sam_run
        run.was_reached = True
        run.forget_calls_without_gradient()
        step = functools.partial(super().training_step, model)
        rho = 0.0
        if config.perturbs(update, self.state.max_steps):
            share = learning_rate_share(self.optimizer)
            rho = rho_at(config, update, self.state.max_steps, share)
        run.combination.rho = rho
        with run.micro_batch():
            if rho > 0 and run.method.along_momentum:
                return self._sam_one_pass(run, model, rho, step, inputs, num_items_in_batch)
            if (
                rho > 0
                and run.method.perturbs
                and run.method.should_perturb(update, run.memory.state)
            ):
                return self._sam_two_passes(run, model, rho, step, inputs, num_items_in_batch)
            with self._sam_auxiliary.active() if self._sam_auxiliary else nullcontext():
                loss = step(inputs, num_items_in_batch)
            run.count_passes(1)
            if rho > 0 and run.backend.is_end_of_update:
                run.combination.reuse()
            return loss

    def sam_select_examples(self, inputs: Any, indices: Tensor) -> Any:
        """The inputs of some examples of a micro-batch, for `sam_ascent_fraction`.

        Override it for inputs that are not tensors and lists with a row for each example, and in a
        trainer whose `compute_loss` is not the Trainer's own, which then gets a part of each
        micro-batch too.

        Args:
            inputs: what `compute_loss` is given.
            indices: 1-dimensional, on the CPU, in ascending order.
        """
        select = getattr(super(), "sam_select_examples", select_examples)  # of a wrapped class
        return select(inputs, indices)

    # ---- One pass along the momentum ---------------------------------------------------------

    def _sam_one_pass(
        self,
        run: Run,
        model: nn.Module,
        rho: float,
        step: Callable[..., Tensor],
        inputs: dict[str, Any],
        num_items_in_batch: Any,
    ) -> Tensor:
        """The trainer's own training step, at w + e."""
        run.count_passes(1)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        momentum = momentum_of(optimizer, run.perturbed)
        if not momentum:
            return step(inputs, num_items_in_batch)
        is_measured = self._sam_is_measured(run)
        perturbed: dict[str, Tensor] = {name: run.perturbed[name] for name in momentum}
        perturbation = Perturbation(run.backend.local(list(perturbed.values())))
        is_complete = False

        def undo() -> None:
            if is_measured and is_complete and perturbation.saved is not None:
                run.measure(perturbed, perturbation)
            perturbation.restore()
            if not is_complete:
                run.backend.recover(model)

        with undoing(undo):
            run.perturb_along_momentum(momentum, perturbation, rho)
            loss = step(inputs, num_items_in_batch)
            is_complete = True
        return loss

    # ---- Two passes --------------------------------------------------------------------------

    def _sam_two_passes(
        self,
        run: Run,
        model: nn.Module,
        rho: float,
        step: Callable[..., Tensor],
        inputs: dict[str, Any],
        num_items_in_batch: Any,
    ) -> Tensor:
        each_alone = self.sam_config.sam_scope == "micro_batch"
        if each_alone or not len(run.tape):
            run.buffers.watch()
        if run.micro_batches == 1 and self.args.enable_jit_checkpoint:
            run.memory.keep(self.state.global_step)
        is_end = run.backend.is_end_of_update
        # With an e of its own, a micro-batch must not see the gradient of those before it.
        with run.gradients_set_aside() if each_alone else nullcontext():
            if run.ascent.leaves_out(run.micro_batches, self.current_gradient_accumulation_steps):
                loss = self._sam_put_off(run, model, inputs, num_items_in_batch)
                if is_end:
                    run.backend.reduce_ascent(list(run.trained.values()))
            else:
                some = run.taken_alone(self.state.global_step)
                with (
                    run.backend.ascent_for(some, model, each_alone)
                    if some
                    else run.backend.ascent(model, each_alone)
                ):
                    loss = self._sam_ascent(run, step, inputs, num_items_in_batch)
            if each_alone or is_end:
                self._sam_descent(run, model, rho, each_alone)
        return loss

    def _sam_ascent(
        self, run: Run, step: Callable[..., Tensor], inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The pass at w: the trainer's own training step, recorded."""
        calls_before = len(run.tape)
        cut = run.ascent.cut_for(self, run.micro_batches)
        with (
            run.tape.recording(self, self.compute_loss, num_items_in_batch, cut) as recorder,
            shadowed(self, compute_loss=recorder),
            sampling_policy_kept(self, run.tape),
        ):
            # A copy: a captured CUDA graph leaves the loss of every pass in the same memory.
            loss = step(inputs, num_items_in_batch).clone()
            calls = run.tape.since(calls_before)
            if not calls:
                raise RuntimeError(
                    f"{type(self).__name__}.training_step never called compute_loss, so there is "
                    "nothing that SAM could replay at w + e. Compute the loss in compute_loss, or "
                    "set sam_rho=0."
                )
            run.loss_scale.note(calls, loss)
            for call in calls:
                call.weight = 1 / len(calls)  # one pass, in so many calls
            run.count_passes(sum(call.share * call.weight for call in calls))
            run.add_ascent_loss(loss)
        return loss

    def _sam_put_off(
        self, run: Run, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """Leave a micro-batch to the descent pass alone. Its loss at w is taken to be the mean of
        those of the update that are known, which is unbiased: micro-batches are drawn alike."""
        prepared = self._prepare_inputs(inputs)
        run.tape.put_off((model, prepared), {"num_items_in_batch": num_items_in_batch})
        return run.mean_ascent_loss()

    def _sam_descent(self, run: Run, model: nn.Module, rho: float, each_alone: bool) -> None:
        """The pass at w + e: leaves g_s in `.grad`, and everything else as the ascent left it."""
        calls = run.tape.take()
        ascent_loss = run.take_ascent_loss(calls)
        update = self.state.global_step
        perturbed = run.perturbed_with_gradient(update)
        # These examples may not touch what is perturbed: then e is 0, and g is g_s.
        g_is_g_s = not perturbed and run.ascent.is_whole and not run.taken_alone(update)
        if g_is_g_s and not run.backend.descent_is_awaited(each_alone):
            return
        if perturbed and not run.is_triggered(update, self.state.max_steps):
            return
        is_measured = bool(perturbed) and self._sam_is_measured(run)
        perturbation = Perturbation(run.backend.local(list(perturbed.values())))
        with_gradients = torch.is_grad_enabled()
        is_complete = False

        def put_back() -> None:
            if is_measured and perturbation.saved is not None:
                run.measure(perturbed, perturbation)
            perturbation.restore()

        def undo() -> None:
            torch.set_grad_enabled(with_gradients)  # an interrupt may have struck a `no_grad`
            perturbation.restore()
            if not is_complete:
                run.discard_update()  # a part of g_s is no gradient to step with
                run.backend.recover(model)

        with undoing(undo):
            if perturbed:
                self._sam_perturb(run, perturbed, perturbation, rho, is_measured)
            run.clear_gradients()
            if run.backend.reduces_kept_gradients:
                run.put_back_gradients()
            with run.backend.descent(put_back):
                descent_loss = self._sam_replay(run, model, calls, each_alone)
            run.combination.combine()
            is_complete = True
        if perturbed:
            run.add_sharpness(descent_loss - ascent_loss)

    # ---- The parts of the second pass --------------------------------------------------------

    def _sam_perturb(
        self,
        run: Run,
        perturbed: dict[str, Tensor],
        perturbation: Perturbation,
        rho: float,
        is_measured: bool,
    ) -> None:
        """w becomes w + e."""
        scale = run.perturb(perturbed, perturbation, rho, is_measured)
        # Waits for the device until it has warned. An e of 0 (fp16 may overflow) tells nothing.
        if run.backend.half and not self._sam_warned_of_rounding and scale.item() != 0:
            self._sam_warned_of_rounding = True
            warnings.warn(
                f"Some perturbed weights are stored in half precision, where "
                f"{perturbation.swallowed_share():.1%} of them are the same at w + e as at w: "
                "rounding swallowed the perturbation. Load the model in float32 and train with "
                "bf16=True or fp16=True, which compute in half precision and store in float32.",
                stacklevel=2,
            )

    def _sam_replay(
        self, run: Run, model: nn.Module, calls: list[RecordedCall], each_alone: bool
    ) -> Tensor:
        """Run the recorded calls through the base training step; the sum of their losses."""
        config = self.sam_config
        losses, flos = [], 0.0
        with (
            run.buffers.preserved() if config.sam_freeze_norm_stats else nullcontext(),
            self._sam_unseen(run) as random_states,
            activation_offloading(self),
        ):
            for i, call in enumerate(calls, start=1):
                # The Trainer counts a whole pass for each micro-batch.
                share = run.cost_of_ascent(self.state.global_step) * call.share
                flos += share * float(self.floating_point_ops(call.inputs))
                if config.sam_replay_rng:
                    # A first pass over a part has drawn less than this one will: the calls after
                    # it go on from here, or they would draw the same.
                    goes_on = call.random_state is None or (call.share < 1 and i > 1)
                    state = random_states[-1] if goes_on else call.random_state
                    assert state is not None
                    state.restore()
                # Coefficients that the calls adapt are where the call found them.
                vars(self).update(call.attributes)
                self._sam_is_replaying = True
                replayed = functools.partial(call.repeat, self.compute_loss)
                # The inputs were prepared before they were recorded.
                with (
                    shadowed(self, compute_loss=replayed, _prepare_inputs=lambda inputs: inputs),
                    run.backend.replaying(model, i == len(calls), each_alone),
                ):
                    loss = Trainer.training_step(self, model, {}, call.num_items_in_batch)
                losses.append(loss.clone())
                if call.share < 1:
                    random_states.append(RandomState(run.backend.rng_devices))
        self.current_flos += round(flos)
        run.count_passes(sum(call.weight for call in calls))
        run.loss_scale.check(type(self).__name__, calls[0], losses[0])
        return torch.stack(losses).sum()

    @contextmanager
    def _sam_unseen(self, run: Run) -> Iterator[list[RandomState]]:
        """What happens inside leaves no trace in the trainer, its logs and the random state.

        Gives a list; the random state that is its last entry at the end is put back.
        """
        random_states = [RandomState(run.backend.rng_devices)]
        side_effects = SideEffects(self, self.state, skip=_NOT_RESTORED)
        is_complete = False

        def undo() -> None:
            side_effects.restore()
            # Masks of its own advance the generators; those of a failed pass count for nothing.
            if self.sam_config.sam_replay_rng or not is_complete:
                random_states[-1 if is_complete else 0].restore()

        with undoing(undo):
            yield random_states
            is_complete = True

    # ---- Readings ----------------------------------------------------------------------------

    def _sam_is_measured(self, run: Run) -> bool:
        """Whether a log will show the readings of these examples."""
        # Of the micro-batches of an update, the last one is measured.
        return run.backend.is_end_of_update and log_is_due(
            self.args, self.state, interval_of(self.sam_config), run.backend.is_end_of_epoch
        )

"""Per-run training state: how the calls of a Trainer become closures of the engine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..compat import saves_within_updates
from ..distributed import layout_for, reshard
from ..distributed.validation import can_cut_micro_batches, overrides, why_not_deferred
from ..engine.method_state import MethodStateCheckpoint
from ..engine.parameters import TrainedParameters, canonical_name
from ..engine.radius import RadiusCheck
from ..engine.schedule import describe_cost, interval_of, learning_rate_share, rho_at
from ..engine.state import StateTracker, call_and_restore, patched
from ..engine.subset import AscentSubset
from ..engine.update import UpdateEngine
from .micro_batch import LossCalls, TrainerMicroBatch
from .trl import refuse_automatic_radius

if TYPE_CHECKING:
    from .mixin import SAMTrainerMixin

# Attributes of a trainer that are not state of its passes: data, the model, the control (where a
# signal handler may request a stop), and those that stay the same in a run. All others are
# copied in every pass.
_NOT_STATE = """
train_dataset eval_dataset data_collator processing_class model model_wrapped model_init deepspeed
args control accelerator optimizer lr_scheduler optimizer_cls_and_kwargs callback_handler
compute_loss _prepare_inputs compute_loss_func compute_metrics preprocess_logits_for_metrics
floating_point_ops gather_function is_deepspeed_enabled is_fsdp_enabled is_model_parallel
is_fsdp_xla_enabled is_in_train is_fsdp_xla_v1_enabled is_fsdp_xla_v2_enabled
is_distributed_loading_by_transformers hub_model_id hp_name place_model_on_device
model_accepts_loss_kwargs label_names can_return_loss _loss_shifts_labels label_smoother
neftune_noise_alpha hp_search_backend _memory_tracker _loggers_initialized _trial
_signature_columns _train_batch_size _created_lr_scheduler _mixed_mesh_grads _initial_global_step
_initial_num_input_tokens_seen state stateful_callbacks max_steps logging_steps eval_steps
save_steps train_batch_size num_train_epochs is_local_process_zero is_world_process_zero
is_hyper_param_search trial_name trial_params best_metric best_global_step best_model_checkpoint
_tr_loss _total_loss_scalar _globalstep_last_logged _sam_config _sam_training _sam_resumed_from
_sam_auxiliary _sam_saved_in
"""


class TrainingState:
    """State of one `train()`: the engine, and the closures that connect it to the Trainer.

    The Trainer must have prepared its model and its optimizer.
    """

    def __init__(self, trainer: SAMTrainerMixin) -> None:
        self.trainer = trainer
        self.config = config = trainer.sam_config
        refuse_automatic_radius(trainer)
        model, args, optimizer = trainer.model, trainer.args, trainer.optimizer
        assert model is not None
        reshard(model)
        parameters = TrainedParameters(model, optimizer, config.sam_params)
        self.layout = layout = layout_for(trainer, list(parameters.selected.values()))
        # Frozen ones too: those that a callback unfroze in an earlier run may have a state.
        everything = {canonical_name(name): p for name, p in model.named_parameters()}
        state = MethodStateCheckpoint(config, config.build_method(), layout, everything)
        self.method_state = state
        modules = list(model.modules())
        trained = list(parameters.trained.values())
        tracked, ignored = (modules, []) if config.sam_freeze_norm_stats else ([], modules)
        tracker = StateTracker(
            [trainer, trainer.state], tracked, _NOT_STATE.split(), [*ignored, *trained]
        )
        # DeepSpeed moves all gradients but those of the ascent pass out of `.grad`.
        is_watched = _may_write_gradients(trainer) and not trainer.is_deepspeed_enabled
        self.engine = UpdateEngine(
            config, layout, parameters, optimizer, tracker, is_watched, args.seed, state
        )
        sizes = trainer._train_batch_size, args.gradient_accumulation_steps
        can_cut, can_defer = can_cut_micro_batches(trainer), why_not_deferred(trainer) is None
        self.subset = AscentSubset(
            config.sam_ascent_fraction, *sizes, can_cut, can_defer, args.seed
        )
        self.calls = LossCalls(trainer)
        self.was_reached = False  # whether the Trainer has called `training_step`
        self.first_update: int = trainer.state.global_step
        self._interval = interval_of(config)
        self._check = RadiusCheck(config)
        self._ascent_flos = 0.0  # of the update, for its calls that are yet to be replayed
        self._flos_are_due = False
        self._flos_of = trainer.floating_point_ops
        self._patches = ExitStack()
        self._patches.enter_context(patched(trainer, floating_point_ops=self._count_flos))
        if is_watched and layout.hides_gradients:
            self._patches.callback(model.register_forward_hook(self._refuse_hidden).remove)

    def close(self) -> None:
        self._patches.close()
        self.engine.close()

    def _refuse_hidden(self, *_: Any) -> None:
        is_foreign = torch.is_grad_enabled() and not self.calls.is_running
        if is_foreign and not self.layout.is_end_of_update:
            raise RuntimeError(
                "The model is run in training_step outside of compute_loss, before the last micro-"
                "batch of an update, where FSDP2 does not expose gradients. Run it in "
                "compute_loss, or set gradient_accumulation_steps=1 or sam_rho=0."
            )

    # ---- A micro-batch -----------------------------------------------------------------------

    def step(
        self,
        arguments: tuple[nn.Module, dict[str, Any], Any],
        training_step: Callable[[nn.Module, dict[str, Any], Any], Tensor],
    ) -> Tensor:
        """Run `training_step` of the Trainer's class, and the second pass where e's scope ends."""
        trainer, config = self.trainer, self.config
        self.was_reached = True
        update, total = trainer.state.global_step, trainer.state.max_steps
        follows_rate = config.sam_rho_schedule == "learning_rate"
        share = learning_rate_share(trainer.optimizer) if follows_rate else 1.0
        if self.engine.micro_batches == 0:
            self._ascent_flos = 0.0
            self.calls.loss_scale.start_update()
            if saves_within_updates(trainer.args):
                self.method_state.keep(update)
        self._flos_are_due = True
        rho = rho_at(config, update, total, share)
        batch = TrainerMicroBatch(self, arguments, training_step, rho)

        def run() -> Tensor:
            self.calls.hook()
            return self.engine.step(batch)

        return call_and_restore(run, self.calls.unhook)

    # ---- Counting and logging ----------------------------------------------------------------

    def _count_flos(self, inputs: dict[str, Any]) -> int:
        """`floating_point_ops` of the trainer, with both passes.

        The Trainer counts one pass after each training step: the descent pass. The ascent passes of
        an update are added when its calls have been replayed.
        """
        flos = self._flos_of(inputs)
        if not self._flos_are_due:
            return flos
        self._flos_are_due = False
        self._ascent_flos += self.engine.latest_ascent_cost * flos
        if not self.engine.has_replayed:
            return flos
        total, self._ascent_flos = flos + self._ascent_flos, 0.0
        return round(total)

    def is_logged(self) -> bool:
        """Whether a log will show the metrics of this micro-batch, the last one of its update."""
        args, state, layout = self.trainer.args, self.trainer.state, self.layout
        interval = self._interval
        if not layout.is_end_of_update:
            return False
        if args.logging_strategy == IntervalStrategy.STEPS:
            update, is_first = state.global_step, state.global_step == 0 and args.logging_first_step
            every = max(int(state.logging_steps or args.logging_steps), 1)
            return is_first or (update + interval) // every > update // every
        is_epoch = args.logging_strategy == IntervalStrategy.EPOCH
        return is_epoch and (layout.is_end_of_epoch or interval > 1)

    def add_metrics(self, logs: dict[str, float]) -> None:
        """Add the `sam_*` metrics to a log. Every process must call this."""
        metrics = self.engine.metrics.pop(self.layout.sum_over_processes)
        if self.trainer.is_world_process_zero():
            self._check.add(metrics, logs.get("loss"), self.trainer.state.global_step)
        logs.update(metrics)

    # ---- The events of a run -----------------------------------------------------------------

    def describe(self) -> None:
        """Print one line on what the run costs."""
        state = self.trainer.state
        if state.is_world_process_zero:
            rate = learning_rate_share(self.trainer.optimizer) if state.global_step == 0 else 1.0
            line = describe_cost(self.config, state.max_steps, self.subset.share, rate)
            # Above a progress bar, and on its stream: a program may parse stdout.
            tqdm.write(line, file=sys.stderr)

    def require_training_step(self) -> None:
        """Raise RuntimeError in a training loop that bypasses `training_step`."""
        if not self.was_reached:
            raise RuntimeError(
                f"{type(self.trainer).__name__} updates the weights without the training_step of "
                "SAMTrainerMixin, so that its updates are not sharpness-aware. Let its train() and "
                "training_step() call super()'s, or set sam_rho=0."
            )

    def end(self) -> None:
        """Warn at the end of training if nothing was perturbed."""
        state, config, engine = self.trainer.state, self.config, self.engine
        if state.global_step <= self.first_update:
            return
        self.require_training_step()
        if state.is_world_process_zero:
            self._check.end()
        is_plain = engine.method.perturbs and not engine.perturbed_updates
        if is_plain and state.is_world_process_zero:
            warnings.warn(
                f"Training ended after {state.global_step} of {state.max_steps} updates without a "
                f"single SAM update: these weights are those of plain training. Of the options, "
                f"sam_start_ratio={config.sam_start_ratio:g}, sam_interval={config.sam_interval}, "
                f"sam_trigger={config.sam_trigger!r} and the schedule of rho decide which updates "
                f"are perturbed; sam_params={config.sam_params!r} must select parameters that get "
                "a gradient.",
                stacklevel=2,
            )


def _may_write_gradients(trainer: Any) -> bool:
    """Whether other code may write gradients around a recorded loss: a class's own training step,
    or a callback between the micro-batches of an update."""
    inherited = TrainerCallback.on_substep_end
    return overrides(type(trainer), "training_step") or any(
        getattr(callback.on_substep_end, "__func__", None) is not inherited
        and not type(callback).__module__.startswith("transformers.")
        for callback in trainer.callback_handler.callbacks
    )

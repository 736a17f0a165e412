"""The mixin that makes a Trainer's update sharpness-aware: when to do what.

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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .backends import refuse_what_cannot_work
from .config import SAMConfig
from .guard import RunGuard, checked_space
from .integrations import activation_offloading, sampling_policy_kept
from .perturbation import Perturbation
from .publishing import PublishingMixin
from .readings import log_is_due
from .replay import RandomState, RecordedCall
from .run import Run
from .side_effects import SideEffects, shadowed, undoing

# Attributes of a trainer that the second pass leaves as they are: examples (large, and not changed
# by a training step), and the control, which a signal's handler may have asked to stop.
_NOT_RESTORED = ("train_dataset", "eval_dataset", "control")


class SAMTrainerMixin(PublishingMixin):
    """Makes the updates of the Trainer class that stands behind it sharpness-aware.

    ``class MySAMTrainer(SAMTrainerMixin, MyTrainer): ...``

    Args:
        sam_config: the options. If left out, they are read from `args` where that is a `SAMConfig`
            too (`SAMTrainingArguments`), else the defaults hold.
        *args, **kwargs: those of the Trainer class.

    Raises:
        TypeError: when a class is made in which the mixin stands behind Trainer, where it would do
            nothing.
        ValueError: for options that are not allowed, and for optimizers, layouts and models that
            cannot be trained with SAM (`backends.refuse_what_cannot_work`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if Trainer in mro and mro.index(Trainer) < mro.index(SAMTrainerMixin):
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                f"class {cls.__name__}({bases}): SAMTrainerMixin stands behind Trainer and would "
                "do nothing. Put it before the trainer class, or use with_sam(trainer_class)."
            )

    def __init__(self, *args: Any, sam_config: SAMConfig | None = None, **kwargs: Any) -> None:
        if sam_config is not None and not isinstance(sam_config, SAMConfig):
            raise TypeError(
                f"sam_config={sam_config!r} is not allowed. Allowed: a SAMConfig or None."
            )
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            # TRL's trainers copy arguments of another class into one of their own.
            if "unexpected keyword argument 'sam_" not in str(error):
                raise
            raise TypeError(
                f"{type(self).__name__} takes arguments of a class of its own ({error}). Pass that "
                "class with sam_config=SAMConfig(...) beside it, or one that is both: "
                "`@dataclass class MyConfig(SAMConfig, TheirConfig): ...`."
            ) from error
        if sam_config is not None and isinstance(self.args, SAMConfig):
            raise ValueError(
                "Both sam_config and args hold SAM options. Pass sam_config with plain "
                "TrainingArguments, or SAMTrainingArguments alone."
            )
        self._sam_config = sam_config or SAMConfig()
        self._sam_run: Run | None = None
        self._sam_is_replaying = False
        self._sam_warned_of_rounding = False
        self._sam_check()
        self.add_callback(RunGuard(self))

    @property
    def sam_config(self) -> SAMConfig:
        """The options in force: those in `args`, if it has any, so that a search can set them."""
        return self.args if isinstance(self.args, SAMConfig) else self._sam_config

    def _sam_check(self) -> None:
        self.sam_config.validate_sam()
        if self.sam_config.sam_rho > 0:
            refuse_what_cannot_work(self, self.sam_config.sam_params)

    def _sam_new_run(self) -> Run:
        return Run(self.sam_config, self)

    # ---- One run -----------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._sam_run = None  # it holds the inputs of an update that was not completed

    def hyperparameter_search(
        self, hp_space: Callable[[Any], dict[str, Any]] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's search, which may set options of SAM where `args` holds them.

        Raises:
            ValueError: `hp_space` names an option of SAM that `args` does not have.
        """
        space = None if hp_space is None else checked_space(self.args, hp_space)
        return super().hyperparameter_search(space, *args, **kwargs)

    # ---- One micro-batch ---------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The Trainer's training step, and the second pass where the scope of e is complete.

        Returns the loss at w, detached. Nobody outside ever sees w + e.
        """
        if self.sam_config.sam_rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._sam_run is None:
            self._sam_run = self._sam_new_run()
        run = self._sam_run
        run.was_reached = True
        if not self.sam_config.perturbs(self.state.global_step, self.state.max_steps):
            return super().training_step(model, inputs, num_items_in_batch)

        each_alone = self.sam_config.sam_scope == "micro_batch"
        run.forget_calls_without_gradient()
        if each_alone or not len(run.tape):
            run.buffers.watch()
        # With an e of its own, a micro-batch must not see the gradient of those before it.
        with run.gradients_set_aside() if each_alone else nullcontext():
            with run.backend.ascent(model, each_alone):
                loss = self._sam_ascent(run, model, inputs, num_items_in_batch)
            if each_alone or run.backend.is_end_of_update:
                self._sam_descent(run, model, each_alone)
        return loss

    def _sam_ascent(
        self, run: Run, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The pass at w: the trainer's own training step, recorded."""
        calls_before = len(run.tape)
        with (
            run.tape.recording(self, self.compute_loss, num_items_in_batch) as recorder,
            shadowed(self, compute_loss=recorder),
            sampling_policy_kept(self, run.tape),
        ):
            # A copy: a captured CUDA graph leaves the loss of every pass in the same memory.
            loss = super().training_step(model, inputs, num_items_in_batch).clone()
            calls = run.tape.since(calls_before)
            if not calls:
                raise RuntimeError(
                    f"{type(self).__name__}.training_step never called compute_loss, so there is "
                    "nothing that SAM could replay at w + e. Compute the loss in compute_loss, or "
                    "set sam_rho=0."
                )
            run.note_loss_scale(calls, loss)
            run.add_ascent_loss(loss)
        return loss

    def _sam_descent(self, run: Run, model: nn.Module, each_alone: bool) -> None:
        """The pass at w + e: leaves g_s in `.grad`, and everything else as the ascent left it."""
        calls = run.tape.take()
        ascent_loss = run.take_ascent_loss()
        perturbed = run.perturbed_with_gradient()
        # These examples may not touch what is perturbed: then e is 0, and g is g_s.
        if not perturbed and not run.backend.descent_is_awaited(each_alone):
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
                self._sam_perturb(run, perturbed, perturbation, is_measured)
            run.clear_gradients()
            if run.backend.reduces_kept_gradients:
                run.put_back_gradients()
            with run.backend.descent(put_back):
                descent_loss = self._sam_replay(run, model, calls, each_alone)
            is_complete = True
        run.add_sharpness(descent_loss - ascent_loss, is_last=run.backend.is_end_of_update)

    # ---- The parts of the second pass --------------------------------------------------------

    def _sam_perturb(
        self,
        run: Run,
        perturbed: dict[str, Tensor],
        perturbation: Perturbation,
        is_measured: bool,
    ) -> None:
        """w becomes w + e."""
        scale = run.perturb(perturbed, perturbation, self.sam_config.sam_rho, is_measured)
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
        losses, flos = [], 0
        with (
            run.buffers.preserved() if config.sam_freeze_norm_stats else nullcontext(),
            self._sam_unseen(run),
            activation_offloading(self),
        ):
            for i, call in enumerate(calls, start=1):
                flos += self.floating_point_ops(call.inputs)
                if config.sam_replay_rng:
                    call.random_state.restore()
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
        self.current_flos += flos  # the loop counts the ascent alone
        run.check_loss_scale(type(self).__name__, calls[0], losses[0])
        return torch.stack(losses).sum()

    @contextmanager
    def _sam_unseen(self, run: Run) -> Iterator[None]:
        """What happens inside leaves no trace in the trainer, its logs and the random state."""
        random_state = RandomState(run.backend.rng_devices)
        side_effects = SideEffects(self, self.state, skip=_NOT_RESTORED)
        is_complete = False

        def undo() -> None:
            side_effects.restore()
            # Masks of its own advance the generators; those of a failed pass count for nothing.
            if self.sam_config.sam_replay_rng or not is_complete:
                random_state.restore()

        with undoing(undo):
            yield
            is_complete = True

    # ---- Readings ----------------------------------------------------------------------------

    def _sam_is_measured(self, run: Run) -> bool:
        """Whether a log will show the readings of these examples."""
        # Of the micro-batches of an update, the last one is measured.
        return run.backend.is_end_of_update and log_is_due(
            self.args, self.state, self.sam_config.sam_interval, run.backend.is_end_of_epoch
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's `log`, with the readings of SAM beside the training loss."""
        if self._sam_is_replaying:
            return  # the first pass has said it
        if self._sam_run is not None and "loss" in logs and "learning_rate" in logs:
            # All processes come here: the Trainer has gathered the loss just before.
            logs.update(self._sam_run.readings.pop(self._sam_run.backend.sum_over_processes))
        super().log(logs, *args, **kwargs)


class SAMTrainer(SAMTrainerMixin, Trainer):
    """`transformers.Trainer` with sharpness-aware updates (SAM, ASAM)."""


class SAMSeq2SeqTrainer(SAMTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with sharpness-aware updates (SAM, ASAM)."""


_SUBCLASSES: dict[type[Trainer], type[Trainer]] = {
    Trainer: SAMTrainer,
    Seq2SeqTrainer: SAMSeq2SeqTrainer,
}


def with_sam(trainer_class: type[Trainer]) -> type[Trainer]:
    """The subclass of `trainer_class` whose updates are sharpness-aware.

    ``with_sam(SFTTrainer)`` is ``class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer)``. The same class
    comes back from every call.

    Raises:
        TypeError: `trainer_class` is no subclass of Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(
            f"with_sam({trainer_class!r}) is not allowed. Allowed: transformers.Trainer or a "
            "subclass of it."
        )
    if issubclass(trainer_class, SAMTrainerMixin):
        return trainer_class
    if trainer_class not in _SUBCLASSES:
        names = {"__doc__": f"`{trainer_class.__name__}` with sharpness-aware updates."}
        bases = (SAMTrainerMixin, trainer_class)
        _SUBCLASSES[trainer_class] = type(f"SAM{trainer_class.__name__}", bases, names)
    return _SUBCLASSES[trainer_class]

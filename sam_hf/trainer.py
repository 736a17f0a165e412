"""The mixin that makes a Trainer's updates sharpness-aware, and the trainers made with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from .adapters import AuxiliaryAdapter, refuse_without_lora
from .backends import refuse_what_cannot_work
from .config import SAMConfig
from .guard import RunGuard, checked_space
from .methods.factors import is_auxiliary
from .options_file import changed_since
from .publishing import PublishingMixin
from .run import Run
from .sampling import refuse_what_cannot_be_cut
from .update import UpdateMixin


class SAMTrainerMixin(UpdateMixin, PublishingMixin):
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
        self._sam_resumed_from: Path | None = None
        self._sam_auxiliary: AuxiliaryAdapter | None = None
        self._sam_is_replaying = False
        self._sam_warned_of_rounding = False
        self._sam_check()
        if self._sam_needs_auxiliary:
            if self.optimizer is not None:
                raise ValueError(
                    f"sam_method={self.sam_config.sam_method!r} adds parameters that the optimizer "
                    "must train too, and one was passed in `optimizers`. Let the trainer make it "
                    "(`optim`)."
                )
            self._sam_add_auxiliary()
        # Before the others, which may save the model when training ends.
        self.callback_handler.callbacks.insert(0, RunGuard(self))

    @property
    def sam_config(self) -> SAMConfig:
        """The options in force: those in `args`, if it has any, so that a search can set them."""
        return self.args if isinstance(self.args, SAMConfig) else self._sam_config

    def _sam_check(self) -> None:
        self.sam_config.validate_sam()
        if self.sam_config.sam_rho > 0:
            refuse_what_cannot_work(self, self.sam_config.sam_params)
            refuse_what_cannot_be_cut(self)
            if self.sam_config.build_method().needs_adapters:
                refuse_without_lora(self.model, self.sam_config.sam_method)

    def _sam_new_run(self) -> Run:
        if self._sam_run is not None:
            self._sam_run.close()
        run = Run(self.sam_config, self)
        if self._sam_resumed_from is not None:
            run.memory.load(self._sam_resumed_from)
        return run

    # ---- One run -----------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`."""
        if self._sam_needs_auxiliary and not self._sam_has_auxiliary:
            self.optimizer = None  # that of the run before trained a pair that was dropped
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._sam_run is not None:
                self._sam_run.close()
            self._sam_run = None  # it holds the inputs of an update that was not completed
            self._sam_drop_auxiliary()
            self._sam_resumed_from = None

    @property
    def _sam_needs_auxiliary(self) -> bool:
        return self.sam_config.sam_rho > 0 and self.sam_config.build_method().needs_auxiliary

    @property
    def _sam_has_auxiliary(self) -> bool:
        return self._sam_auxiliary is not None and self._sam_auxiliary.is_in(self.model)

    def _sam_add_auxiliary(self) -> None:
        """Also to a new model (model_init), and again in a second run."""
        if self._sam_needs_auxiliary and not self._sam_has_auxiliary:
            self._sam_auxiliary = AuxiliaryAdapter(self.model, self.sam_config.sam_rank)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the pair that climbs among the parameters."""
        self._sam_add_auxiliary()
        return super().create_optimizer(*args, **kwargs)

    def _sam_drop_auxiliary(self) -> None:
        if self._sam_auxiliary is not None:
            self._sam_auxiliary.remove()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, without the factors that climb."""
        return [n for n in super().get_decay_parameter_names(model) if not is_auxiliary(n)]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._sam_add_auxiliary()
        super()._load_from_checkpoint(*args, **kwargs)
        if self._sam_auxiliary is not None:
            self._sam_auxiliary.make_trainable()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            self._sam_resumed_from = None
            return
        self._sam_resumed_from = Path(checkpoint)
        changes = changed_since(Path(checkpoint), self.sam_config.to_sam_dict())
        if changes and self.is_world_process_zero():
            warnings.warn(
                f"The run goes on from {checkpoint} with other options of SAM than it was begun "
                f"with: {'; '.join(changes)}.",
                stacklevel=2,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sam_run is not None:
            memory, update = self._sam_run.memory, self.state.global_step
            memory.save(Path(output_dir), update, self.args.should_save)

    def hyperparameter_search(
        self, hp_space: Callable[[Any], dict[str, Any]] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's search, which may set options of SAM where `args` holds them.

        Raises:
            ValueError: `hp_space` names an option of SAM that `args` does not have.
        """
        space = None if hp_space is None else checked_space(self.args, hp_space)
        return super().hyperparameter_search(space, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's `log`, with the readings of SAM beside the training loss."""
        if self._sam_is_replaying:
            return  # the first pass has said it
        if self._sam_run is not None and "loss" in logs and "learning_rate" in logs:
            # All processes come here: the Trainer has gathered the loss just before.
            logs.update(self._sam_run.readings.pop(self._sam_run.backend.sum_over_processes))
        super().log(logs, *args, **kwargs)


class SAMTrainer(SAMTrainerMixin, Trainer):
    """`transformers.Trainer` with sharpness-aware updates (`sam_method`)."""


class SAMSeq2SeqTrainer(SAMTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with sharpness-aware updates (`sam_method`)."""


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

"""`SAMTrainerMixin`, and the trainers made with it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments

from ..compat import load_first_adapter
from ..config import SAMConfig
from ..config.checks import did_you_mean
from ..config.file import changed_since
from ..distributed import validate_layout
from ..engine.subset import select_examples
from ..hub.publishing import PublishingMixin
from ..methods.lora.factors import is_auxiliary
from .adapters import AuxiliaryAdapter, require_lora
from .training_state import TrainingState


class SAMTrainerMixin(PublishingMixin):
    """Mixin that adds SAM to the next Trainer class in the MRO.

    ``class MySAMTrainer(SAMTrainerMixin, MyTrainer): ...``

    Args:
        sam_config: the options. By default they are read from `args` if that is a `SAMConfig` too
            (`SAMTrainingArguments`); otherwise they are `SAMConfig()`.
        args, kwargs: passed on to the Trainer class.

    Raises:
        TypeError: a class is defined in which the mixin comes after Trainer, where it would do
            nothing; or options of SAM are passed as arguments of the trainer.
        ValueError: options that are not allowed, or an optimizer, a layout or a model with which
            SAM cannot train (`distributed.validate_layout`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if Trainer not in mro:
            return
        if mro.index(Trainer) < mro.index(SAMTrainerMixin):
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                f"class {cls.__name__}({bases}): SAMTrainerMixin comes after Trainer and would do "
                "nothing. Put it before the trainer class, or use with_sam(trainer_class)."
            )
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, sam_config: SAMConfig | None = None, **kwargs: Any) -> None:
        _refuse_options(type(self).__name__, kwargs)
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
                "class, and sam_config=SAMConfig(...) in addition, or a class that is both: "
                "`@dataclass class MyConfig(SAMConfig, TheirConfig): ...`."
            ) from error
        if sam_config is not None and isinstance(self.args, SAMConfig):
            raise ValueError(
                "Both sam_config and args hold SAM options. Pass sam_config with plain "
                "TrainingArguments, or SAMTrainingArguments alone."
            )
        self._sam_config = sam_config or SAMConfig()
        self._sam_training: TrainingState | None = None
        self._sam_resumed_from: Path | None = None
        self._sam_auxiliary: AuxiliaryAdapter | None = None
        self._sam_validate()
        if self._sam_lacks_auxiliary and self.optimizer is not None:
            raise ValueError(
                f"sam_method={self.sam_config.sam_method!r} adds parameters that the optimizer "
                "must train too, and one was passed in `optimizers`. Let the trainer create it "
                "(`optim`)."
            )
        self._sam_add_auxiliary()
        if self.sam_config.sam_rho != 0:
            self._sam_follow_events()

    @property
    def sam_config(self) -> SAMConfig:
        """The SAM options: those in `args` if it has any, so that a search can set them."""
        return self.args if isinstance(self.args, SAMConfig) else self._sam_config

    @property
    def is_in_descent_pass(self) -> bool:
        """Whether the calling code runs in the second pass of an update, at w + e.

        For `compute_loss` functions, models and hooks that log or count: what they do to attributes
        of the trainer and of modules is undone after the second pass, but a file or a logger gets
        every call. Always False in the first pass, in plain updates and with one-pass methods.
        """
        return self._sam_training is not None and self._sam_training.engine.is_in_descent_pass

    def _sam_validate(self) -> None:
        config = self.sam_config
        config.validate_sam()
        if config.sam_rho != 0:
            validate_layout(self)
            if config.build_method().needs_adapters:
                require_lora(self.model, config.sam_method)

    # ---- One update --------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The Trainer's training step, then the second pass if the scope of e is complete.

        Returns the loss at w, detached (MSAM: at w + e). The weights are w if it returns or raises.
        """
        step: Callable[..., Tensor] = super().training_step
        if self.sam_config.sam_rho == 0:
            return step(model, inputs, num_items_in_batch)
        training = self._sam_training or self._sam_start()
        return training.step((model, inputs, num_items_in_batch), step)

    def sam_select_examples(self, inputs: Any, indices: Tensor) -> Any:
        """The inputs of some examples of a micro-batch, for `sam_ascent_fraction`.

        Override it for inputs that are not tensors and lists with one row per example, and in a
        trainer with its own `compute_loss`, which then gets a part of each micro-batch too.

        Args:
            inputs: what `compute_loss` is given.
            indices: 1-dimensional, on the CPU, in ascending order.
        """
        select = getattr(super(), "sam_select_examples", select_examples)  # of a wrapped class
        return select(inputs, indices)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's `log`, with the metrics of SAM next to the training loss."""
        if self.is_in_descent_pass:
            return  # the first pass has logged it
        if self._sam_training is not None and "loss" in logs and "learning_rate" in logs:
            # All processes come here: the Trainer has gathered the loss just before.
            self._sam_training.add_metrics(logs)
        super().log(logs, *args, **kwargs)

    # ---- One run -----------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`."""
        if self._sam_lacks_auxiliary:
            self.optimizer = None  # that of an earlier run trained factors that were removed
        is_search = kwargs.get("trial", args[1] if len(args) > 1 else None) is not None
        if self.sam_config.sam_rho != 0 or is_search:  # a trial may set sam_rho
            self._sam_follow_events()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._sam_stop()  # it holds the inputs of an update that was not completed
            if self._sam_auxiliary is not None:
                self._sam_auxiliary.remove()
            self._sam_resumed_from = None

    def _sam_start(self) -> TrainingState:
        self._sam_stop()
        self._sam_training = TrainingState(self)
        if self._sam_resumed_from is not None:
            self._sam_training.method_state.load(self._sam_resumed_from)
        return self._sam_training

    def _sam_stop(self) -> None:
        if self._sam_training is not None:
            self._sam_training.close()
        self._sam_training = None

    def _sam_follow_events(self) -> None:
        """Follow the events of a run at the callback handler, without adding a callback."""
        handler: Any = self.callback_handler
        if "call_event" not in vars(handler):
            handler.call_event = functools.partial(self._sam_on_event, handler.call_event)

    def _sam_on_event(self, call: Callable[..., Any], event: str, *args: Any, **kwargs: Any) -> Any:
        """Act before the callbacks, which may save the model at the end."""
        training = self._sam_training
        if event == "on_train_begin":
            # The model (model_init), the options (a search), the batch size (a retry after running
            # out of memory) may differ from those of an earlier run.
            self._sam_validate()
            self._sam_stop()
            if self.sam_config.sam_rho != 0:
                self._sam_start().describe()
        elif event == "on_train_end":
            if self._sam_auxiliary is not None:
                self._sam_auxiliary.remove()  # before the model is pushed for the last time
            if training is not None:
                training.end()
        elif training is not None and event in ("on_pre_optimizer_step", "on_step_end"):
            training.require_training_step()  # a loop may report only one of them
        return call(event, *args, **kwargs)

    def hyperparameter_search(
        self, hp_space: Callable[[Any], dict[str, Any]] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's search, which may set options of SAM if `args` holds them.

        Raises:
            ValueError: `hp_space` sets an option of SAM that `args` does not have.
        """

        def checked(trial: Any) -> dict[str, Any]:
            assert hp_space is not None
            space, kind = hp_space(trial), type(self.args).__name__
            for name, value in space.items():  # the Trainer only logs what `args` does not have
                if name.startswith("sam_") and not hasattr(self.args, name):
                    raise ValueError(
                        f"hp_space sets {name}={value!r}, which {kind} does not have. Allowed: the "
                        "options of SAM where args is a SAMConfig, such as SAMTrainingArguments."
                    )
            if "sam_rho" in space:  # the Trainer casts a value to the type of the one before
                setattr(self.args, "sam_rho", None)  # noqa: B010 - an option of SAM
            return space

        return super().hyperparameter_search(hp_space and checked, *args, **kwargs)

    # ---- Checkpoints -------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._sam_add_auxiliary()
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self._sam_auxiliary is not None:
            load_first_adapter(self.model, resume_from_checkpoint)
            self._sam_auxiliary.make_trainable()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._sam_resumed_from = None if checkpoint is None else Path(checkpoint)
        if self._sam_resumed_from is None:
            return
        changes = changed_since(self._sam_resumed_from, self.sam_config.to_sam_dict())
        if changes and self.is_world_process_zero():
            warnings.warn(
                f"Resuming from {checkpoint} with SAM options that differ from the checkpoint's: "
                f"{'; '.join(changes)}.",
                stacklevel=2,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sam_training is not None:
            state, update = self._sam_training.method_state, self.state.global_step
            state.save(Path(output_dir), update, self.args.should_save)

    # ---- Bi-LoRA's auxiliary factors ---------------------------------------------------------

    @property
    def _sam_lacks_auxiliary(self) -> bool:
        """Whether they must be added: once for each new model (model_init) and each further run."""
        if self.sam_config.sam_rho == 0 or not self.sam_config.build_method().needs_auxiliary:
            return False
        return self._sam_auxiliary is None or not self._sam_auxiliary.is_in(self.model)

    def _sam_add_auxiliary(self) -> None:
        if self._sam_lacks_auxiliary:
            rank: int = self.sam_config.build_method().rank  # type: ignore[attr-defined]
            self._sam_auxiliary = AuxiliaryAdapter(self.model, rank)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the auxiliary factors among the parameters."""
        self._sam_add_auxiliary()
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, without the auxiliary factors."""
        return [n for n in super().get_decay_parameter_names(model) if not is_auxiliary(n)]


def _signature(cls: type) -> inspect.Signature:
    """The signature of a trainer class, for editors: with `sam_config` if it is the mixin's."""
    bases = [b for b in cls.__mro__ if "__init__" in vars(b) and b is not SAMTrainerMixin]
    signature = inspect.signature(vars(bases[0])["__init__"])
    given = [p for name, p in signature.parameters.items() if name != "self"]
    if not issubclass(bases[0], SAMTrainerMixin):
        kind, kept = inspect.Parameter.KEYWORD_ONLY, "SAMConfig | None"
        given.append(inspect.Parameter("sam_config", kind, default=None, annotation=kept))
    return signature.replace(parameters=sorted(given, key=lambda p: p.kind))


def _refuse_options(trainer: str, kwargs: dict[str, Any]) -> None:
    """Refuse options of SAM, and misspelt ones, among the arguments of a trainer."""
    given = {name: value for name, value in kwargs.items() if name.lower().startswith("sam_")}
    if not given:
        return
    known = ["sam_config", *(f.name for f in fields(SAMConfig))]
    options = ", ".join(f"{name}={value!r}" for name, value in given.items())
    hint = f" Pass sam_config=SAMConfig({options})."
    if wrong := next((name for name in given if name not in known), None):
        hint = did_you_mean(wrong, known)
        hint += " Options of SAM are passed as sam_config=SAMConfig(...)."
    raise TypeError(f"{trainer} has no argument {wrong or next(iter(given))!r}.{hint}")


class SAMTrainer(SAMTrainerMixin, Trainer):
    """`transformers.Trainer` with SAM: its arguments, and `sam_config` (see `SAMTrainerMixin`)."""

    if TYPE_CHECKING:  # for editors, which do not see `__signature__`
        # fmt: off
        def __init__(
            self, model: nn.Module | None = None, args: TrainingArguments | None = None,
            data_collator: Any = None, train_dataset: Any = None, eval_dataset: Any = None,
            processing_class: Any = None, model_init: Callable[..., nn.Module] | None = None,
            compute_loss_func: Callable[..., Any] | None = None,
            compute_metrics: Callable[..., dict[str, Any]] | None = None,
            callbacks: list[TrainerCallback] | None = None,
            optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
            optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]]
            | None = None,
            preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
            *, sam_config: SAMConfig | None = None,
        ) -> None: ...
        # fmt: on


class SAMSeq2SeqTrainer(SAMTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with SAM: its arguments, and `sam_config`."""

    if TYPE_CHECKING:
        __init__ = SAMTrainer.__init__


_SUBCLASSES: dict[type, type[Trainer]] = {Trainer: SAMTrainer, Seq2SeqTrainer: SAMSeq2SeqTrainer}


def with_sam(trainer_class: type[Trainer]) -> type[Trainer]:
    """The subclass of a Trainer class that trains with SAM.

    ``with_sam(SFTTrainer)`` is ``class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer)``, made once.

    Raises:
        TypeError: `trainer_class` is not a subclass of Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(
            f"with_sam({trainer_class!r}) is not allowed. Allowed: transformers.Trainer or a "
            "subclass of it."
        )
    if issubclass(trainer_class, SAMTrainerMixin):
        return trainer_class
    if trainer_class not in _SUBCLASSES:
        names = {"__doc__": f"`{trainer_class.__name__}` with SAM."}
        bases = (SAMTrainerMixin, trainer_class)
        _SUBCLASSES[trainer_class] = type(f"SAM{trainer_class.__name__}", bases, names)
    return _SUBCLASSES[trainer_class]

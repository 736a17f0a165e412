"""What stops a run, or a search, whose updates would not be sharpness-aware without a word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .schedule import describe_cost, learning_rate_share


class RunGuard(TrainerCallback):
    """Starts each run afresh, and stops a run whose training step passes SAM by."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._first_update = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Another model (model_init), other options (a search), a smaller batch (an out-of-memory
        # retry) or no gradients from before: nothing of an earlier run holds.
        trainer = self._trainer
        trainer._sam_check()
        trainer._sam_run = trainer._sam_new_run() if trainer.sam_config.sam_rho > 0 else None
        self._first_update = state.global_step
        if trainer._sam_run is not None and state.is_world_process_zero:
            rate = learning_rate_share(trainer.optimizer) if state.global_step == 0 else 1.0
            line = describe_cost(
                trainer.sam_config, state.max_steps, trainer._sam_run.ascent.share, rate
            )
            # Beside a bar, and where that is: what is printed may be read by a program.
            tqdm.write(line, file=sys.stderr)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        run = self._trainer._sam_run
        if run is not None and not run.was_reached:
            raise RuntimeError(
                f"{type(self._trainer).__name__} updates the weights without the training_step of "
                "SAMTrainerMixin, so that its updates are not sharpness-aware. Let its train() and "
                "training_step() call super()'s, or set sam_rho=0."
            )

    # A train() of its own may not report what comes before the optimizer step.
    on_step_end = on_pre_optimizer_step

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._trainer._sam_drop_auxiliary()  # before the model is pushed for the last time
        if state.global_step > self._first_update:
            self.on_pre_optimizer_step()


def checked_space(
    args: TrainingArguments, hp_space: Callable[[Any], dict[str, Any]]
) -> Callable[[Any], dict[str, Any]]:
    """The search space, refusing options of SAM that `args` does not have.

    The Trainer itself would leave them out with a line in the log.
    """

    def checked(trial: Any) -> dict[str, Any]:
        space = hp_space(trial)
        for name, value in space.items():
            if name.startswith("sam_") and not hasattr(args, name):
                raise ValueError(
                    f"hp_space sets {name}={value!r}, which {type(args).__name__} does not have. "
                    "Allowed: the options of SAM where args is a SAMConfig too, such as "
                    "SAMTrainingArguments."
                )
        return space

    return checked

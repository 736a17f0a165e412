"""Sharpness over a training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..replay import RandomState
from .batches import batch_size
from .objective import Objective
from .plots import plot_history
from .report import Plan, measure

PREFIX = "sharpness/"
PICTURE = "sharpness"


class SharpnessCallback(TrainerCallback):
    """Measures the sharpness every so many updates and at the end, and logs it as `sharpness/*`.

        trainer = SAMTrainer(...)  # or any Trainer
        trainer.add_callback(SharpnessCallback(trainer, every=100))

    The measures are those of `measure`, of the loss that the trainer computes, on the first
    examples of its evaluation set (or of what `dataset` is). Training goes on as if nothing had
    been measured: weights, gradients, random state, running statistics and counters are as they
    were. The history is drawn into `sharpness.png` and `.svg` in the output folder, and stands on
    the model card.

    On several processes with whole weights (DDP) each measures its own examples; the results are
    those of all. Sharded weights are refused when training begins.

    Args:
        trainer: whose loss and data are used.
        every: updates between two measures; 0: at the end alone.
        plan: what to measure.
        examples: how many, on each process.
        dataset: another data set than that of the evaluation.
        params: which weights the loss is a function of, as in `Objective`.

    Raises:
        ValueError: `every` or `examples` is not allowed, or there are no data.
    """

    def __init__(
        self,
        trainer: Any,
        every: int = 0,
        *,
        plan: Plan | None = None,
        examples: int = 256,
        dataset: Any = None,
        params: str = "all",
    ) -> None:
        for name, value, least in (("every", every, 0), ("examples", examples, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name}={value!r} is not allowed. Allowed: a whole number from {least} up."
                )
        if dataset is None and trainer.eval_dataset is None:
            raise ValueError(
                "SharpnessCallback has no data: give dataset=, or the trainer an eval_dataset"
            )
        self.history: dict[str, list[tuple[int, float]]] = {}
        """For each measure pairs of update and value."""
        self._trainer, self._every, self._examples = trainer, every, examples
        self._plan, self._dataset, self._params = plan or Plan(), dataset, params
        self._plan.balls()  # raises now what it would raise in the middle of the training
        self._batches: list[Any] | None = None
        self._last: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches, self._last = None, None
        self._objective(kwargs["model"])  # a layout that cannot be measured is refused now
        self.history = self._logged(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._every and state.global_step % self._every == 0:
            self._measure(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._last != state.global_step:
            self._measure(kwargs["model"], state)
        self._batches = None
        if state.is_world_process_zero and self.history:
            try:
                title = f"Sharpness on {self._examples} examples"
                plot_history(self._shown(), Path(str(args.output_dir)) / PICTURE, title=title)
            except (ImportError, OSError) as error:
                warnings.warn(f"no picture of the sharpness: {error}", stacklevel=2)

    def model_card_section(self, folder: str | os.PathLike[str]) -> str | None:
        """Markdown for the model card that lies in a folder, or None before anything was seen."""
        if not self.history:
            return None
        rows = [
            f"| `{name}` | {pairs[-1][1]:.4g} | {pairs[-1][0]} |"
            for name, pairs in self.history.items()
        ]
        lines = ["The sharpness (`sam_hf.diagnostics`), as last measured:", ""]
        lines += ["| measure | value | update |", "| --- | --- | --- |", *rows]
        if (Path(folder) / f"{PICTURE}.png").exists():
            lines += ["", f"![Sharpness over the training]({PICTURE}.png)"]
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------- inside

    def _shown(self) -> dict[str, Sequence[tuple[int, float]]]:
        return {k: v for k, v in self.history.items() if not k.endswith("_error")}

    @staticmethod
    def _logged(state: TrainerState) -> dict[str, list[tuple[int, float]]]:
        """What a run that is resumed has logged before."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in state.log_history:
            for name, value in entry.items():
                if name.startswith(PREFIX):
                    found.setdefault(name, []).append((int(entry["step"]), value))
        return found

    def _measure(self, model: nn.Module, state: TrainerState) -> None:
        values = {f"{PREFIX}{k}": v for k, v in measure(self._objective(model), self._plan).items()}
        for name, value in values.items():
            self.history.setdefault(name, []).append((state.global_step, value))
        self._last = state.global_step
        control = self._trainer.control
        is_due = control.should_log
        self._trainer.log(dict(values))
        control.should_log = is_due  # else the Trainer would take its own log for written

    def _objective(self, model: nn.Module) -> Objective:
        if self._batches is None:
            self._batches = self._first_batches()
        return Objective(model, self._batches, loss=self._loss, params=self._params)

    def _first_batches(self) -> list[Any]:
        # A loader draws a seed from the global generator.
        device = self._trainer.args.device
        random_state = RandomState([device] if device.type != "cpu" else [])
        loader = self._trainer.get_eval_dataloader(self._dataset)
        batches: list[Any] = []
        left = self._examples
        for batch in loader:
            batches.append(batch)
            left -= batch_size(batch)
            if left <= 0:
                # Else Accelerate would take it for the loader of the training for ever.
                getattr(loader, "end", lambda: None)()
                break
        random_state.restore()
        return batches

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        # A copy: compute_loss may pop what it needs.
        inputs = dict(batch)
        compute: Any = type(self._trainer).compute_loss
        loss = compute(self._trainer, model, inputs)
        result: Tensor = loss[0] if isinstance(loss, tuple) else loss
        return result.mean() if result.ndim else torch.as_tensor(result)

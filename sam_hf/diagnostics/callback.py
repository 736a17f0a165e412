"""Sharpness over a training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..backends.processes import is_distributed
from ..replay import RandomState
from ..side_effects import SideEffects, undoing
from .batches import batch_size
from .estimates import check_count
from .objective import Objective
from .plots import plot_history
from .report import Plan, measure
from .sharpness import groups_of

PREFIX = "sharpness/"
BEST = "sharpness/best_"
PICTURE = "sharpness"

# What the picture shows, by the name in the log: few enough to be read in one glance.
_DRAWN = {
    "loss": "loss",
    "worst_sharpness": "worst-case sharpness, SAM's ball",
    "adaptive_worst_sharpness": "worst-case sharpness, ASAM's ball",
    "hessian_eigenvalue": "largest Hessian eigenvalue",
    "hessian_trace": "trace of the Hessian",
    "gradient_noise_scale": "gradient noise scale (examples)",
}

# Of a trainer: data, and what a signal's handler may have asked for. They are no state of a loss.
_NOT_RESTORED = ("train_dataset", "eval_dataset", "control")


class SharpnessCallback(TrainerCallback):
    """Measures the sharpness every so many updates and at the end, and logs it as `sharpness/*`.

        trainer = SAMTrainer(...)  # or any Trainer
        trainer.add_callback(SharpnessCallback(trainer, every=100))

    The measures are those of `measure`, of the loss that the trainer computes, on examples drawn
    from its evaluation set (or from `dataset`). Training goes on as if nothing had been measured:
    weights, gradients, buffers, random state and the trainer's counters are as they were. The
    history is drawn into `sharpness.png` and `.svg` in the output folder. The model cards of
    trainers with SAM show it.

    With `load_best_model_at_end` the measure at the end is that of the best model, as
    `sharpness/best_*`. A measure that fails (a loss that is no number, in one process memory that
    is short) is a warning, and the training goes on.

    On several processes with whole weights (DDP) each measures its own examples; the results are
    those of all. Sharded weights are refused when training begins.

    Args:
        trainer: whose loss and data are used.
        every: updates between two measures; 0: at the end alone.
        plan: what to measure.
        examples: how many on each process, rounded up to whole batches, if there are so many.
        dataset: another data set than that of the evaluation.
        params: which weights the loss is a function of, as in `Objective`.

    Raises:
        ValueError: `every` or `examples` is not allowed, or there is not one data set.
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
        check_count("every", every, 0)
        check_count("examples", examples, 1)
        dataset = trainer.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError(
                "SharpnessCallback has no data: give dataset=, or the trainer an eval_dataset"
            )
        if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
            raise ValueError(
                f"SharpnessCallback measures on one data set, got {', '.join(map(str, dataset))}: "
                "give dataset="
            )
        self.history: dict[str, list[tuple[int, float]]] = {}
        """For each measure pairs of update and value."""
        self._trainer, self._every, self._examples = trainer, every, examples
        self._plan, self._dataset, self._params = plan or Plan(), dataset, params
        self._batches: list[Any] | None = None
        self._measured = 0  # examples, of all processes
        self._last: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches, self._last = None, None
        objective = self._objective(kwargs["model"])  # a layout that is refused is refused now
        if self._plan.m is not None:
            groups_of(objective, self._plan.m)
        self.history = self._logged(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._every and state.global_step % self._every == 0:
            self._measure(kwargs["model"], state, PREFIX)
            self._last = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if is_best:  # its weights are loaded, and those of the last update are gone
            self._measure(kwargs["model"], state, BEST, state.best_global_step)
        elif self._last != state.global_step:
            self._measure(kwargs["model"], state, PREFIX)
        self._batches = None
        if state.is_world_process_zero and self._shown():
            try:
                title = f"Sharpness on {self._measured} examples"
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
        # The best model is drawn where it alone was measured.
        prefix = PREFIX if f"{PREFIX}loss" in self.history else BEST
        logged = {title: self.history.get(f"{prefix}{name}") for name, title in _DRAWN.items()}
        return {title: pairs for title, pairs in logged.items() if pairs}

    @staticmethod
    def _logged(state: TrainerState) -> dict[str, list[tuple[int, float]]]:
        """What a run that is resumed has logged before, but of a model that was then the best."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in state.log_history:
            for name, value in entry.items():
                if name.startswith(PREFIX) and not name.startswith(BEST):
                    found.setdefault(name, []).append((int(entry["step"]), value))
        return found

    def _measure(
        self, model: nn.Module, state: TrainerState, prefix: str, step: int | None = None
    ) -> None:
        """Measure and log. `step`: that of the weights, if it is not the last one."""
        side_effects = SideEffects(self._trainer, state, skip=_NOT_RESTORED)
        try:
            with undoing(side_effects.restore):
                objective = self._objective(model)
                self._measured = objective.example_count
                found = measure(objective, self._plan)
        # Too large for a float, or memory is short: on one of several processes that is no error to
        # go on from, since the others wait for it.
        except (ValueError, ArithmeticError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and is_distributed():
                raise
            warnings.warn(f"no sharpness at update {state.global_step}: {error}", stacklevel=2)
            return
        values = {f"{prefix}{name}": value for name, value in found.items()}
        for name, value in values.items():
            self.history.setdefault(name, []).append((step or state.global_step, value))
        control = self._trainer.control
        is_due = control.should_log
        # Trainer's own: those of subclasses add what they have gathered for the training's log.
        Trainer.log(self._trainer, dict(values))
        control.should_log = is_due  # else the Trainer would take its own log for written

    def _objective(self, model: nn.Module) -> Objective:
        if self._batches is None:
            self._batches = self._drawn_batches()
        return Objective(model, self._batches, loss=self._loss, params=self._params)

    def _drawn_batches(self) -> list[Any]:
        # A loader draws a seed from the global generator.
        device = self._trainer.args.device
        random_state = RandomState([device] if device.type != "cpu" else [])
        # With persistent workers the Trainer keeps a loader for its own evaluations, whatever the
        # data: it must neither hand it out here nor keep this one.
        own = vars(self._trainer)
        kept = own.pop("_eval_dataloaders", None)
        try:
            loader = self._trainer.get_eval_dataloader(_shuffled(self._dataset, self._plan.seed))
        finally:
            own.pop("_eval_dataloaders", None)
            if kept is not None:
                own["_eval_dataloaders"] = kept
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


def _shuffled(dataset: Any, seed: int) -> Any:
    """In a random order: sets that are sorted by class begin with one class. Streams stay."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if hasattr(dataset, "select"):
        return dataset.select(order)
    return torch.utils.data.Subset(dataset, order)

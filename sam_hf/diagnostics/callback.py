"""Trainer callback that measures sharpness during training."""

import os
import sys
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import find_batch_size

from ..config import SAMConfig
from ..distributed.processes import is_distributed
from ..engine.schedule import expected_passes
from ..engine.state import StateTracker, always_restore, patched
from ..hub.model_card import markdown_table
from .evaluation import preserved_random_state
from .numerics import check_count
from .objective import Objective
from .plots import plot_history
from .report import Plan, measure
from .sharpness import split_into_groups

_PREFIX = "sharpness/"
_BEST_PREFIX = "sharpness/best_"
_PLOT_NAME = "sharpness"

_FEWEST_EXAMPLES, _FEW_EXAMPLES, _MOST_EXAMPLES = 8, 32, 256

_PLOTTED = {
    "loss": "loss",
    "worst_sharpness": "worst-case sharpness, SAM's ball",
    "adaptive_worst_sharpness": "worst-case sharpness, ASAM's ball",
    "hessian_eigenvalue": "largest Hessian eigenvalue",
    "hessian_trace": "trace of the Hessian",
    "gradient_noise_scale": "gradient noise scale (examples)",
}

# Attributes that are not restored: datasets, and `control`, where a signal may request a stop.
_NOT_RESTORED = ("train_dataset", "eval_dataset", "control")


class SharpnessCallback(TrainerCallback):
    """Measure sharpness at regular intervals and at the end of training, and log the results.

        trainer = SAMTrainer(...)  # or any other Trainer
        trainer.add_callback(SharpnessCallback(trainer, every=100))

    Each measurement calls `measure` with the trainer's own loss, on random examples, and logs the
    results under `sharpness/`; with `load_best_model_at_end`, those of the best model at the end
    under `sharpness/best_`. A line at the start states the cost, and a progress bar follows each
    measurement. Training is unaffected: weights, gradients, buffers, random state and the trainer's
    own attributes are restored. A measurement that fails (non-finite loss; in one process, also out
    of memory) warns. At the end, the history is plotted in `sharpness.png` and `.svg` in the output
    folder; the model cards of SAM trainers show the plot. Under DDP, the measures are over the
    examples of all processes. Sharded weights are refused.

    Args:
        trainer: the trainer whose loss and data are used.
        every: number of updates between measurements; 0: only at the end of training.
        examples: number of examples on each process, in whole batches; at most the dataset. None:
            at most 256, so that all measurements, including the last one, fit into `max_share`; if
            that leaves fewer than 32, so that the last one alone does; at least 8.
        dataset: dataset to draw the examples from, instead of the trainer's `eval_dataset`.
        plan, params: as in `measure` and `Objective`.
        max_share: maximum work of the measurements, as a share of the training's work so far: one
            that would exceed it is skipped, except at the end. None: no limit. Work is counted in
            forward-backward passes times examples (see `Plan.passes`): for an update, the batch
            size times the passes per update, on average over the training (plain: 1, SAM: 2). It
            does not depend on the clock: all processes and resumed runs skip the same ones.

    Attributes:
        history: (update, value) pairs of each logged measure, by its name.

    Raises:
        ValueError: `every`, `examples` or `max_share` is not allowed, or no single dataset is
            given.
    """

    def __init__(
        self,
        trainer: Any,
        every: int = 0,
        *,
        plan: Plan | None = None,
        examples: int | None = None,
        dataset: Any = None,
        params: str = "all",
        max_share: float | None = 0.1,
    ) -> None:
        check_count("every", every, 0)
        if examples is not None:
            check_count("examples", examples, 1)
        if max_share is not None and not 0 < max_share <= 1:
            allowed = "None or a number > 0 and <= 1"
            raise ValueError(f"max_share={max_share!r} is not allowed. Allowed: {allowed}.")
        dataset = trainer.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("SharpnessCallback has no dataset: pass dataset= or set eval_dataset")
        if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
            found = f"one dataset, got several ({', '.join(map(str, dataset))})"
            raise ValueError(f"SharpnessCallback measures on {found}: pass dataset=")
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._trainer, self._every = trainer, every
        self._is_chosen, self._examples = examples is not None, examples or _MOST_EXAMPLES
        self._plan, self._dataset, self._params = plan or Plan(), dataset, params
        self._max_share = max_share
        self._passes = 0.0  # of a measurement, over its examples
        self._updates: Collection[int] = ()  # after which to measure
        self._batches: list[Any] | None = None
        self._example_count = 0  # in the last measurement
        self._last_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate layout and plan, state the cost, and read the history of a resumed run."""
        self._batches, self._last_step = None, None
        self._examples = self._examples if self._is_chosen else _MOST_EXAMPLES
        objective = self._objective(kwargs["model"])
        self._passes = self._plan.passes(objective.parameter_count)
        if not self._is_chosen and self._max_share is not None:
            self._examples = self._affordable_examples(state.max_steps)
            self._batches = None
            objective = self._objective(kwargs["model"])
        if self._plan.m is not None:
            split_into_groups(objective, self._plan.m)
        self._updates = self._affordable_updates(objective.example_count, state.max_steps)
        seconds = self._expected_seconds(objective, state)
        if state.is_world_process_zero:
            # Above a progress bar and on its stream, like the line of SAM trainers on their cost.
            tqdm.write(self._describe(objective.example_count, state, seconds), file=sys.stderr)
        self.history = {}
        for entry in state.log_history:  # of a resumed run; an earlier best model may be outdated
            for name, value in entry.items():
                if name.startswith(_PREFIX) and not name.startswith(_BEST_PREFIX):
                    self.history.setdefault(name, []).append((int(entry["step"]), value))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if the update is a multiple of `every`, within `max_share`."""
        if state.global_step in self._updates:
            self._measure(kwargs["model"], state, _PREFIX)
            self._last_step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the final or the best model, and plot the history."""
        # The best model has replaced that of the last update.
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._measure(kwargs["model"], state, _BEST_PREFIX, state.best_global_step)
        elif self._last_step != state.global_step:
            self._measure(kwargs["model"], state, _PREFIX)
        self._batches = None
        # The history of the run, or else of the best model alone.
        prefix = _PREFIX if f"{_PREFIX}loss" in self.history else _BEST_PREFIX
        curves = {
            t: self.history[prefix + n] for n, t in _PLOTTED.items() if prefix + n in self.history
        }
        if state.is_world_process_zero and curves:
            try:
                title = f"Sharpness on {self._example_count} examples"
                plot_history(curves, Path(str(args.output_dir)) / _PLOT_NAME, title=title)
            except (ImportError, OSError) as error:
                warnings.warn(f"sharpness was not plotted: {error}", stacklevel=2)

    def model_card_section(self, folder: str | os.PathLike[str]) -> str | None:
        """Markdown for the model card in a folder; None before the first measurement."""
        if not self.history:
            return None
        last = ((name, *pairs[-1]) for name, pairs in self.history.items())
        rows = [(f"`{name}`", float(value), step) for name, step, value in last]
        table = markdown_table(("measure", "value", "update"), rows)
        parts = ["Sharpness (`sam_hf.diagnostics`), last measurement:", table]
        if (Path(folder) / f"{_PLOT_NAME}.png").exists():
            parts.append(f"![Sharpness during training]({_PLOT_NAME}.png)")
        return "\n\n".join(parts)

    def _work_of_an_update(self, max_steps: int) -> float:
        """Work of a training update: passes times examples."""
        config = getattr(self._trainer, "sam_config", None)
        passes = expected_passes(config, max_steps) if isinstance(config, SAMConfig) else 1.0
        return float(passes * self._trainer.get_total_train_batch_size(self._trainer.args))

    def _affordable_examples(self, max_steps: int) -> int:
        """Examples on each process with which the measurements fit into `max_share`."""
        assert self._max_share is not None
        work = self._max_share * self._work_of_an_update(max_steps) * max_steps
        alone = work / self._passes / self._trainer.args.world_size
        times = 1 + (max(max_steps - 1, 0) // self._every if self._every else 0)
        examples = alone / times if alone / times >= _FEW_EXAMPLES else min(alone, _FEW_EXAMPLES)
        return int(min(max(examples, _FEWEST_EXAMPLES), _MOST_EXAMPLES))

    def _affordable_updates(self, examples: int, max_steps: int) -> Collection[int]:
        """Multiples of `every` at which a measurement keeps their work within `max_share`."""
        multiples = range(self._every, max_steps + 1, self._every) if self._every else range(0)
        if self._max_share is None:
            return multiples
        training = self._work_of_an_update(max_steps)
        updates: set[int] = set()
        for update in multiples:
            work = (len(updates) + 1) * self._passes * examples
            if work <= self._max_share * training * update:
                updates.add(update)
        return updates

    def _expected_seconds(self, objective: Objective, state: TrainerState) -> float | None:
        """Duration of a measurement, from a forward-backward pass over the first batch."""
        try:
            with self._preserved(state):
                for _ in range(2):  # the first one warms up
                    start = time.perf_counter()
                    size, grads = next(objective.batch_gradients())
                    grads[0].sum().item()  # waits for the device
                    seconds = time.perf_counter() - start
        except (ValueError, RuntimeError):  # the measurements will report it
            if is_distributed():
                raise
            return None
        return self._passes * sum(objective.batch_sizes) / size * seconds

    def _describe(self, examples: int, state: TrainerState, seconds: float | None) -> str:
        """One line on the cost of the measurements, and on those that are skipped."""
        line = f"sharpness: each measurement takes up to about {self._passes:.0f} forward-backward "
        line += f"passes over {examples} examples"
        if seconds is not None:
            line += f", {float(f'{seconds:.2g}'):g} s"
        possible, made = state.max_steps // self._every if self._every else 0, len(self._updates)
        if not possible:
            return f"{line}; planned at the end"
        if self._max_share is None:
            return f"{line}; planned every {self._every} updates and at the end"
        line += f"; {made} of the {possible} at multiples of every={self._every} fit in max_share="
        line += f"{self._max_share:g} of the training's work"
        if made == possible:
            return line
        options = f"every, examples={self._examples} or max_share"
        return f"{line}, the others are skipped (except at the end): change {options} to allow more"

    def _measure(
        self, model: nn.Module, state: TrainerState, prefix: str, step: int | None = None
    ) -> None:
        """Measure and log; `step`: the update that the weights are from, by default the last."""
        try:
            with self._preserved(state):
                objective = self._objective(model)
                self._example_count = objective.example_count
                with self._progress_bar(objective, state):
                    measured = measure(objective, self._plan)
        except (ValueError, RuntimeError) as error:
            # The other processes would wait for the collectives of this one.
            if isinstance(error, RuntimeError) and is_distributed():
                raise
            problem = f"sharpness was not measured at update {state.global_step}: {error}"
            warnings.warn(problem, stacklevel=2)
            return
        values = {f"{prefix}{name}": value for name, value in measured.items()}
        for name, value in values.items():
            self.history.setdefault(name, []).append((step or state.global_step, value))
        control = self._trainer.control
        with patched(control, should_log=control.should_log):  # the Trainer's own log remains due
            # Subclasses would add the training metrics since their last log, and reset them.
            Trainer.log(self._trainer, dict(values))

    def _preserved(self, state: TrainerState) -> AbstractContextManager[None]:
        """Restore the attributes of the trainer and of its state when the context exits."""
        tracker = StateTracker((self._trainer, state), skip=_NOT_RESTORED)
        return always_restore(tracker.capture().restore)

    def _progress_bar(self, objective: Objective, state: TrainerState) -> Any:
        """Progress bar that each batch of the objective advances by its work."""
        total = self._passes * sum(objective.batch_sizes)
        bar = tqdm(
            desc=f"sharpness at update {state.global_step}",
            total=total,
            leave=False,
            disable=self._trainer.args.disable_tqdm or not state.is_world_process_zero,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
        )
        # Hessian-vector products by differences exceed the total.
        objective.on_batch = lambda work: bar.update(min(work, total - bar.n))
        return bar

    def _objective(self, model: nn.Module) -> Objective:
        if self._batches is None:
            self._batches = self._draw_batches()
        return Objective(model, self._batches, loss=self._loss, params=self._params)

    def _draw_batches(self) -> list[Any]:
        """Batches of the trainer's evaluation loader over random examples of the dataset."""
        trainer, dataset, missing = self._trainer, self._dataset, self._examples
        batches: list[Any] = []
        # Shuffled, since its first rows may be of one class. Streams are read in their order.
        if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
            generator = torch.Generator().manual_seed(self._plan.seed)
            order = torch.randperm(len(dataset), generator=generator).tolist()
            if not self._is_chosen:  # no more than these in a batch
                order = order[: self._examples * trainer.args.world_size]
            is_table = hasattr(dataset, "select")  # of the `datasets` library
            dataset = dataset.select(order) if is_table else Subset(dataset, order)
        # With persistent workers, the Trainer caches its evaluation loader whatever the dataset:
        # the cached one must not be used here, and this one must not be cached.
        with patched(trainer, _eval_dataloaders={}), preserved_random_state(trainer.args.device):
            loader = trainer.get_eval_dataloader(dataset)
            for batch in loader:
                batches.append(batch)
                missing -= find_batch_size(batch) or 0  # type: ignore[no-untyped-call]
                if missing <= 0:
                    # Accelerate would otherwise keep this as the active loader of the training.
                    getattr(loader, "end", lambda: None)()
                    break
        return batches

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        # A copy, since compute_loss may pop items.
        loss = type(self._trainer).compute_loss(self._trainer, model, dict(batch))
        result: Tensor = loss[0] if isinstance(loss, tuple) else loss
        return result.mean()

"""Training runs: progress bar, compute meter, scores, table and picture."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback


@dataclass
class Run:
    """The result of one training run."""

    name: str
    epochs: float
    passes: float  # forward-backward passes over the training set
    scores: dict[str, float]  # of the final model on the test data; the main one first
    seconds: float
    curve: list[tuple[float, float]]  # passes so far, main score
    curve_data: str = "test"  # the data of the curve's scores

    @property
    def score(self) -> float:
        return next(iter(self.scores.values()))


class QuietProgressBar(ProgressCallback):
    """The Trainer's bar, with the newest loss and score on it instead of a line per log."""

    def __init__(self, name: str, metric: str) -> None:
        super().__init__()
        self._name, self._metric, self._shown = name.split(" (")[0], metric, dict[str, str]()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            names = [name for name in ("loss", self._metric) if name in logs]
            self._shown |= {name: f"{logs[name]:.3f}" for name in names}
            self.training_bar.set_description(self._name)
            self.training_bar.set_postfix(self._shown)


class ComputeMeter(TrainerCallback, ExportableState):
    """Counts the examples that pass forward and backward, for any method.

    It watches the model's forward calls. `computed` counts all of them and `drawn` those that come
    from the data: equal in plain training; SAM on every update computes twice what it draws.
    """

    def __init__(self) -> None:
        self.computed = self.drawn = 0
        self.at: dict[str, int] = {}  # `computed` at each update that is logged
        self._micro_batch = 0  # examples of the current micro-batch seen so far
        self._hook: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)  # auto_find_batch_size starts more than once
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._processes = args.world_size
        self.computed, self.drawn, self.at = 0, 0, {}
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:  # the run resumes
            vars(self).update(saved["attributes"])

    def state(self):
        counts = {"computed": self.computed, "drawn": self.drawn, "at": self.at}
        return {"args": {}, "attributes": counts}

    def _count(self, model, inputs, named_inputs):
        if model.training and torch.is_grad_enabled():
            examples = len(next(iter((*inputs, *named_inputs.values())))) * self._processes
            self.computed += examples
            # The first pass of a micro-batch may have had a part of its examples only.
            self.drawn += max(0, examples - self._micro_batch)
            self._micro_batch = max(examples, self._micro_batch)

    def on_substep_end(self, args, state, control, **kwargs):
        self._micro_batch = 0

    on_step_end = on_substep_end

    def on_log(self, args, state, control, **kwargs):
        self.at[str(state.global_step)] = self.computed

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()


def train(
    trainer: Trainer,
    name: str,
    metrics: Sequence[str],
    resume_from: str | None = None,
    save: bool = False,
    test_dataset: Any = None,
) -> Run:
    """Train, evaluate the final model, and save the metrics of both in the output folder.

    Of `metrics`, names without `eval_`, the first is that of the curve. The final model is saved
    before its evaluation, on `test_dataset` if not on the trainer's `eval_dataset`.
    """
    key = f"eval_{metrics[0]}"
    if trainer.pop_callback(ProgressCallback) is not None:  # there is none with --disable_tqdm
        trainer.add_callback(QuietProgressBar(name, key))
    meter = ComputeMeter()
    trainer.add_callback(meter)
    training = trainer.train(resume_from_checkpoint=resume_from).metrics
    if save:
        trainer.save_model(_internal_call=True)  # otherwise it would push, without a card
    evaluation = trainer.evaluate(test_dataset)
    if not math.isfinite(loss := evaluation.get("eval_loss", 0.0)):
        warnings.warn(f"{name}: the final loss is {loss}: lower --learning_rate", stacklevel=2)
    trainer.save_metrics("train", training)
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    epochs = trainer.state.epoch
    examples = meter.drawn / epochs  # by the Trainer's count: a collator may merge examples
    logged = [entry for entry in trainer.state.log_history if key in entry]
    # The last entry is that of the test; without validation data, it repeats the last evaluation.
    is_validation = test_dataset is not None and len(logged) > 1
    curve = {meter.at[str(e["step"])]: e[key] for e in (logged[:-1] if is_validation else logged)}
    return Run(
        name=name,
        epochs=epochs,
        passes=meter.computed / examples,
        scores={metric: evaluation[f"eval_{metric}"] for metric in metrics},
        seconds=training["train_runtime"],
        curve=[(computed / examples, score) for computed, score in sorted(curve.items())],
        curve_data="validation" if is_validation else "test",
    )


def format_runs(runs: Sequence[Run]) -> str:
    """A table, one line per run."""
    import pandas as pd

    rows = [
        [f"{round(value, 2):g}" for value in (run.epochs, run.passes, round(run.seconds))]
        + [f"{score:.4f}" for score in run.scores.values()]
        for run in runs
    ]
    columns = ["epochs", "passes", "seconds", *(f"test {metric}" for metric in runs[0].scores)]
    return pd.DataFrame(rows, [run.name for run in runs], columns).to_string()


def plot_curves(runs: Sequence[Run], title: str, file: Path) -> None:
    """Save a picture of the score against compute, one curve per run."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("o-", "s--"), strict=False):
        label = f"{run.name}: {run.score:.3f}"
        axes.plot(*zip(*run.curve, strict=True), style, markersize=3, label=label)
    data, metric = runs[0].curve_data, next(iter(runs[0].scores))
    axes.set_title(f"{title}: {data} {metric} against compute", fontsize="medium")
    axes.set_xlabel("Compute (forward-backward passes over the training set)")
    axes.set(ylabel=f"{data} {metric}", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(title=f"Final test {metric}")
    figure.savefig(file, dpi=150)


def save_json(content: Any, file: Path) -> None:
    """Write indented JSON, and make the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

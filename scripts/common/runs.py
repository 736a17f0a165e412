"""Training runs: progress bar, count of compute, scores, table and picture."""

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
    scores: dict[str, float]  # of the final model on the test data; the first is what counts
    seconds: float
    curve: list[tuple[float, float]]  # passes so far, the score that counts
    curve_data: str = "test"  # the data of the curve's scores

    @property
    def metric(self) -> str:
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        return self.scores[self.metric]


def in_words(metric: str) -> str:
    return metric.replace("_", " ")


class QuietProgressBar(ProgressCallback):
    """The Trainer's bar, with the newest loss and score on it instead of a line per log."""

    def __init__(self, name: str, metric: str, data: str = "test") -> None:
        super().__init__()
        self._name, self._shown = name.split(" (")[0], dict[str, str]()
        score = f"{data} {in_words(metric)} {{:.3f}}"
        self._formats = {"loss": "loss {:.2f}", f"eval_{metric}": score}

    @classmethod
    def show(cls, trainer: Trainer, *args: str) -> None:
        """Replace the Trainer's bar, unless --disable_tqdm has removed it."""
        if any(type(c) is ProgressCallback for c in trainer.callback_handler.callbacks):
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(cls(*args))

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            known = logs.keys() & self._formats.keys()
            self._shown.update((key, self._formats[key].format(logs[key])) for key in known)
            self.training_bar.set_postfix_str(", ".join(self._shown.values()))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if eval_dataloader is not None and len(eval_dataloader) >= 20:  # a short bar would flicker
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class ComputeMeter(TrainerCallback, ExportableState):
    """Counts the examples that pass forward and backward, for any method.

    It watches the model's forward calls. `computed` counts all of them and `drawn` those that come
    from the data: equal in plain training; SAM on every update computes twice what it draws. A pass
    counts the same whether or not its backward computes the gradients of all weights.
    """

    def __init__(self) -> None:
        self.computed = self.drawn = 0
        self.at: dict[str, int] = {}  # `computed` at each update that is logged
        self._micro_batch = 0  # examples of the current micro-batch seen so far
        self._hook: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)  # auto_find_batch_size begins more than once
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
        if not (model.training and torch.is_grad_enabled()):
            return
        examples = len(next(iter((*inputs, *named_inputs.values())))) * self._processes
        self.computed += examples
        if examples > self._micro_batch:  # the first pass may have had a part of them only
            self.drawn += examples - self._micro_batch
            self._micro_batch = examples

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

    Args:
        metrics: the names, without `eval_`, of what is reported; the first is that of the curve.
        save: save the model before the evaluation.
        test_dataset: what the final model is evaluated on, if not the trainer's `eval_dataset`.
    """
    is_validation = test_dataset is not None
    QuietProgressBar.show(trainer, name, metrics[0], "validation" if is_validation else "test")
    meter = ComputeMeter()
    trainer.add_callback(meter)
    training = trainer.train(resume_from_checkpoint=resume_from).metrics
    if save:
        trainer.save_model(_internal_call=True)  # otherwise it would push, without a card
    evaluation = trainer.evaluate(test_dataset)
    if not math.isfinite(evaluation.get("eval_loss", 0.0)):
        warnings.warn(
            f"{name}: the final loss is {evaluation['eval_loss']}, so its other scores mean "
            "nothing: lower --learning_rate or --sam_rho",
            stacklevel=2,
        )
    trainer.save_metrics("train", training)
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    key, epochs = f"eval_{metrics[0]}", trainer.state.epoch
    examples = meter.drawn / epochs  # by the Trainer's count: a collator may merge examples
    logged = [entry for entry in trainer.state.log_history if key in entry]
    is_validation = is_validation and len(logged) > 1
    # The last entry is that of the test; without validation data, the last evaluation anew.
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
    width = max(len(run.name) for run in runs)
    titles = [f"test {in_words(metric)}" for metric in runs[0].scores]
    lines = ["  ".join([f"  {'':<{width}}  epochs  passes  seconds", *titles])]
    for run in runs:
        values = zip(titles, run.scores.values(), strict=True)
        lines.append(
            f"  {run.name:<{width}}  {round(run.epochs, 2):>6g}  {round(run.passes, 2):>6g}"
            f"  {run.seconds:>7.0f}  " + "  ".join(f"{v:>{len(title)}.4f}" for title, v in values)
        )
    return "\n".join(lines)


def plot_curves(runs: Sequence[Run], title: str, file: Path) -> None:
    """Save a picture of the score against compute, one curve per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    # Two colours of Okabe and Ito, distinguishable with colour blindness; the dashes help in print.
    for run, (color, dashes) in zip(runs, (("#0072B2", "-"), ("#D55E00", "--")), strict=False):
        label = f"{run.name}: {run.score:.3f}"
        axes.plot(*zip(*run.curve, strict=True), dashes, color=color, label=label)
        if run.curve_data == "test":
            axes.plot(run.passes, run.score, "o", color=color)
    metric = in_words(runs[0].metric)
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(f"{runs[0].curve_data.capitalize()} {metric}")
    axes.set_xlabel("Compute (forward-backward passes over the training set)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title=f"Final test {metric}")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save_json(content: Any, file: Path) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

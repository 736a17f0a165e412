"""What the training scripts measure and show: layout, metric, bar, compute, result, curves."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

METRICS = Path(__file__).parent / "metrics"


def load_metric(name: str, config_name: str) -> evaluate.EvaluationModule:
    """The metric in scripts/common/metrics/<name>, loaded by `evaluate` without a connection.

    Args:
        config_name: which of the module's configurations.
    """
    # In memory: two runs at once do not wait for each other's cache file.
    options: dict[str, Any] = {
        "path": str(METRICS / name),
        "config_name": config_name,
        "keep_in_memory": True,
    }
    try:
        return evaluate.load(**options)
    except OSError:  # the cache of Hugging Face, to which the module is copied, cannot be written
        evaluate.config.HF_MODULES_CACHE = tempfile.mkdtemp()
        return evaluate.load(**options, cache_dir=tempfile.mkdtemp())


def describe_layout(trainer: Trainer) -> str:
    """What runs, and not what was asked for: launchers and libraries may make something else of it.

    Once the training has begun, for only then is the model wrapped.
    """
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    count = accelerator.num_processes
    parts = [f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}"]
    if model is not trainer.model or count > 1:
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        zero = f" (ZeRO-{plugin.zero_stage})" if plugin is not None else ""
        parts.append(type(model).__name__ + zero)
    trained = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    parts.append(f"{' and '.join(sorted(trained))} weights")
    if accelerator.mixed_precision != "no":
        parts.append(f"{accelerator.mixed_precision} compute")
    if accelerator.scaler is not None:
        parts.append("loss scaling")
    parts.append(f"{trainer.get_total_train_batch_size(trainer.args)} examples an update")
    return ", ".join(parts)


class LayoutLine(TrainerCallback):
    """Prints the layout when the training begins."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(describe_layout(self._trainer), flush=True)


class QuietProgressBar(ProgressCallback):
    """The Trainer's bar, with the newest loss and score on it instead of a line per log."""

    def __init__(self, name: str, metric: str = "accuracy", data: str = "test") -> None:
        super().__init__()
        self._name = name
        self._formats = {
            "loss": "loss {:.2f}",
            f"eval_{metric}": f"{data} {in_words(metric)} {{:.3f}}",
        }
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._name.split(" (")[0])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            known = logs.keys() & self._formats.keys()
            self._shown.update((key, self._formats[key].format(logs[key])) for key in known)
            self.training_bar.set_postfix_str(", ".join(self._shown.values()))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        # A second bar for a few batches would only flicker.
        if eval_dataloader is not None and len(eval_dataloader) >= 20:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class ComputeMeter(TrainerCallback, ExportableState):
    """Counts the examples that go forward and backward, whatever the method does with them.

    It watches the model's forward calls, so that it needs no knowledge of the method. `computed`
    counts all of them, and `drawn` those that came from the data: in a plain run the two are equal,
    SAM on every update computes twice what it draws. A pass over a part of the micro-batch counts
    as that part. A pass counts as one whether or not its backward half computes the gradients of
    all weights. The counts are saved with each checkpoint.
    """

    def __init__(self) -> None:
        self.computed = self.drawn = 0
        self.at: dict[str, int] = {}  # `computed` at each update that is logged
        self._micro_batch = 0  # examples of the micro-batch at hand that have been seen so far
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
        if examples > self._micro_batch:  # the first pass may have had a part of them alone
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


@dataclass
class Run:
    """The result of one training run."""

    name: str
    epochs: float
    passes: float  # forward-backward passes over the training set
    scores: dict[str, float]  # of the final model on the test data; the first is what counts
    seconds: float
    curve: list[tuple[float, float]]  # passes so far, the score that counts
    curve_data: str = "test"  # the data that the curve's scores are measured on

    @property
    def metric(self) -> str:
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        return self.scores[self.metric]


def in_words(metric: str) -> str:
    """The metric's name as it stands on tables and axes."""
    return metric.replace("_", " ")


def show_quiet_bar(trainer: Trainer, name: str, metric: str, data: str = "test") -> None:
    """Put our bar in the place of the Trainer's, unless --disable_tqdm took that away."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressBar(name, metric, data))


def train(
    trainer: Trainer,
    name: str,
    resume_from: str | None = None,
    metrics: Sequence[str] = ("accuracy",),
    save: bool = False,
    test_dataset: Any = None,
) -> Run:
    """Train, evaluate the final model and save the metrics of both in the output folder.

    Args:
        save: whether to save the model too, before anything can go wrong in the evaluation.
        metrics: those that the table shows, as the trainer names them but without `eval_`. The
            first is that of the curve.
        test_dataset: what the final model is evaluated on, where the trainer's `eval_dataset` is
            validation data. The curve is then that of the validation data.
    """
    show_quiet_bar(trainer, name, metrics[0], "test" if test_dataset is None else "validation")
    meter = ComputeMeter()
    trainer.add_callback(meter)
    training = trainer.train(resume_from_checkpoint=resume_from).metrics
    if save:
        trainer.save_model(_internal_call=True)  # else it would push, with nothing to show yet
    evaluation = trainer.evaluate(test_dataset)
    if not math.isfinite(evaluation.get("eval_loss", 0.0)):
        warnings.warn(
            f"{name}: the final loss is {evaluation['eval_loss']}, so that its other scores mean "
            "nothing: lower --learning_rate or --sam_rho",
            stacklevel=2,
        )
    trainer.save_metrics("train", training)
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    # By the Trainer's own count of epochs: a collator may have made one example of several.
    epochs = trainer.state.epoch
    examples = meter.drawn / epochs
    key = f"eval_{metrics[0]}"
    evaluations = [entry for entry in trainer.state.log_history if key in entry]
    is_validation = test_dataset is not None and len(evaluations) > 1
    if is_validation:
        evaluations.pop()  # the one on the test data
    # A dict: the last evaluation of the training and the one after it are the same.
    curve = {meter.at[str(entry["step"])] / examples: entry[key] for entry in evaluations}
    return Run(
        name=name,
        epochs=epochs,
        passes=meter.computed / examples,
        scores={metric: evaluation[f"eval_{metric}"] for metric in metrics},
        seconds=training["train_runtime"],
        curve=sorted(curve.items()),
        curve_data="validation" if is_validation else "test",
    )


def format_runs(runs: Sequence[Run]) -> str:
    """The runs as a small table, one line each."""
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
    """Save a picture of the score against compute, one curve a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    # Two colours of Okabe and Ito that colour-blind readers tell apart; the dashes help in print.
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
    axes.legend(title=f"Final test {metric}", loc="best")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save_json(content: Any, file: Path) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""What the training scripts share: metric, progress bar, compute, result and curves."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

METRICS = Path(__file__).parent / "metrics"


def load_metric(name: str) -> evaluate.EvaluationModule:
    """The metric in scripts/metrics/<name>, loaded by `evaluate` without a connection."""
    # In memory: two runs at once do not wait for each other's cache file.
    options: dict[str, Any] = {"path": str(METRICS / name), "keep_in_memory": True}
    try:
        return evaluate.load(**options)
    except OSError:  # the cache of Hugging Face, to which the module is copied, cannot be written
        evaluate.config.HF_MODULES_CACHE = tempfile.mkdtemp()
        return evaluate.load(**options, cache_dir=tempfile.mkdtemp())


def load_checkpoint_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load what the Trainer (as of transformers 5.23) leaves out when it resumes.

    `save_pretrained` writes some architectures, ViT among them, with the parameter names of older
    versions. `from_pretrained` knows both; the Trainer takes those that it finds, and would go on
    with untrained layers.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    # The Trainer still says which names it did not find.
    logging.getLogger("transformers.trainer").addFilter(
        lambda record: "keys in the checkpoint model loaded" not in record.getMessage()
    )


class QuietProgressBar(ProgressCallback):
    """The Trainer's bar, with the newest loss and accuracy on it instead of a line per log."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._name.split(" (")[0])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            formats = {"loss": "loss {:.2f}", "eval_accuracy": "test acc {:.3f}"}
            self._shown.update((k, formats[k].format(v)) for k, v in logs.items() if k in formats)
            self.training_bar.set_postfix_str(", ".join(self._shown.values()))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        # A second bar for a few batches would only flicker.
        if eval_dataloader is not None and len(eval_dataloader) >= 20:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class ComputeMeter(TrainerCallback):
    """Counts the examples that go forward and backward, whatever the method does with them.

    It watches the model's forward calls, so that it needs no knowledge of the method. Each log
    entry gets `examples_computed`, all of them, and `examples_drawn`, those that came from the
    data: in a plain run the two are equal, SAM on every update computes twice what it draws.
    """

    def __init__(self) -> None:
        self.computed = self.drawn = 0
        self._is_new_micro_batch = True
        self._hook: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)  # auto_find_batch_size begins more than once
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._processes = args.world_size
        self.computed = self.drawn = 0
        counted = [entry for entry in state.log_history if "examples_computed" in entry]
        if counted:  # the run resumes, from a step at or a little after the last log
            since_then = state.global_step / counted[-1]["step"]
            self.computed = round(counted[-1]["examples_computed"] * since_then)
            self.drawn = round(counted[-1]["examples_drawn"] * since_then)

    def _count(self, model, inputs, named_inputs):
        if not (model.training and torch.is_grad_enabled()):
            return
        examples = len(next(iter((*inputs, *named_inputs.values())))) * self._processes
        self.computed += examples
        if self._is_new_micro_batch:
            self.drawn += examples
        self._is_new_micro_batch = False

    def on_substep_end(self, args, state, control, **kwargs):
        self._is_new_micro_batch = True

    on_step_end = on_substep_end

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1].update(examples_computed=self.computed, examples_drawn=self.drawn)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()


@dataclass
class Run:
    """The result of one training run."""

    name: str
    epochs: float
    passes: float  # forward-backward passes over the training set
    accuracy: float  # of the final model
    seconds: float
    curve: list[tuple[float, float]]  # passes so far, test accuracy


def train(trainer: Trainer, name: str, resume_from: str | None = None) -> Run:
    """Train, evaluate the final model and save the metrics of both in the output folder."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressBar(name))
    meter = ComputeMeter()
    trainer.add_callback(meter)
    training = trainer.train(resume_from_checkpoint=resume_from).metrics
    evaluation = trainer.evaluate()
    trainer.save_metrics("train", training)
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    examples = len(trainer.train_dataset)
    curve = {  # a dict: the last evaluation of the training and the one after it are the same
        entry["examples_computed"] / examples: entry["eval_accuracy"]
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    }
    return Run(
        name=name,
        epochs=meter.drawn / examples,
        passes=meter.computed / examples,
        accuracy=evaluation["eval_accuracy"],
        seconds=training["train_runtime"],
        curve=sorted(curve.items()),
    )


def format_runs(runs: Sequence[Run]) -> str:
    """The runs as a small table, one line each."""
    width = max(len(run.name) for run in runs)
    header = f"  {'':<{width}}  epochs  passes  seconds  test accuracy"
    return "\n".join(
        [header]
        + [
            f"  {run.name:<{width}}  {round(run.epochs, 2):>6g}  {round(run.passes, 2):>6g}"
            f"  {run.seconds:>7.0f}  {run.accuracy:>13.4f}"
            for run in runs
        ]
    )


def plot_curves(runs: Sequence[Run], title: str, file: Path) -> None:
    """Save a picture of test accuracy against compute, one curve a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    # Two colours of Okabe and Ito that colour-blind readers tell apart; the dashes help in print.
    for run, (color, dashes) in zip(runs, (("#0072B2", "-"), ("#D55E00", "--")), strict=False):
        label = f"{run.name}: {run.accuracy:.3f}"
        axes.plot(*zip(*run.curve, strict=True), dashes, color=color, label=label)
        axes.plot(run.passes, run.accuracy, "o", color=color)
    axes.set(title=title, ylabel="Test accuracy")
    axes.set_xlabel("Compute (forward-backward passes over the training set)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title="Final test accuracy", loc="best")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save_json(content: Any, file: Path) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

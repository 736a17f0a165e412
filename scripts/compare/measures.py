"""What `compare_methods.py` records of a final model: its scores, and how sharp its minimum is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common.labeled_data import draw
from compare.data import Task
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import EvalPrediction, Trainer

from sam_hf.diagnostics import Objective, Plan, measure

BINS = 15
SHARPNESS = {
    "examples": 256,  # of the training, with the labels that were trained on
    "rho": 0.05,
    "adaptive_rho": 0.5,
    "steps": 10,
    "iterations": 40,
    "trace_samples": 10,
}


@dataclass(frozen=True)
class Measure:
    """One line of the second table.

    Args:
        key: in the record of a run, `outer.inner` where it is nested.
        digits: how many of them are shown.
        is_usual: shown even where no run has it.
    """

    key: str
    words: str
    digits: int = 3
    is_usual: bool = False

    def read(self, record: dict[str, Any]) -> float | None:
        value: Any = record
        for part in self.key.split("."):
            value = (value or {}).get(part)
        return value


MEASURES = (
    Measure("ece", "calibration error (ECE)", is_usual=True),
    Measure("nll", "negative log-likelihood", is_usual=True),
    Measure("corrupted_accuracy", "accuracy on corrupted images"),
    Measure("sharpness.worst_sharpness", "worst-case sharpness"),
    Measure("sharpness.adaptive_worst_sharpness", "the same, ASAM's ball"),
    Measure("sharpness.hessian_eigenvalue", "largest Hessian eigenvalue", digits=1),
    Measure("sharpness.hessian_trace", "trace of the Hessian", digits=0),
)


def scores(metric: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """For the Trainer: accuracy, ECE and mean negative log-likelihood, and `metric` beside them."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if isinstance(logits, tuple):  # some models return hidden states beside them
            logits = logits[0]
        guesses = logits.argmax(-1)
        log_probabilities = log_softmax(logits.astype(np.float64), axis=-1)
        found = {
            "accuracy": float(accuracy_score(labels, guesses)),
            "ece": calibration_error(np.exp(log_probabilities), labels),
            "nll": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        }
        if metric == "matthews_correlation":
            found[metric] = float(matthews_corrcoef(labels, guesses))
        return found

    return compute


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    r"""The expected calibration error, with 15 bins of equal width.

    .. math:: \sum_b \frac{|B_b|}{n} \, |\mathrm{acc}(B_b) - \mathrm{conf}(B_b)|

    Bin b has the examples whose confidence, the largest probability, is in ((b - 1) / 15, b / 15].
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    https://arxiv.org/abs/1706.04599, equation 3.

    Args:
        probabilities: (examples, classes).
    """
    confidence = probabilities.max(-1)
    is_right = probabilities.argmax(-1) == labels
    if not np.isfinite(confidence).all():
        return math.nan
    number = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    gaps = np.bincount(number, is_right - confidence, BINS)  # |B| (acc - conf)
    return float(np.abs(gaps).sum() / len(labels))


def measure_model(trainer: Trainer, task: Task, spec: Any, with_sharpness: bool) -> dict[str, Any]:
    """The record's part that needs the final model. Numbers that are not finite are None.

    While rho is tuned, only what the tuning set tells: the test images have no say in it.
    """
    trainer.args.dataloader_drop_last = False  # every example is scored
    names = dict.fromkeys(("accuracy", task.metric, "ece", "nll"))
    found = trainer.evaluate()
    record: dict[str, Any] = {name: finite(found[f"eval_{name}"]) for name in names}
    if spec.tuned_rho is not None:
        return record
    corrupted = {
        name: trainer.predict(images).metrics["test_accuracy"]
        for name, images in task.corrupted_sets().items()
    }
    if corrupted:
        record |= {"corrupted_accuracy": fmean(corrupted.values()), "corruptions": corrupted}
    if with_sharpness:
        record["sharpness"] = measure_sharpness(trainer, task, spec)
    return record


def measure_sharpness(trainer: Trainer, task: Task, spec: Any) -> dict[str, float | None]:
    """That of the training loss; empty where the training has ended in what is no number."""
    model = trainer.model
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        return {}
    examples = task.plain_examples(spec.level, spec.seed)
    settings = dict(SHARPNESS)
    chosen = draw(len(examples), settings.pop("examples"))
    size = task.eval_batch // 4
    batches = [
        trainer.data_collator([examples[int(i)] for i in chosen[start : start + size]])
        for start in range(0, len(chosen), size)
    ]
    plan = Plan(samples=0, noise=False, budget=False, **settings)
    try:
        found = measure(Objective(model, batches), plan)
    except (ValueError, ArithmeticError):  # weights that are finite, and a loss that is not
        return {}
    return {name: finite(value) for name, value in found.items()}


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

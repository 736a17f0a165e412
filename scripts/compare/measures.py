"""What `compare_methods.py` records of a final model: scores, calibration, sharpness."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from common.data import draw
from scipy.special import log_softmax
from sklearn.metrics import matthews_corrcoef
from transformers import EvalPrediction, Trainer, TrainerCallback

from sam_hf.diagnostics import Objective, Plan, measure

BINS = 15
# Of the loss on training examples, with the labels that were trained on.
SHARPNESS = {"examples": 256, "rho": 0.05, "adaptive_rho": 0.5, "steps": 10, "iterations": 40}
SHARPNESS |= {"trace_samples": 10}


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, ECE, mean negative log-likelihood and Matthews correlation."""
    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits  # with hidden states after them
    log_probabilities = log_softmax(logits.astype(np.float64), axis=-1)
    guesses = logits.argmax(-1)
    return {
        "accuracy": float((guesses == labels).mean()),
        "ece": calibration_error(np.exp(log_probabilities), labels),
        "nll": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "matthews_correlation": float(matthews_corrcoef(labels, guesses)),
    }


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
    if not np.isfinite(confidence).all():
        return math.nan
    is_right = probabilities.argmax(-1) == labels
    number = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    gaps = np.bincount(number, is_right - confidence, BINS)  # |B| (acc - conf)
    return float(np.abs(gaps).sum() / len(labels))


class RadiusMeter(TrainerCallback):
    """The automatic radius after each update of a `SAMTrainer`, which drops it in the end."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self.values = trainer, list[float]()

    def on_step_end(self, args, state, control, **kwargs):
        self.values.append(float(self._trainer._sam_training.engine.radius.rho))

    def record(self) -> dict[str, float | None]:
        """The last radius and the median over the updates."""
        return {"rho_final": finite(self.values[-1]), "rho_median": finite(median(self.values))}


def measure_model(trainer: Trainer, task: Any, spec: Any, with_sharpness: bool) -> dict[str, Any]:
    """The part of a run's record that needs the final model. None for what is not finite.

    While rho is tuned, only the scores on the tuning set: the test examples are not used.
    """
    trainer.args.dataloader_drop_last = False  # every example is scored
    found = trainer.evaluate()
    names = dict.fromkeys(task.measures)
    record: dict[str, Any] = {name: finite(found[f"eval_{name}"]) for name in names}
    if spec.tuned_rho is not None:
        return record
    sets = task.corrupted_sets()
    if sets:
        found = {name: trainer.predict(x).metrics["test_accuracy"] for name, x in sets.items()}
        record |= {"corrupted_accuracy": fmean(found.values()), "corruptions": found}
    if with_sharpness:
        record["sharpness"] = measure_sharpness(trainer, task, spec)
    return record


def measure_sharpness(trainer: Trainer, task: Any, spec: Any) -> dict[str, float | None]:
    """Sharpness of the training loss; empty if the training has diverged."""
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
    except (ValueError, ArithmeticError):  # finite weights, but an infinite loss
        return {}
    return {name: finite(value) for name, value in found.items()}


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

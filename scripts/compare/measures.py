"""What `compare_methods.py` records of a run: scores, calibration, robustness, sharpness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from common.data import draw
from scipy.special import log_softmax
from sklearn.metrics import matthews_corrcoef
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import EvalPrediction, Trainer, TrainerCallback

from sam_hf.diagnostics import Objective, Plan, measure

BINS = 15
# Of the loss on training examples, with the labels that were trained on.
SHARPNESS = {"examples": 256, "rho": 0.05, "adaptive_rho": 0.5, "steps": 10, "iterations": 40}
SHARPNESS |= {"trace_samples": 10}
ROUNDED_BITS, NOISE = (8, 4, 3), (0.01, 0.05)


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


class CurveMeter(TrainerCallback):
    """The errors on the validation and the test part after each epoch."""

    def __init__(self, trainer: Trainer, sets: dict[str, Any]) -> None:
        self._trainer, self._sets, self.errors = trainer, sets, list[dict[str, float]]()

    def on_epoch_end(self, args, state, control, **kwargs):
        found = {}
        for part, examples in self._sets.items():
            metrics = self._trainer.predict(examples).metrics
            found |= {f"{part}_{name}": finite(metrics[f"test_{name}"]) for name in ("mse", "mae")}
        self.errors.append({"updates": state.global_step, **found})

    def record(self) -> dict[str, Any]:
        return {**select(self.errors), "curve": self.errors}


def select(curve: list[dict[str, float]]) -> dict[str, Any]:
    """The test errors of the epoch with the least validation error, and its number of updates."""
    known = [point for point in curve if point["validation_mse"] is not None]
    best = min(known, key=lambda point: point["validation_mse"], default={})
    selected = {f"selected_{name}": best.get(f"test_{name}") for name in ("mse", "mae")}
    return {**selected, "selected_update": best.get("updates")}


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

    def score(examples: Any) -> float | None:
        return finite(trainer.predict(examples).metrics[f"test_{task.metric}"])

    found = {name: score(examples) for name, examples in task.shifted_sets(spec.level).items()}
    if found:
        is_finite = None not in found.values()
        record |= {task.shifted_key: fmean(found.values()) if is_finite else None, "shifts": found}
    test = trainer.eval_dataset
    for key, sizes, change in (("rounded", ROUNDED_BITS, rounded), ("noisy", NOISE, noisy)):
        record[key] = {}
        for size in sizes:
            with changed_weights(trainer.model, change, size, spec.seed):
                record[key][str(size)] = score(test)
    if with_sharpness:
        record["sharpness"] = measure_sharpness(trainer, task, spec)
    return record


@contextmanager
def changed_weights(model: nn.Module, change: Any, size: float, seed: int) -> Iterator[None]:
    """The model with each parameter changed, and afterwards as it was."""
    generator, before = torch.Generator().manual_seed(seed), list[tuple[Tensor, Tensor]]()
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                before.append((parameter, parameter.clone()))
                parameter.copy_(change(parameter, size, generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in before:
                parameter.copy_(weight)


def rounded(weight: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    r"""Weights on a symmetric grid of 2^bits - 1 values for each output channel.

    .. math:: \hat w = s \, \mathrm{round}(w / s), \quad s = \max_c |w| / (2^{bits - 1} - 1)

    Round to nearest, without calibration; the first axis is that of the channels. Vectors (biases,
    norms) stay as they are.
    """
    most = 2 ** (bits - 1) - 1
    if weight.ndim < 2:
        return weight
    scale = (weight.flatten(1).abs().amax(1) / most).clamp_min(torch.finfo(weight.dtype).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -most, most)


def noisy(weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The tensor plus Gaussian noise whose norm is this share of the tensor's."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + share * noise * (weight.norm() / noise.norm())


def measure_sharpness(trainer: Trainer, task: Any, spec: Any) -> dict[str, float | None]:
    """Sharpness of the training loss; empty if the training has diverged."""
    model = trainer.model
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        return {}
    examples = task.plain_examples(spec.level, spec.seed)
    settings = dict(SHARPNESS)
    chosen = draw(len(examples), settings.pop("examples"))
    size = task.eval_batch // 4
    chosen = Subset(examples, chosen.tolist())
    batches = list(DataLoader(chosen, batch_size=size, collate_fn=trainer.data_collator))
    plan = Plan(samples=0, noise=False, budget=False, **settings)
    try:
        found = measure(Objective(model, batches), plan)
    except (ValueError, ArithmeticError):  # finite weights, but an infinite loss
        return {}
    return {name: finite(value) for name, value in found.items()}


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

"""What the comparison records of a final model: scores, corrupted images, sharpness."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from compare import measures as comparison_measures
from compare.corruptions import CORRUPTIONS, corrupt
from compare.measures import calibration_error, changed_weights, noisy, rounded, scores, select
from compare.recipes import Recipe
from compare.report import MEASURES
from compare.results import RunSpec
from compare.runs import build_trainer, train_once
from compare.tasks import build_task
from comparison import tiny_task
from transformers import EvalPrediction

SAM = Recipe("sam", "d", options={"sam_rho": 0.1})
SPEC = RunSpec("sam", "0.4", 1)


def two_classes(confidences: list[float]) -> np.ndarray:
    return np.array([[c, 1 - c] for c in confidences])


# ---------------------------------------------------------------------------------- single numbers


def test_the_calibration_error_is_that_by_hand():
    # Bins of 1/15: 0.95 and 0.98 share the last one, 0.61 and 0.65 the tenth, 0.55 is alone.
    probabilities = two_classes([0.95, 0.98, 0.61, 0.65, 0.55])
    labels = np.array([0, 1, 0, 0, 1])
    gaps = [abs(0.5 - 0.965) * 2, abs(1 - 0.63) * 2, abs(0 - 0.55) * 1]
    assert calibration_error(probabilities, labels) == pytest.approx(sum(gaps) / 5)
    right = np.array([0, 0, 0, 1])  # errors within a bin cancel, those of two bins do not
    assert calibration_error(two_classes([0.75] * 4), right) == pytest.approx(0)
    apart = two_classes([0.7, 0.7, 0.8, 0.8])
    assert calibration_error(apart, right) == pytest.approx((0.3 * 2 + 0.3 * 2) / 4)


def test_a_confidence_on_the_border_of_two_bins_is_in_the_lower_one():
    # 0.8 = 12/15 is with 0.75 in (11/15, 12/15]; in the next bin, the gaps would not cancel.
    probabilities = two_classes([0.8, 0.75])
    assert calibration_error(probabilities, np.array([0, 1])) == pytest.approx(abs(1 - 1.55) / 2)
    assert calibration_error(two_classes([1.0]), np.array([0])) == 0


def test_scores_are_those_by_hand():
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=np.float32)) + 5
    found = scores(EvalPrediction(logits, np.array([0, 1, 1])))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-math.log(0.9 * 0.4 * 0.8) / 3, rel=1e-5)
    # 3 true and 1 false positive, 1 true and 1 false negative; hidden states after the logits
    logits, labels = np.eye(2)[[1, 1, 1, 0, 0, 1]], np.array([1, 1, 1, 0, 1, 0])
    found = scores(EvalPrediction((logits, None), labels))
    expected = (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2)
    assert found["matthews_correlation"] == pytest.approx(expected)


# ----------------------------------------------------------------------------------- a final model


def test_a_model_that_diverged_has_no_such_numbers(tmp_path):
    task, options = tiny_task()
    trainer = build_trainer(SAM, task, SPEC, options, str(tmp_path))
    with torch.no_grad():  # finite, but the loss is not
        for parameter in trainer.model.parameters():
            parameter.mul_(1e20)
    assert comparison_measures.measure_sharpness(trainer, task, SPEC) == {}
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    record = comparison_measures.measure_model(trainer, task, SPEC, with_sharpness=True)
    assert record["ece"] is None and record["nll"] is None and record["sharpness"] == {}
    json.dumps(record, allow_nan=False)


def test_a_run_records_its_scores_and_the_mean_accuracy_on_corrupted_images(monkeypatch):
    task, options = tiny_task()
    record = train_once(SAM, task, SPEC, options)
    assert len(record["shifts"]) == 10
    assert record["corrupted_accuracy"] == pytest.approx(np.mean([*record["shifts"].values()]))
    assert 0 <= record["ece"] <= 1 and record["nll"] > 0
    assert record["passes"] == 2.0 and record["updates"] == 4 and "sharpness" not in record
    # While rho is tuned, the test images are not used.
    monkeypatch.setattr(type(task), "shifted_sets", lambda self, level: pytest.fail("used"))
    record = train_once(SAM, task, RunSpec("sam", "0.4", 100, tuned_rho=0.1), options)
    assert "corrupted_accuracy" not in record


def test_no_corruption_at_all_gives_back_the_test_images(monkeypatch):
    task, _ = tiny_task()
    monkeypatch.setattr("compare.tasks.corrupt", lambda pixels, kind, severity: pixels)
    _, scored = task.sets("0.4", 1, is_tuning=False)
    for images in task.shifted_sets("0.4").values():
        assert len(images) == len(scored)
        for i in (0, 7, len(images) - 1):
            assert images[i]["labels"] == scored[i]["labels"]
            torch.testing.assert_close(images[i]["pixel_values"], scored[i]["pixel_values"])


def test_the_weights_are_changed_for_the_score_alone_and_the_same_each_time():
    model = torch.nn.Linear(8, 4)
    before = [p.clone() for p in model.parameters()]
    seen = []
    for _ in range(2):
        with pytest.raises(KeyError), changed_weights(model, noisy, 0.05, seed=3):
            seen.append(model.weight.detach().clone())
            raise KeyError
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], before[0])

    def fail_at_the_bias(weight, size, generator):
        return weight + 1 if weight.ndim == 2 else 1 / 0

    with pytest.raises(ZeroDivisionError), changed_weights(model, fail_at_the_bias, 1, seed=0):
        pass
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rounded_weights_are_the_nearest_of_a_symmetric_grid_for_each_channel(bits):
    weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    weight[1] = 0  # a channel without a scale
    found = rounded(weight, bits, torch.Generator())
    for channel, new in zip(weight.double().numpy(), found.double().numpy(), strict=True):
        step = np.abs(channel).max() / (2 ** (bits - 1) - 1)
        expected = step * np.round(channel / step) if step else channel
        np.testing.assert_allclose(new, expected, atol=1e-6)
    bias = torch.randn(4)
    assert rounded(bias, bits, torch.Generator()) is bias


def test_the_noise_has_a_share_of_the_norm_of_its_tensor():
    weight = torch.full((6, 7), 2.0)
    moved = noisy(weight, 0.05, torch.Generator().manual_seed(0)) - weight
    assert moved.norm().item() == pytest.approx(0.05 * weight.norm().item(), rel=1e-4)
    assert moved.std() > 0


def test_the_selected_epoch_has_the_least_validation_error():
    errors = [(0.5, 0.40), (None, 0.1), (0.3, 0.45), (0.4, 0.30)]
    curve = [
        {"updates": 10 * i, "validation_mse": v, "test_mse": t, "test_mae": t / 2}
        for i, (v, t) in enumerate(errors)
    ]
    assert select(curve) == {"selected_mse": 0.45, "selected_mae": 0.225, "selected_update": 20}
    assert select(curve[1:2]) == dict.fromkeys(("selected_mse", "selected_mae", "selected_update"))


def test_sharpness_is_that_of_the_labels_that_were_trained_on(tmp_path, monkeypatch):
    small = {**comparison_measures.SHARPNESS, "iterations": 3, "trace_samples": 2}
    monkeypatch.setattr(comparison_measures, "SHARPNESS", small)
    measure, seen = comparison_measures.measure, []

    def note(objective, plan):
        seen.extend(torch.cat([batch["labels"] for batch in objective.batches]).tolist())
        return {**measure(objective, plan), "other": math.inf}

    monkeypatch.setattr(comparison_measures, "measure", note)
    task, options = tiny_task()
    options.sharpness = True
    found = train_once(SAM, task, SPEC, options)["sharpness"]
    for key in [key for key, _, _ in MEASURES if key.startswith("sharpness.")]:
        assert math.isfinite(found[key.removeprefix("sharpness.")])
    assert found["other"] is None
    train, _ = task.sets("0.4", 1, is_tuning=False)
    assert seen == train.labels.tolist()
    assert build_task(options).settings["sharpness"]["examples"] == 256


# ------------------------------------------------------------------------------------- corruptions


def images(side: int) -> torch.Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_strong_corruption_moves_the_pixels_more_than_a_mild_one(kind, side):
    pixels = images(side)
    before = pixels.clone()
    mild, strong = (corrupt(pixels, kind, severity) for severity in CORRUPTIONS[kind])
    assert torch.equal(pixels, before)
    for corrupted in (mild, strong):
        assert corrupted.shape == pixels.shape and corrupted.dtype == pixels.dtype
        assert corrupted.min() >= 0 and corrupted.max() <= 1
    assert 0 < (mild - pixels).norm() < (strong - pixels).norm()


def test_the_noise_is_the_same_every_time_and_has_its_standard_deviation():
    grey = torch.full((50, 3, 32, 32), 0.5)
    noisy = corrupt(grey, "gaussian_noise", 0.1)
    assert torch.equal(noisy, corrupt(grey, "gaussian_noise", 0.1))
    assert noisy.std().item() == pytest.approx(0.1, rel=0.01)


def test_the_blur_of_a_point_is_a_gaussian_of_sum_1_and_an_even_image_is_unchanged():
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    blurred = corrupt(point, "gaussian_blur", 1.0)[0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    assert (blurred[4, 5] / blurred[4, 4]).item() == pytest.approx(0.60653, abs=1e-4)  # e^(-1/2)
    assert (blurred[5, 5] / blurred[4, 4]).item() == pytest.approx(0.36788, abs=1e-4)  # e^-1
    even = torch.full((1, 3, 8, 8), 0.7)
    assert torch.allclose(corrupt(even, "gaussian_blur", 1.0), even)


PAIR = [[0.0, 1.0], [0.4, 0.6]]  # mean 0.5
ROW = [[0.0, 0.4, 0.8, 1.0]] * 4  # to 3 cells of 4/3 pixels, which count by their area
CELLS = [0.25 * 0.4, 0.5 * 0.4 + 0.5 * 0.8, 0.25 * 0.8 + 0.75 * 1.0]
RAMP = (torch.arange(16.0) / 15).reshape(4, 4).tolist()


@pytest.mark.parametrize(
    ("kind", "severity", "pixels", "expected"),
    [
        ("contrast", 0.5, PAIR, [[0.25, 0.75], [0.45, 0.55]]),
        ("brightness", 0.3, PAIR, [[0.3, 1.0], [0.7, 0.9]]),  # 1.3 is clipped
        ("pixelate", 0.75, ROW, [[CELLS[0], CELLS[1], CELLS[1], CELLS[2]]] * 4),
        (
            *("pixelate", 0.5, RAMP),
            [[2.5 / 15] * 2 + [4.5 / 15] * 2] * 2 + [[10.5 / 15] * 2 + [12.5 / 15] * 2] * 2,
        ),
    ],
)
def test_corruptions_are_those_of_their_formulas(kind, severity, pixels, expected):
    found = corrupt(torch.tensor([[pixels]]), kind, severity)
    torch.testing.assert_close(found, torch.tensor([[expected]]))

"""What is recorded of the final models, and the table of it."""

from __future__ import annotations

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import EvalPrediction

pytest.importorskip("sam_hf")

import compare_methods
from compare import measures as comparison_measures
from compare.format import in_order
from compare.measures import calibration_error, scores
from compare.measures_table import measures_table
from compare.recipes import Recipe
from compare.report import make_rows, title
from compare.results import RunSpec
from compare.runs import build_trainer, train_once
from compare.sharpness_plot import draw_sharpness
from compare.tasks import build_task
from comparison import tiny_task

SAM = Recipe("sam", "d", options={"sam_rho": 0.1})
SPEC = RunSpec("sam", "0.4", 1)


def two_classes(confidences: list[float]) -> np.ndarray:
    return np.array([[c, 1 - c] for c in confidences])


# ----------------------------------------------------------------------------------- single numbers


def test_the_calibration_error_of_three_bins_is_that_by_hand():
    # Bins of 1/15: 0.95 and 0.98 share the last one, 0.61 and 0.65 the tenth, 0.55 is alone.
    probabilities = two_classes([0.95, 0.98, 0.61, 0.65, 0.55])
    labels = np.array([0, 1, 0, 0, 1])
    gaps = [abs(0.5 - 0.965) * 2, abs(1 - 0.63) * 2, abs(0 - 0.55) * 1]
    assert calibration_error(probabilities, labels) == pytest.approx(sum(gaps) / 5)


def test_errors_within_a_bin_cancel_and_those_of_two_bins_do_not():
    right = np.array([0, 0, 0, 1])  # three of four
    assert calibration_error(two_classes([0.75] * 4), right) == pytest.approx(0)
    apart = two_classes([0.7, 0.7, 0.8, 0.8])  # both of 0.7 are right, one of 0.8
    assert calibration_error(apart, right) == pytest.approx((0.3 * 2 + 0.3 * 2) / 4)


def test_a_confidence_on_the_border_of_two_bins_is_in_the_lower_one():
    # 0.8 = 12/15 is with 0.75 in (11/15, 12/15]; were it above, the gaps would not cancel so.
    probabilities = two_classes([0.8, 0.75])
    assert calibration_error(probabilities, np.array([0, 1])) == pytest.approx(abs(1 - 1.55) / 2)
    assert calibration_error(two_classes([1.0]), np.array([0])) == 0


def test_scores_are_those_by_hand():
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=np.float32)) + 5
    found = scores("accuracy")(EvalPrediction(logits, np.array([0, 1, 1])))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-math.log(0.9 * 0.4 * 0.8) / 3, rel=1e-5)
    assert set(found) == {"accuracy", "ece", "nll"}


def test_matthews_correlation_is_that_by_hand():
    logits = np.eye(2)[[1, 1, 1, 0, 0, 1]]
    labels = np.array(
        [1, 1, 1, 0, 1, 0]
    )  # 3 true and 1 false positive, 1 true and 1 false negative
    expected = (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2)
    found = scores("matthews_correlation")(EvalPrediction((logits, None), labels))
    assert found["matthews_correlation"] == pytest.approx(expected)


def test_a_model_that_diverged_has_no_such_numbers(tmp_path):
    found = scores("accuracy")(EvalPrediction(np.full((4, 3), np.nan), np.zeros(4, int)))
    assert math.isnan(found["ece"]) and math.isnan(found["nll"])
    task, options = tiny_task()
    trainer = build_trainer(SAM, task, SPEC, options, str(tmp_path))
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    record = comparison_measures.measure_model(trainer, task, SPEC, with_sharpness=True)
    assert record["ece"] is None and record["nll"] is None and record["sharpness"] == {}
    json.dumps(record, allow_nan=False)
    trainer = build_trainer(SAM, task, SPEC, options, str(tmp_path))
    with torch.no_grad():  # finite, and too large for the loss to be
        for parameter in trainer.model.parameters():
            parameter.mul_(1e20)
    assert comparison_measures.measure_sharpness(trainer, task, SPEC) == {}


# -------------------------------------------------------------------------------------------- a run


def test_a_run_records_calibration_and_the_mean_accuracy_on_corrupted_images():
    task, options = tiny_task()
    record = train_once(SAM, task, SPEC, options)
    assert len(record["corruptions"]) == 10
    assert record["corrupted_accuracy"] == pytest.approx(np.mean([*record["corruptions"].values()]))
    assert 0 <= record["ece"] <= 1 and record["nll"] > 0
    assert "sharpness" not in record


def test_no_corruption_at_all_gives_back_the_test_images(monkeypatch):
    task, _ = tiny_task()
    monkeypatch.setattr("compare.images.corrupt", lambda pixels, kind, severity: pixels)
    _, scored = task.sets("0.4", 1, is_tuning=False)
    for images in task.corrupted_sets().values():
        assert len(images) == len(scored)
        for i in (0, 7, len(images) - 1):
            assert images[i]["labels"] == scored[i]["labels"]
            torch.testing.assert_close(images[i]["pixel_values"], scored[i]["pixel_values"])


def test_while_rho_is_tuned_the_test_images_are_not_looked_at(monkeypatch):
    task, options = tiny_task()
    monkeypatch.setattr(type(task), "corrupted_sets", lambda self: pytest.fail("looked at"))
    record = train_once(SAM, task, RunSpec("sam", "0.4", 100, tuned_rho=0.1), options)
    assert "corrupted_accuracy" not in record


def test_sharpness_is_that_of_the_labels_that_were_trained_on(tmp_path, monkeypatch):
    seen = {}

    def note(objective, plan):
        seen["labels"] = torch.cat([batch["labels"] for batch in objective.batches]).tolist()
        return {"worst_sharpness": 0.5, "hessian_trace": math.inf}

    monkeypatch.setattr(comparison_measures, "measure", note)
    task, options = tiny_task()
    options.sharpness = True
    record = train_once(SAM, task, SPEC, options)
    assert record["sharpness"] == {"worst_sharpness": 0.5, "hessian_trace": None}
    train, _ = task.sets("0.4", 1, is_tuning=False)
    assert seen["labels"] == train.data.labels.tolist()
    assert build_task(options).settings["sharpness"]["examples"] == 256


def test_sharpness_is_measured_by_the_library(tmp_path, monkeypatch):
    small = {**comparison_measures.SHARPNESS, "examples": 32, "iterations": 3, "trace_samples": 2}
    monkeypatch.setattr(comparison_measures, "SHARPNESS", small)
    task, options = tiny_task()
    trainer = build_trainer(SAM, task, SPEC, options, str(tmp_path))
    found = comparison_measures.measure_sharpness(trainer, task, SPEC)
    for measure in comparison_measures.MEASURES:
        if measure.key.startswith("sharpness."):
            assert math.isfinite(measure.read({"sharpness": found}))


def test_a_part_of_the_data_that_all_levels_have_stands_in_the_title_once():
    content = results()
    for run in content["runs"]:
        run["level"] = {"0": "0 at 0.1"}.get(run["level"], run["level"])
    expected = "trec6, 10 % of 100 training texts: mean over 0, 20 % wrong labels, 3 seeds"
    assert title(content) == expected


def test_levels_stand_in_order_however_they_were_run():
    levels = ["worse_label", "0.8", "0.2 at 0.1", "0", "aggre_label", "0 at 0.1", "0.2"]
    assert in_order(levels) == [
        *("0", "0.2", "0.8", "aggre_label", "worse_label"),
        *("0 at 0.1", "0.2 at 0.1"),
    ]
    content = results()
    content["runs"].reverse()
    rows, _ = make_rows(content, None, "sam")
    assert list(rows[0].accuracy) == ["0", "0.2 at 0.1"]


def test_a_title_with_many_levels_counts_them():
    content = results()
    for i, run in enumerate(content["runs"]):
        run["level"] = f"0.{i % 6}"
    assert title(content) == "trec6, 100 training texts: mean over 6 kinds of labels, 3 seeds"


# ---------------------------------------------------------------------------------------- the table


def results(**fields) -> dict:
    """Two recipes, two levels, three seeds, and plain training that is twice as long."""
    runs = []
    for name, length, shift in (("plain", 1.0, 0.0), ("sam", 1.0, -0.1), ("plain", 2.0, 0.05)):
        for level in ("0", "0.2 at 0.1"):
            for seed in range(3):
                run = {"recipe": name, "level": level, "seed": seed, "length": length}
                run |= {"tuned_rho": None, "accuracy": 0.9 - shift, "passes": 1.0}
                run["passes"] = 2.0 if name == "sam" else length
                ece = 0.2 + 0.1 * (level == "0") + 0.01 * seed + shift * (1 + 0.1 * seed)
                runs.append(run | {"ece": ece} | fields)
    recipe = {"description": "d", "group": "methods", "options": {}}
    settings = {"task": "trec6", "training_texts": 100}
    return {"settings": settings, "recipes": {"plain": recipe, "sam": recipe}, "runs": runs}


def line(table: str, measure: str, recipe: str) -> list[str]:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return next(row[2:] for row in cells if row[:2] == [measure, recipe])


def test_the_table_has_means_over_levels_and_differences_paired_by_seed():
    rows, _ = make_rows(results(), None, "sam")
    table = measures_table(rows)
    mean, difference, equal = line(table, "calibration error (ECE)", "sam")
    assert mean.startswith(f"{np.mean([0.15, 0.15, 0.15]):.3f} ± 0.000")
    expected = stats.ttest_1samp([-0.1, -0.11, -0.12], 0).confidence_interval(0.95)
    assert difference == f"-0.110 [{expected.low:+.3f}, {expected.high:+.3f}]"
    assert equal.startswith("-0.165 [")
    assert line(table, "calibration error (ECE)", "plain")[1:] == ["-", "-"]


def test_runs_without_a_measure_are_shown_with_a_dash():
    rows, _ = make_rows(results(nll=None), None, "sam")
    table = measures_table(rows)
    assert line(table, "negative log-likelihood", "sam") == ["-", "-", "-"]
    assert "corrupted" not in table and "Hessian" not in table
    old = results()
    for run in old["runs"]:
        if run["recipe"] == "plain":
            del run["ece"]
    rows, _ = make_rows(old, None, "sam")
    shown = line(measures_table(rows), "calibration error (ECE)", "sam")
    assert shown[0].startswith("0.150") and shown[1:] == ["-", "-"]


def test_a_nested_measure_has_a_line_where_a_run_has_it():
    rows, _ = make_rows(results(sharpness={"worst_sharpness": 0.25}), None, "sam")
    assert line(measures_table(rows), "worst-case sharpness", "sam")[0] == "0.250 ± 0.000"


def test_the_report_is_valid_json_too(tmp_path):
    content = results()
    for run in content["runs"]:  # no gain on average, so that the share of it has no bounds
        run["accuracy"] = 0.5 + 0.1 * ((run["seed"] + (run["recipe"] == "sam")) % 3)
    (tmp_path / "old.json").write_text(json.dumps(content))
    arguments = ["--from_json", str(tmp_path / "old.json"), "--output_dir", str(tmp_path)]
    compare_methods.main([*arguments, "--task", "trec6"])
    found = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert found["title"] == (
        "trec6, 100 training texts: mean over 0 % wrong labels, 10 % of the data, 20 % wrong "
        "labels, 3 seeds"
    )
    assert found["rows"][0]["share"]["low"] is None
    ece = found["rows"][1]["measures"]["ece"]
    assert ece["difference"]["value"] == pytest.approx(-0.11)
    assert "calibration error" in (tmp_path / "table.md").read_text()


# -------------------------------------------------------------------------------------- the picture


@pytest.fixture
def figure(monkeypatch):
    """What was drawn last, still open."""
    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    yield shown
    monkeypatch.undo()
    plt.close("all")


def test_each_model_is_a_point_of_its_score_beside_its_sharpness(tmp_path, figure):
    content = results()
    for i, run in enumerate(content["runs"]):
        run["sharpness"] = {"worst_sharpness": 0.01 * (i + 1), "hessian_eigenvalue": 5.0 - i}
        run["accuracy"] = 0.5 + 0.01 * i
    file = tmp_path / "sharpness.png"
    assert draw_sharpness(content, ["sam"], "the title", "accuracy", file)
    assert file.stat().st_size > 10_000
    grid = figure[-1].axes
    assert [axes.get_title() for axes in grid[:2]] == [
        "0 % wrong labels",
        "10 % of the data, 20 % wrong labels",
    ]
    seen = {
        (round(float(x), 6), round(float(y), 6))
        for axes in grid[:2]
        for drawn in axes.get_lines()
        for x, y in zip(*drawn.get_data(), strict=True)
    }
    assert seen == {(round(0.01 * (i + 1), 6), round(0.5 + 0.01 * i, 6)) for i in range(18)}
    eigenvalues = [drawn.get_xdata()[0] for axes in grid[2:] for drawn in axes.get_lines()]
    assert sorted(eigenvalues) == [1.0, 2.0, 3.0, 4.0, 5.0]  # there is no logarithm of the others
    notes = [axes.get_xlabel() for axes in grid[2:]]
    assert [int(note.split()[-2]) for note in notes] == [6, 7]
    labels = [text.get_text() for text in figure[-1].legends[0].get_texts()]
    assert labels == ["plain", "plain, with as many passes as a recipe", "sam"]


def test_without_measures_there_is_no_picture_of_them(tmp_path):
    assert not draw_sharpness(results(), ["sam"], "t", "accuracy", tmp_path / "x.png")
    assert not draw_sharpness(results(sharpness={}), ["sam"], "t", "accuracy", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()

"""Series in the comparison: horizons, curves, shorter runs inside longer ones, tables of errors."""

from __future__ import annotations

import copy
import json

import compare_methods
import numpy as np
import pytest
from compare import series
from compare.arguments import Options
from compare.comparison import Comparison
from compare.recipes import PLAIN, Recipe
from compare.report import main_table, measures_table, recipes_table
from compare.results import RunSpec
from compare.runs import read_prefix, train_once
from compare.tasks import build_task
from comparison import cells, results, series_file, write_recipes

AUTO = {"description": "d", "options": {"sam_rho": "auto"}}
RECIPES = {"plain": {"description": "d", "trainer": "plain"}}
RECIPES |= {"sam": {"description": "d", "options": {"sam_rho": 0.7}}, "auto": AUTO}
RECIPES["late"] = {"description": "d", "options": {"sam_rho": "auto", "sam_start_ratio": 0.5}}
GIVEN = {"task": "forecasting", "prediction_lengths": [4, 8], "num_train_epochs": 2}
GIVEN |= {"per_device_train_batch_size": 2000, "use_cpu": True}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    file = series_file(tmp_path_factory.mktemp("series"))
    return {**GIVEN, "data_file": str(file)}


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A comparison of two horizons; its folder and results."""
    folder = tmp_path_factory.mktemp("comparison")
    tokens = [*write_recipes(folder, RECIPES), "--output_dir", str(folder / "out")]
    for name, value in given.items():
        values = value if isinstance(value, list) else [str(value).lower()]
        values = [value] if name == "data_file" else values
        tokens += [f"--{name}", *map(str, values)]
    tokens += ["--seeds", "0", "1", "--timing_rounds", "0"]
    return folder / "out", compare_methods.main(tokens), tokens


def test_each_horizon_is_a_level_and_the_next_season_follows_the_test(given):
    task = build_task(Options(**given))
    assert list(task.levels) == ["4 steps", "8 steps"]
    for level, length in (("4 steps", 4), ("8 steps", 8)):
        train, test = task.sets(level, 0, is_tuning=False)
        assert train.__getitems__([0])["future_values"].shape == (1, length, 1)
        assert task.model(0, level).config.prediction_length == length
        rest = task.shifted_sets(level)["next season"]
        # The first forecast begins with the first row after the last one that the test forecasts.
        assert rest.indices[0] == test.indices[-1] + length
        assert rest.indices[-1] == 14_500 - 512 - length
    assert list(task.curve_sets("4 steps")) == ["validation", "test"]


def test_a_run_records_the_errors_of_each_epoch_and_the_selected_one(finished):
    for run in finished[1]["runs"]:
        if "curve" in run:
            assert run["curve"][-1]["test_mse"] == pytest.approx(run["mse"], rel=1e-6)
            best = min(run["curve"], key=lambda point: point["validation_mse"])
            assert run["selected_mse"] == best["test_mse"]
            assert run["next_season_mse"] > 0 and run["rounded"].keys() == {"8", "4", "3"}


def test_a_shorter_plain_run_is_the_beginning_of_a_longer_one(finished, given):
    """With a constant learning rate it is read from the curve, and equals a run of its own."""
    options = Options(**given)
    task = build_task(options)
    found = [run for run in finished[1]["runs"] if run["recipe"] == PLAIN and run["length"] == 1.5]
    assert len(found) == 4 and not any("curve" in run for run in found)
    spec = RunSpec(PLAIN, "4 steps", 1, length=1.5)
    (read,) = [run for run in found if (run["level"], run["seed"]) == ("4 steps", 1)]
    made = train_once(Recipe(PLAIN, "d", trainer="plain"), task, spec, options)
    assert made["mse"] == pytest.approx(read["mse"], rel=1e-6)
    assert made["updates"] == read["updates"] and made["selected_mse"] == read["selected_mse"]

    class File:
        def find(self, spec):
            at = (spec.recipe, spec.level, spec.seed, spec.length)
            runs = finished[1]["runs"]
            keys = ("recipe", "level", "seed", "length")
            return next((r for r in runs if at == tuple(r[k] for k in keys)), None)

    # Where no epoch ends there, the run must be made.
    assert read_prefix(RunSpec(PLAIN, "4 steps", 1, length=1.25), [2.0, 1.5], File()) is None


def test_gains_of_an_error_are_shares_of_plain_trainings():
    scores = {("plain", "96 steps", 1.0): [0.4, 0.6], ("sam", "96 steps", 1.0): [0.3, 0.4]}
    scores |= {("plain", "192 steps", 1.0): [1.0, 1.0], ("sam", "192 steps", 1.0): [1.2, 0.9]}
    content = results(scores)
    for run in content["runs"]:
        run["mse"] = run.pop("accuracy")
        run["rounded"] = {"4": run["mse"] + 0.05}
    content["settings"] = {"task": "forecasting", "metric": "mse", "file": "ETTh1"}
    content["settings"]["model"] = {"name": "samformer"}
    comparison = Comparison(content, "sam")
    assert comparison.levels == ["96 steps", "192 steps"]
    gain = comparison.contrast("sam", "96 steps").gain
    assert gain.value == pytest.approx(np.mean([0.1, 0.2]) / 0.5)
    by_seed = [(0.1 / 0.5 - 0.2 / 1.0) / 2, (0.2 / 0.5 + 0.1 / 1.0) / 2]
    assert comparison.contrast("sam").gain.value == pytest.approx(np.mean(by_seed))
    assert comparison.title() == "forecasting, ETTh1, samformer, 2 seeds: 96 steps; 192 steps"
    assert "gain, %" in main_table(comparison)
    # What rounding loses is positive, for an error too.
    lost = [row for row in cells(measures_table(comparison)) if "4 bits" in row[0]]
    assert [row[2] for row in lost] == ["0.0500 ± 0.0000"] * 2


def test_the_table_of_forecasts_names_the_published_errors(finished, tmp_path):
    folder, content, _ = finished
    assert (folder / "mse_and_compute.png").exists()
    head, _, first, second = cells(series.table([content], "mse"))
    assert (first[2], second[2]) == ("4 steps", "8 steps") and first[-1] == "-"
    mean = np.mean([r["mse"] for r in content["runs"] if is_run(r, PLAIN, "4 steps", 1.0)])
    assert first[head.index("plain")].startswith(f"{mean:.3f}")
    longer = np.mean([r["mse"] for r in content["runs"] if is_run(r, PLAIN, "4 steps", 2.0)])
    assert first[head.index("plain, equal compute")].startswith(f"{longer:.3f}")
    known = copy.deepcopy(content)
    known["settings"]["file"] = "ETTh1"
    text = json.dumps(known).replace("4 steps", "96 steps").replace("8 steps", "192 steps")
    rows = cells(series.table([json.loads(text)], "selected_mse"))
    assert rows[2][-2:] == ["0.509", "0.381"] and rows[3][-2:] == ["-", "0.409"]


def is_run(run, recipe, level, length):
    return (run["recipe"], run["level"], run["length"]) == (recipe, level, length)


def test_the_table_of_recipes_has_columns_for_each_file(finished):
    comparison = Comparison(finished[1], "sam")
    head, _, *rows = cells(recipes_table([comparison, comparison]))
    assert head[:2] == ["recipe", "passes"] and len(head) == 6
    assert [row[0] for row in rows] == ["sam", "auto", "late"]
    assert rows[0][3] == "-" or rows[0][3].startswith("1.00")
    assert [row[1] for row in rows] == ["2.00", "2.00", "1.50"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_noise": [0.4]}, "--label_noise has no effect with --task forecasting"),
        ({"model": "vit"}, "--model has no effect with --task forecasting"),
        ({"data_file": None}, "--task forecasting needs --data_file"),
        ({"prediction_lengths": [4, 4]}, "--prediction_lengths .*: a value appears twice"),
        ({"train_file": ["x"]}, "--train_file has no effect with --task forecasting"),
        ({"rho": ["sam"]}, "--rho takes NAME=NUMBER, got"),
        ({"rho": ["sam=-1"]}, "--rho must be above 0 and finite"),
    ],
)
def test_options_without_effect_are_refused(given, changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**{**given, **changes})


def test_options_of_a_series_are_refused_elsewhere():
    for options in ({"data_file": "x"}, {"prediction_lengths": [96]}, {"config_overrides": "a=1"}):
        with pytest.raises(ValueError, match="has no effect without --task forecasting"):
            Options(**options)
    with pytest.raises(ValueError, match="--model has no effect with --task digits"):
        Options(model="samformer")
    with pytest.raises(ValueError, match="--rho has no effect with --tune"):
        Options(rho=["sam=0.7"], tune=True)

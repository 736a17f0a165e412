"""The comparison of the automatic radius with fixed ones: what it trains, keeps and concludes."""

from __future__ import annotations

import json

import compare_radius
import numpy as np
import pytest
import torch
import yaml
from common.cli import InputError
from compare import radius
from compare import runs as comparison_runs
from compare.forecasting import LEVEL, ForecastingOptions, ForecastingTask
from compare.recipes import Recipe
from compare.results import RunSpec
from compare.runs import train_once
from comparison import cells, series_file
from train_forecasting import main as train_forecasting

TINY = {"max_train_samples": 128, "per_device_train_batch_size": 32, "num_train_epochs": 1}
DIGITS = {
    "options": {"task": "digits", "label_noise": [0, 0.4], **TINY},
    "tuning_seeds": [100],
    "grids": {"sam": [0.05, 0.1], "asam": [1]},
    "only_at": {"asam": [0.4]},
}
SERIES = {
    "options": {"config": "etth1_samformer.yaml", "arguments": {}},
    "files": {"data_file": "ett/series.csv"},
    "grids": {"sam": [0.1, 0.5]},
}
SIZES = {"context_length": 16, "prediction_length": 4, "num_train_epochs": 1}
SERIES["options"]["arguments"] = {**SIZES, "per_device_train_batch_size": 200}


@pytest.fixture(scope="module", autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(folder, tasks, *others):
    file = folder / "tasks.yaml"
    file.write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False))
    own = ["--seeds", "0", "1", "--num_workers", "1", "--use_cpu", "true"]
    return [str(file), *own, "--output_dir", str(folder / "out"), *others]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radius")
    given = arguments(folder, {"digits": DIGITS})
    return folder / "out", given, compare_radius.main(given)


# ------------------------------------------------------------------------------------------ course


def test_the_search_uses_its_own_seeds_and_what_both_need_is_trained_once(finished):
    folder, _, contents = finished
    runs = contents["digits"]["runs"]
    searches = [run for run in runs if run["tuned_rho"] is not None]
    assert {run["seed"] for run in searches} == {100}
    assert len(searches) == 2 * 2 + 1  # SAM's grid at both levels, ASAM's at one
    finals = [(r["recipe"], r["level"], r["seed"]) for r in runs if r["tuned_rho"] is None]
    assert len(finals) == len(set(finals)) and {seed for *_, seed in finals} == {0, 1}
    assert len({run["updates"] for run in runs if run not in searches}) == 1
    for run in runs:
        assert ("rho_median" in run) == run["recipe"].endswith("auto")
    asam = {(name, level) for name, level, _ in finals if name.startswith("asam")}
    assert asam == {("asam, rho 1", "0.4"), ("asam, auto", "0.4")}
    table = (folder / "table.md").read_text()
    assert len(cells(table.split("\n\n")[1])) == 2 + 3
    assert (folder / "radius.png").stat().st_size > 10_000


def test_a_repeated_command_and_from_json_train_nothing(finished, monkeypatch, tmp_path):
    folder, given, contents = finished

    def refuse(*args):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(comparison_runs, "train_once", refuse)
    assert compare_radius.main(given) == contents
    made = ["--from_json", str(folder / "results.json"), "--output_dir", str(tmp_path)]
    assert compare_radius.main(made) == json.loads((folder / "results.json").read_text())
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()


def test_only_what_is_missing_is_trained(finished, tmp_path, monkeypatch):
    _, given, contents = finished
    content, lost = contents["digits"], contents["digits"]["runs"][-1]
    (tmp_path / "tasks").mkdir()
    kept = json.dumps({**content, "runs": content["runs"][:-1]})
    (tmp_path / "tasks" / "digits.json").write_text(kept)
    made = []

    def note(recipe, task, spec, options):
        made.append(spec)
        return train_once(recipe, task, spec, options)

    monkeypatch.setattr(comparison_runs, "train_once", note)
    again = compare_radius.main([*given, "--output_dir", str(tmp_path)])["digits"]["runs"][-1]
    assert [(spec.recipe, spec.seed) for spec in made] == [(lost["recipe"], lost["seed"])]
    assert again["accuracy"] == lost["accuracy"]


# ------------------------------------------------------------------------------------------ series


def test_a_series_is_trained_as_by_its_script_and_tuned_on_the_validation_part(tmp_path):
    options = ForecastingOptions(
        str(series_file(tmp_path)),
        "etth1_samformer.yaml",
        SERIES["options"]["arguments"],
        use_cpu=True,
    )
    task = ForecastingTask(options)
    sam = Recipe("sam", "d", options={"sam_rho": 0.7})
    found = train_once(sam, task, RunSpec("sam", LEVEL, 0), options)
    given = [f"--{name}={value}" for name, value in options.arguments.items()]
    given += [f"--data_file={options.data_file}", "--use_cpu", f"--output_dir={tmp_path / 'out'}"]
    config = str(compare_radius.CONFIGS / options.config)
    (run,) = train_forecasting([config, *given])
    assert found["mse"] == run.scores["mse"] and "accuracy" not in found
    train, scored = task.sets(LEVEL, 0, is_tuning=True)
    assert scored.indices[0] > train.indices[-1]
    assert task.sets(LEVEL, 0, is_tuning=False)[1].indices[0] > scored.indices[-1]


def test_a_series_is_compared_end_to_end(tmp_path):
    series_file(tmp_path)
    given = arguments(tmp_path, {"digits": DIGITS, "series": SERIES}, "--data_dir", str(tmp_path))
    contents = compare_radius.main([*given, "--tasks", "series"])
    study = radius.Study(contents["series"])
    scores = {
        rho: study.values("mse", f"sam, rho {rho}", LEVEL, [100], tuned=rho) for rho in (0.1, 0.5)
    }
    assert study.best_rho("sam", LEVEL) == min(scores, key=scores.get)  # of errors the least
    assert "less is better" in (tmp_path / "out" / "table.md").read_text()


# -------------------------------------------------------------------------------------- conclusions


def row(plain, fixed, best, auto, unit=100.0, chance=0.1):
    scores = dict(zip(radius.WAYS, map(np.array, (plain, fixed, best, auto)), strict=True))
    return radius.Row("task", "accuracy", scores, unit, 0.1, False, 0.2, chance)


@pytest.mark.parametrize(
    ("auto", "unit", "verdict"),
    [
        ([0.920, 0.921, 0.919], 100.0, "above"),  # by a point with every seed
        ([0.920, 0.921, 0.919], -100.0, "below"),  # the same as errors
        ([0.900, 0.901, 0.899], 100.0, "below"),
        ([0.900, 0.920, 0.950], 100.0, "within"),  # -1.0, +0.9, +4.1: includes zero
    ],
)
def test_the_verdict_is_that_of_the_paired_interval(auto, unit, verdict):
    best = [0.910, 0.911, 0.909]  # 0.91 ± 4.303 · 0.001 / √3 = 0.0025
    assert row([0.8] * 3, [0.8] * 3, best, auto, unit).verdict() == verdict


def test_a_mean_in_the_interval_of_the_best_radius_is_within():
    best, auto = [0.90, 0.91, 0.92], [0.91, 0.92, 0.93]  # 0.91 ± 0.025, and always a point more
    found = row([0.8] * 3, [0.8] * 3, best, auto)
    assert found.gain("auto", "best fixed").low > 0 and found.verdict() == "within"


def test_a_gain_in_error_is_positive_and_in_percent_of_plain_training():
    found = row([0.5, 0.5], [0.5, 0.5], [0.45, 0.45], [0.4, 0.4], -100 / 0.5, None)
    assert found.gain("auto").value == pytest.approx(20)
    assert found.gain("auto", "best fixed").value == pytest.approx(10)


def test_ruined_runs_are_counted():
    found = row([0.9, 0.9], [0.1, 0.11], [0.05, np.nan], [0.9, 0.9])
    assert [found.ruined(way) for way in radius.WAYS] == [0, 1, 2, 0]
    found = row([0.5, 1.0], [0.59, 1.21], [0.61, np.nan], [0.4, 1.1], -100, None)
    assert [found.ruined(way) for way in radius.WAYS] == [0, 1, 2, 0]


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "others", "said"),
    [
        ({}, ["--tasks", "digit"], r"no task 'digit' \(did you mean digits\?\)"),
        ({}, ["--tasks", "series"], "task 'series' needs --data_dir, with ett/series.csv"),
        ({}, ["--data_dir", "nowhere"], "has no file 'nowhere/ett/series.csv'"),
        ({}, ["--seeds", "0", "100"], "seed 100 is in --seeds and tuning_seeds"),
        ({"grids": {"sma": [1]}}, [], r"no method 'sma' \(did you mean sam\?\)"),
        ({"grids": {"sam": 0.1}}, [], "sam must list numbers, got 0.1"),
        ({"grid": {}}, [], "unexpected keyword argument 'grid'"),
        ({"options": {"task": "digitz"}}, [], "task 'digits': .*invalid choice: 'digitz'"),
        ({"options": {"task": "digits", "seeds": [1]}}, [], "seeds is not an option of a task"),
        ({"only_at": {"asam": [0.3]}}, [], r"only_at: asam has no level of \[0.3\]"),
        ({"options": {"task": "cola"}}, [], "needs --model_name_or_path"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(change, others, said, tmp_path):
    tasks = {"digits": {**DIGITS, **change}, "series": SERIES}
    with pytest.raises(InputError, match=said):
        compare_radius.main(arguments(tmp_path, tasks, *others))


def test_a_file_that_is_none_of_its_own_is_refused(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"settings": {}, "recipes": {}, "runs": []}')
    with pytest.raises(InputError, match=r"was not written by compare_radius.py"):
        compare_radius.main(["--from_json", str(file), "--output_dir", str(tmp_path)])


def test_the_tasks_of_the_repository_are_valid():
    entries = compare_radius.read_tasks(compare_radius.Options(data_dir="data"))
    assert {"digits", "etth1_96", "trec6", "cifar10_vit"} <= entries.keys()
    without = compare_radius.read_tasks(compare_radius.Options())
    assert list(without) == ["digits"]

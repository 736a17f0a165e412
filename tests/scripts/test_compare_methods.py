"""The comparison of recipes: what it trains, keeps, resumes, computes and shows."""

from __future__ import annotations

import json

import compare_methods
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common.cli import InputError
from compare import report as comparison_report
from compare import runs as comparison_runs
from compare.arguments import TUNING_SEEDS
from compare.comparison import Comparison, plain_length
from compare.estimates import mean_interval, paired_gain, share
from compare.recipes import Recipe, RecipeBook
from compare.report import gain_table, measures_table
from compare.results import ResultsFile, RunSpec
from compare.runs import build_trainer, train_once
from comparison import RECIPES, TINY, cells, results, tiny_task, two_levels, write_recipes
from scipy import stats

PASSES = {"plain": 1.0, "sam": 2.0, "every 2nd": 1.5, "last half": 1.5, "quarter": 1.25}


@pytest.fixture(scope="module", autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete comparison: its folder, the arguments, the results and what was printed."""
    folder = tmp_path_factory.mktemp("comparison")
    arguments = [*TINY, *write_recipes(folder, RECIPES), "--output_dir", str(folder / "out")]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_runs, "MEMORY_UPDATES", 4)
        patch.setattr("builtins.print", lambda *text, **_: printed.extend(map(str, text)))
        content = compare_methods.main(arguments)
    return folder / "out", arguments, content, "\n".join(printed)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(comparison_runs, "train_once", refuse)
    monkeypatch.setattr(comparison_runs, "measure_costs", refuse)


# ---------------------------------------------------------------------------------- runs and files


@pytest.mark.slow
def test_passes_are_counted_and_each_distinct_cost_has_one_plain_run_of_that_length(finished):
    runs = finished[2]["runs"]
    for run in runs:
        assert run["passes"] == pytest.approx(PASSES[run["recipe"]])
        assert run["examples_computed"] == run["passes"] * run["length"] * 4 * 32
    longer = [run for run in runs if run["length"] != 1]
    assert {run["recipe"] for run in longer} == {"plain"}
    found = sorted((run["length"], run["seed"]) for run in longer)
    assert found == [(length, seed) for length in (1.25, 1.5, 2.0) for seed in (0, 1)]
    for name, cost in finished[2]["costs"]["recipes"].items():
        assert name not in ("plain", "sam") or cost["passes"] == PASSES[name]
        assert all(seconds > 0 for seconds in cost["seconds"])


@pytest.mark.slow
def test_a_repeated_command_trains_nothing_again(finished, no_training):
    assert compare_methods.main(finished[1])["runs"] == finished[2]["runs"]


@pytest.mark.slow
def test_only_a_missing_run_is_trained(finished, tmp_path, monkeypatch):
    _, arguments, content, _ = finished
    lost = next(run for run in content["runs"] if run["recipe"] == "every 2nd")
    kept = {**content, "runs": [run for run in content["runs"] if run is not lost]}
    (tmp_path / "results.json").write_text(json.dumps(kept))
    made = []

    def note(recipe, task, spec, options):
        made.append(spec)
        return train_once(recipe, task, spec, options)

    monkeypatch.setattr(comparison_runs, "train_once", note)
    compare_methods.main([*arguments, "--output_dir", str(tmp_path)])
    assert [(spec.recipe, spec.seed) for spec in made] == [("every 2nd", lost["seed"])]
    again = json.loads((tmp_path / "results.json").read_text())["runs"][-1]
    assert again["accuracy"] == lost["accuracy"]  # a run depends on nothing but its settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--learning_rate", "0.01"], r"training.learning_rate=0.002, and now it is 0.01"),
        (["--bf16", "true"], r"bf16=None, and now it is True"),
        ("other rho", r"recipe 'sam': options.sam_rho=0.1, and now it is 0.7"),
    ],
)
def test_a_file_of_other_settings_is_refused(finished, no_training, option, said, tmp_path):
    if option == "other rho":
        changed = {**RECIPES, "sam": {"description": "d", "options": {"sam_rho": 0.7}}}
        option = write_recipes(tmp_path, changed)
    with pytest.raises(InputError, match=said):
        compare_methods.main([*finished[1], *option])


def test_runs_are_found_again_in_a_file_and_other_files_are_refused(tmp_path):
    path = tmp_path / "results.json"
    file = ResultsFile(path, {"task": "t", "model": {"depth": 10}})
    spec = RunSpec("sam", "0.4", 1)
    file.add({**vars(spec), "accuracy": 0.5})
    again = ResultsFile(path, {"task": "t", "model": {"depth": 10}})
    assert again.find(spec)["accuracy"] == 0.5 and again.find(RunSpec("sam", "0.4", 2)) is None
    with pytest.raises(InputError, match=r"model.depth=10, and now it is 16: choose another"):
        ResultsFile(path, {"task": "t", "model": {"depth": 16}})
    path.write_text('{"settings": [], "recipes": {}, "runs": []}')
    with pytest.raises(InputError, match="is not a results file"):
        ResultsFile(path, {"task": "t"})
    path.write_text('{"settings": {}, "recipes": {}, "runs": [5]}')
    with pytest.raises(InputError, match="damaged: run 0 has no recipe, level and seed"):
        ResultsFile(path, {"task": "t"})


def test_every_recipe_has_the_same_weights_labels_and_order(tmp_path):
    task, options = tiny_task()
    seen = {}
    for name in ("plain", "sam"):
        recipe = Recipe(name=name, **RECIPES[name])
        trainer = build_trainer(recipe, task, RunSpec(name, "0.4", 1), options, str(tmp_path))
        weights = torch.cat([p.flatten() for p in trainer.model.parameters()])
        batches = [batch["labels"].tolist() for batch in trainer.get_train_dataloader()]
        seen[name] = weights.tolist(), batches
    assert seen["plain"] == seen["sam"]
    train, scored = task.sets("0.4", 1, is_tuning=False)
    assert (train.labels != task.right_labels).sum() == round(0.4 * 128)
    assert scored.labels == task.test["labels"][:]


def test_rho_is_tuned_on_training_images_that_are_not_trained_on(tmp_path):
    task, _ = tiny_task()
    train, scored = task.sets("0.4", 100, is_tuning=True)
    images = [image.tobytes() for image in task.train["image"]]
    trained = {images.index(row["image"].tobytes()) for row in train.examples.images}
    judged = [images.index(row["image"].tobytes()) for row in scored.images]
    assert not trained & set(judged)
    assert len(trained) + len(judged) == 128
    assert scored.labels == task.right_labels[judged].tolist()


@pytest.mark.slow
def test_the_best_rho_of_a_search_is_written_and_used(tmp_path):
    recipes = {**RECIPES, "sam": {"description": "two passes"}}
    tiny = [*TINY[:2], "--per_device_train_batch_size", "32", "--num_train_epochs", "1"]
    arguments = [*tiny, *write_recipes(tmp_path, recipes, {"sam": [0.01, 5.0]})]
    rho_file = tmp_path / "rho.json"
    arguments += ["--rho_file", str(rho_file), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no search has found one for 'sam': run with --tune"):
        compare_methods.main(arguments)
    written = compare_methods.main([*arguments, "--tune"])
    assert written == json.loads(rho_file.read_text())
    search = written["searches"]["sam"]
    assert search["seeds"] == list(TUNING_SEEDS) and search["noise"] == "0.4"
    means = {float(rho): np.mean(scores) for rho, scores in search["accuracy"].items()}
    assert written["best"]["sam"] == max(means, key=means.get)
    book = RecipeBook.read(arguments[arguments.index("--recipes_file") + 1])
    assert book.choose(["sam"], written["best"])[1].rho == written["best"]["sam"]
    with pytest.raises(InputError, match="has other settings or versions"):
        other = ["--learning_rate", "0.1", "--output_dir", str(tmp_path / "other")]
        compare_methods.main([*arguments, "--tune", *other])


@pytest.mark.slow
def test_runs_in_several_processes_are_those_of_one(finished, tmp_path):
    arguments = [*finished[1], "--recipes", "sam", "--num_workers", "2", "--timing_rounds", "0"]
    content = compare_methods.main([*arguments, "--output_dir", str(tmp_path)])
    expected = {(r["recipe"], r["length"], r["seed"]): r["accuracy"] for r in finished[2]["runs"]}
    for run in content["runs"]:
        assert run["accuracy"] == expected[run["recipe"], run["length"], run["seed"]]


# -------------------------------------------------------------------------------------- statistics


def test_intervals_are_those_of_scipy():
    random = np.random.default_rng(0)
    a, b = random.normal(1, 1, 5), random.normal(0, 1, 5)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    gain = paired_gain(a, b)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    expected = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (mean_interval(a).low, mean_interval(a).high) == pytest.approx(tuple(expected))
    assert not mean_interval([1.0]).is_bounded


def test_at_the_ends_of_the_share_the_paired_test_is_just_at_5_percent():
    random = np.random.default_rng(1)
    reference = random.normal(10, 1, 5)
    gains = 0.6 * reference + random.normal(0, 0.5, 5)
    found = share(gains, reference)
    assert found.value == pytest.approx(gains.mean() / reference.mean())
    assert found.low < found.value < found.high
    for ratio in (found.low, found.high):
        assert stats.ttest_1samp(gains - ratio * reference, 0).pvalue == pytest.approx(0.05)


def test_there_is_no_share_of_a_gain_that_does_not_differ_from_0():
    assert not share([1.0, 2.0, 3.0], [1.0, -1.1, 0.2]).is_bounded
    for gains in ([1.0, -1.1, 0.2], [-1.0, -1.1, -0.9]):  # not significant; a loss
        assert not share(gains, gains).is_bounded
    same = share([1.0, 1.1, 0.9], [1.0, 1.1, 0.9])
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_lengths_are_rounded_to_a_twentieth():
    assert plain_length([1.0, 1.04]) == 1.0
    assert plain_length([1.62]) == 1.6


# ------------------------------------------------------------------------------------------ report


@pytest.mark.slow
def test_tables_and_pictures_are_made_again_from_the_file(
    finished, tmp_path, no_training, capsys, monkeypatch
):
    folder, _, _, printed = finished
    arguments = ["--from_json", str(folder / "results.json"), "--output_dir", str(tmp_path)]
    compare_methods.main(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines == [line for line in printed.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].strip("| ") for line in lines]
    assert names[2 : names.index("measure")] == list(RECIPES)
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    for picture in ("gain_and_cost.png", "gains.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
        (tmp_path / picture).unlink()
    monkeypatch.setattr(comparison_report, "STYLES", comparison_report.STYLES[:2])
    compare_methods.main(arguments)
    assert not (tmp_path / "gains.png").exists()  # more recipes than colours
    compare_methods.main([*arguments, "--recipes", "every 2nd"])
    assert (tmp_path / "gains.png").exists()


@pytest.mark.slow
def test_the_table_holds_the_numbers_of_the_runs(finished):
    scores = {
        (run["recipe"], run["length"], run["seed"]): run["accuracy"] for run in finished[2]["runs"]
    }
    gain = np.mean([scores["sam", 1.0, s] - scores["plain", 1.0, s] for s in (0, 1)])
    equal = np.mean([scores["sam", 1.0, s] - scores["plain", 2.0, s] for s in (0, 1)])
    (line,) = cells(next(line for line in finished[3].splitlines() if line.startswith("| sam ")))
    assert line[2].startswith(f"{np.mean([scores['sam', 1.0, s] for s in (0, 1)]):.3f}")
    assert line[3].startswith(f"{100 * gain:+.1f} ")
    assert line[5].startswith(f"{100 * equal:+.1f} ")
    assert line[6] == "2.00"


def test_each_level_has_its_gain_over_plain_training_of_either_length():
    """Two levels whose gains over as many passes cancel each other out."""
    content = results(
        {
            ("plain", "0.2", 1.0): [0.5, 0.6, 0.7],
            ("sam", "0.2", 1.0): [0.7, 0.8, 0.8],
            ("plain", "0.2", 2.0): [0.4, 0.6, 0.5],
            ("plain", "0.4", 1.0): [0.4, 0.4, 0.4],
            ("sam", "0.4", 1.0): [0.4, 0.5, 0.66],
            ("plain", "0.4", 2.0): [0.7, 0.7, 0.9],
        }
    )
    head, _, *lines = cells(gain_table(Comparison(content, "sam")))
    of_level = dict(zip(head, lines[0], strict=True))
    assert of_level["level"] == "20 % wrong labels" and of_level["recipe"] == "sam"
    assert of_level["accuracy"].startswith("0.767 ± ") and of_level["plain"].startswith("0.600 ± ")
    assert of_level["plain, equal passes"].startswith("0.500 ± ")
    for column, differences in (
        ("gain", [20.0, 20.0, 10.0]),
        ("gain, equal passes", [30.0, 20.0, 30.0]),
    ):
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        expected = f"{np.mean(differences):+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
        assert of_level[column] == expected
    assert [line[-1][:5] for line in lines[1:]] == ["-24.7", "+1.0 "] and lines[2][0] == "mean"


def test_seeds_and_recipes_that_are_not_finished_or_not_asked_for_are_left_out():
    content = two_levels()
    comparison = Comparison(content, "sam", None, [0, 2], ["0", "0.2 at 0.1"])
    assert comparison.seeds == [0, 2] and not comparison.notes
    lost = next(r for r in content["runs"] if (r["recipe"], r["seed"]) == ("sam", 2))
    part = {**content, "runs": [run for run in content["runs"] if run is not lost]}
    comparison = Comparison(part, "sam")
    assert comparison.seeds == [0, 1] and comparison.names == ["plain", "sam"]
    assert comparison.notes == ["left out: seed 2, 1 runs of plain and sam are missing"]
    comparison = Comparison(part, "sam", None, [0, 1, 2], ["0.2 at 0.1"])
    assert comparison.seeds == [0, 1, 2] and not comparison.notes
    with pytest.raises(InputError, match="not finished at all levels of any seed"):
        Comparison(part, "sam", None, [2], ["0"])
    content["recipes"]["asam"] = content["recipes"]["sam"]
    comparison = Comparison(content, "sam")
    assert comparison.names == ["plain", "sam"]
    assert comparison.notes == ["left out: asam, 6 of its runs are missing"]


def test_levels_are_shown_in_order_and_many_are_counted_in_the_title():
    levels = ["0", "0.2", "0.8", "aggre_label", "worse_label", "0 at 0.1", "0.2 at 0.1"]
    scores = {(name, at, 1.0): [0.5, 0.6] for at in levels[::-1] for name in ("sam", "plain")}
    comparison = Comparison(results(scores), "sam")
    assert comparison.levels == levels
    assert comparison.levels_in_words[4:6] == ["worse label", "10 % of the data, 0 % wrong labels"]
    assert comparison.title() == "trec6, 100 training texts, 2 seeds: mean over 7 kinds of labels"


def with_ece(**fields) -> dict:
    """Errors of 0.15 with SAM and 0.25 to 0.27 with plain training, by seed."""
    content = two_levels(**fields)
    shift = {("plain", 1.0): 0.0, ("sam", 1.0): -0.1, ("plain", 2.0): 0.05}
    for run in content["runs"]:
        seed, at = run["seed"], shift[run["recipe"], run["length"]]
        run["ece"] = 0.2 + 0.1 * (run["level"] == "0") + 0.01 * seed + at * (1 + 0.1 * seed)
    return content


def line(content: dict, measure: str, recipe: str) -> list[str]:
    table = cells(measures_table(Comparison(content, "sam")))
    return next((row[2:] for row in table if row[:2] == [measure, recipe]), [])


def test_measures_are_means_over_levels_with_differences_paired_by_seed():
    content = with_ece(sharpness={"worst_sharpness": 0.25}, nll=None)
    mean, difference, equal = line(content, "calibration error (ECE)", "sam")
    assert mean == "0.150 ± 0.000"
    expected = stats.ttest_1samp([-0.1, -0.11, -0.12], 0).confidence_interval(0.95)
    assert difference == f"-0.110 [{expected.low:+.3f}, {expected.high:+.3f}]"
    assert equal.startswith("-0.165 [")
    assert line(content, "calibration error (ECE)", "plain")[1:] == ["-", "-"]
    assert line(content, "worst-case sharpness", "sam")[0] == "0.250 ± 0.000"
    assert line(content, "negative log-likelihood", "sam") == ["-", "-", "-"]  # None in all runs
    assert not line(content, "trace of the Hessian", "sam")
    for run in content["runs"]:
        if run["recipe"] == "plain":
            del run["ece"]
    shown = line(content, "calibration error (ECE)", "sam")
    assert shown[0].startswith("0.150") and shown[1:] == ["-", "-"]


def test_each_model_is_a_point_of_its_score_against_its_sharpness(tmp_path, monkeypatch):
    content = two_levels()
    for i, run in enumerate(content["runs"]):
        run["sharpness"] = {"worst_sharpness": 0.01 * (i + 1), "hessian_eigenvalue": 5.0 - i}
        run["accuracy"] = 0.5 + 0.01 * i
    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    (tmp_path / "results.json").write_text(json.dumps(content))
    arguments = ["--from_json", str(tmp_path / "results.json"), "--output_dir", str(tmp_path)]
    compare_methods.main([*arguments, "--task", "trec6"])
    assert (tmp_path / "sharpness.png").stat().st_size > 10_000
    grid = shown[-1].axes
    expected = ["0 % wrong labels", "10 % of the data, 20 % wrong labels"]
    assert [axes.get_title() for axes in grid[:2]] == expected
    seen = {
        (round(float(x), 6), round(float(y), 6))
        for axes in grid[:2]
        for drawn in axes.get_lines()
        for x, y in zip(*drawn.get_data(), strict=True)
    }
    assert seen == {(round(0.01 * (i + 1), 6), round(0.5 + 0.01 * i, 6)) for i in range(18)}
    eigenvalues = [drawn.get_xdata()[0] for axes in grid[2:] for drawn in axes.get_lines()]
    assert sorted(eigenvalues) == [1.0, 2.0, 3.0, 4.0, 5.0]  # the others have no logarithm
    notes = [axes.get_xlabel() for axes in grid[2:]]
    assert sum(int(note.split()[-2]) for note in notes) == 13
    labels = [text.get_text() for text in shown[-1].legends[0].get_texts()]
    assert labels == ["plain", "plain, at equal passes", "sam"]
    monkeypatch.undo()
    plt.close("all")


def test_a_report_without_sharpness_has_no_picture_of_it(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(with_ece(sharpness={})))
    arguments = ["--from_json", str(tmp_path / "results.json"), "--output_dir", str(tmp_path)]
    compare_methods.main([*arguments, "--task", "trec6"])
    assert "saved in" in capsys.readouterr().out
    assert (tmp_path / "gains.png").exists() and not (tmp_path / "sharpness.png").exists()
    assert "calibration error" in (tmp_path / "table.md").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output_dir .* cannot be used: "):
        compare_methods.main([*arguments, "--output_dir", str(tmp_path / "file" / "out")])

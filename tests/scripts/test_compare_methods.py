"""The comparison of recipes: what it counts, keeps, computes and shows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("sam_hf")

import compare_methods
from common.script_utils import InputError
from compare import costs as comparison_costs
from compare import report as comparison_report
from compare import runs as comparison_runs
from compare.data import TUNING_SEEDS
from compare.recipes import Recipe, RecipeBook
from compare.report import gain_table, make_rows
from compare.results import ResultsFile, RunSpec, finished_runs
from compare.runs import build_trainer, plain_length, train_once
from compare.statistics import mean_interval, paired_gain, share
from comparison import RECIPES, TINY, tiny_task, write_recipes

PASSES = {"plain": 1.0, "sam": 2.0, "every 2nd": 1.5, "last half": 1.5, "quarter": 1.25}


@pytest.fixture(scope="module", autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole comparison: its folder, the arguments, the results and what was printed."""
    folder = tmp_path_factory.mktemp("comparison")
    arguments = [*TINY, *write_recipes(folder, RECIPES), "--output_dir", str(folder / "out")]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_costs, "MEMORY_UPDATES", 4)
        patch.setattr("builtins.print", lambda *text, **_: printed.extend(map(str, text)))
        content = compare_methods.main(arguments)
    return folder / "out", arguments, content, "\n".join(printed)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(comparison_runs, "train_once", refuse)
    monkeypatch.setattr(compare_methods, "measure_costs", refuse)


# ------------------------------------------------------------------------- what is counted and kept


@pytest.mark.slow
def test_the_passes_of_every_recipe_are_counted_at_the_model(finished):
    for run in finished[2]["runs"]:
        if run["length"] == 1:
            assert run["passes"] == pytest.approx(PASSES[run["recipe"]])
            assert run["examples_drawn"] == 4 * 32
    for name, cost in finished[2]["costs"]["recipes"].items():
        if name in ("plain", "sam"):
            assert cost["passes"] == PASSES[name]
        assert all(seconds > 0 for seconds in cost["seconds"])


@pytest.mark.slow
def test_each_distinct_cost_has_one_plain_run_that_is_as_long(finished):
    longer = [run for run in finished[2]["runs"] if run["length"] != 1]
    assert {run["recipe"] for run in longer} == {"plain"}
    found = sorted((run["length"], run["seed"]) for run in longer)
    assert found == [(length, seed) for length in (1.25, 1.5, 2.0) for seed in (0, 1)]
    for run in longer:
        assert run["examples_computed"] == run["length"] * 4 * 32


def test_lengths_are_rounded_to_a_twentieth():
    assert plain_length([1.0, 1.04]) == 1.0
    assert plain_length([1.13, 1.12]) == 1.1 or plain_length([1.13, 1.12]) == 1.15
    assert plain_length([1.62]) == 1.6


@pytest.mark.slow
def test_a_restarted_command_trains_nothing_again(finished, no_training):
    _, arguments, content, _ = finished
    assert compare_methods.main(arguments)["runs"] == content["runs"]


@pytest.mark.slow
def test_a_run_that_is_missing_is_made_alone(finished, tmp_path, monkeypatch):
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
def test_a_file_of_other_settings_is_refused(finished, no_training):
    with pytest.raises(InputError, match=r"training.learning_rate=0.002, and now it is 0.01"):
        compare_methods.main([*finished[1], "--learning_rate", "0.01"])
    with pytest.raises(InputError, match=r"bf16=None, and now it is True"):
        compare_methods.main([*finished[1], "--bf16", "true"])


def test_labels_that_people_gave_join_a_file_without_them_and_may_rest(tmp_path):
    path = tmp_path / "results.json"
    ResultsFile(path, {"task": "t"}).write()
    ResultsFile(path, {"task": "t", "labels_file": "one"}).write()
    rested = ResultsFile(path, {"task": "t"})
    assert rested.content["settings"] == {"task": "t", "labels_file": "one"}
    with pytest.raises(InputError, match=r"labels_file='one', and now it is 'another'"):
        ResultsFile(path, {"task": "t", "labels_file": "another"})
    path.write_text('{"settings": [], "recipes": {}, "runs": []}')
    with pytest.raises(InputError, match="is no file of results"):
        ResultsFile(path, {"task": "t"})


@pytest.mark.slow
def test_a_file_with_another_recipe_of_that_name_is_refused(finished, tmp_path, no_training):
    changed = {**RECIPES, "sam": {"description": "d", "options": {"sam_rho": 0.7}}}
    arguments = [*finished[1], *write_recipes(tmp_path, changed)]
    with pytest.raises(InputError, match=r"recipe 'sam': options.sam_rho=0.1, and now it is 0.7"):
        compare_methods.main(arguments)


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
    assert (train.data.labels != task.data.train.labels).sum() == round(0.4 * 128)
    assert scored.data is task.data.test


def test_rho_is_tuned_on_training_images_that_are_not_trained_on(tmp_path):
    task, _ = tiny_task()
    train, scored = task.sets("0.4", 100, is_tuning=True)
    numbers = {image.tobytes(): i for i, image in enumerate(task.data.train.images)}
    trained, judged = ({numbers[im.tobytes()] for im in s.data.images} for s in (train, scored))
    assert not trained & judged
    assert len(trained) + len(judged) == 128
    right = [task.data.train.labels[numbers[image.tobytes()]] for image in scored.data.images]
    assert right == scored.data.labels.tolist()

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
    assert search["seeds"] == list(TUNING_SEEDS)
    means = {float(rho): np.mean(scores) for rho, scores in search["accuracy"].items()}
    assert written["best"]["sam"] == max(means, key=means.get)
    book = RecipeBook.read(arguments[arguments.index("--recipes_file") + 1])
    assert book.choose(["sam"], written["best"])[1].rho == written["best"]["sam"]


# ----------------------------------------------------------------------------------- the statistics


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
    for gains in ([1.0, -1.1, 0.2], [-1.0, -1.1, -0.9]):  # not told from 0; a loss
        assert not share(gains, gains).is_bounded
    same = share([1.0, 1.1, 0.9], [1.0, 1.1, 0.9])
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(
    finished, tmp_path, no_training
):
    (tmp_path / "file").write_text("")
    folder = ["--output_dir", str(tmp_path / "file" / "out")]
    results = ["--from_json", str(finished[0] / "results.json")]
    for arguments in (finished[1], results):
        with pytest.raises(InputError, match=r"--output_dir .* cannot be used: "):
            compare_methods.main([*arguments, *folder])


# --------------------------------------------------------------------------------------- the report


@pytest.mark.slow
def test_table_and_picture_are_made_again_from_the_file(finished, tmp_path, no_training, capsys):
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


def test_each_level_has_its_gain_over_plain_training_of_either_length():
    """Two levels whose gains over as many passes cancel each other out."""
    scores = {
        ("plain", "0.2", 1.0): [0.5, 0.6, 0.7],
        ("sam", "0.2", 1.0): [0.7, 0.8, 0.8],
        ("plain", "0.2", 2.0): [0.4, 0.6, 0.5],
        ("plain", "0.4", 1.0): [0.4, 0.4, 0.4],
        ("sam", "0.4", 1.0): [0.4, 0.5, 0.66],
        ("plain", "0.4", 2.0): [0.7, 0.7, 0.9],
    }
    passes = {"plain": 1.0, "sam": 2.0}
    runs = [
        {"recipe": recipe, "level": level, "length": length, "seed": seed, "accuracy": score}
        | {"passes": passes[recipe] * length}
        for (recipe, level, length), values in scores.items()
        for seed, score in enumerate(values)
    ]
    recipe = {"description": "d", "group": "methods", "options": {}}
    content = {"settings": {}, "recipes": {"plain": recipe, "sam": recipe}, "runs": runs}
    rows, _ = make_rows(content, None, "sam")
    table = [[x.strip() for x in y.split("|")[1:-1]] for y in gain_table(rows).splitlines()]
    of_level = dict(zip(table[0], table[2], strict=True))
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
    assert [row[-1][:5] for row in table[3:]] == ["-24.7", "+1.0 "] and table[4][0] == "mean"


def test_seeds_that_are_not_finished_or_not_asked_for_are_left_out():
    recipe = {"description": "d", "group": "methods", "options": {}}
    runs = [
        {"recipe": name, "level": level, "length": length, "seed": seed, "accuracy": 0.5}
        | {"passes": 2.0 if name == "sam" else length}
        for name, length in (("plain", 1.0), ("sam", 1.0), ("plain", 2.0))
        for level in ("0", "0.4")
        for seed in (0, 1, 5)
    ]
    content = {"settings": {}, "recipes": {"plain": recipe, "sam": recipe}, "runs": runs}
    kept, notes = finished_runs(content, "sam", [0, 5])
    assert {run["seed"] for run in kept["runs"]} == {0, 5} and not notes
    lost = next(r for r in runs if (r["recipe"], r["level"], r["seed"]) == ("sam", "0", 5))
    part = {**content, "runs": [run for run in runs if run is not lost]}
    kept, notes = finished_runs(part, "sam")
    assert {run["seed"] for run in kept["runs"]} == {0, 1}
    assert notes == ["left out: seed 5, 1 runs of plain and sam are missing"]
    rows, _ = make_rows(kept, None, "sam")
    assert len(rows) == 2
    kept, notes = finished_runs(part, "sam", None, ["0.4"])
    assert len(kept["runs"]) == 9 and not notes
    with pytest.raises(InputError, match="not been run at every level with any seed yet"):
        finished_runs(part, "sam", [5])
    with pytest.raises(InputError, match="damaged: run 12 has no recipe, level and seed"):
        finished_runs({**content, "runs": [*runs[:12], 5]}, "sam")


@pytest.mark.slow
def test_a_picture_of_the_gains_is_drawn_of_few_recipes_alone(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_report, "STYLES", comparison_report.STYLES[:2])
    results = ["--from_json", str(finished[0] / "results.json"), "--output_dir", str(tmp_path)]
    compare_methods.main(results)
    assert not (tmp_path / "gains.png").exists()
    compare_methods.main([*results, "--recipes", "every 2nd"])
    assert (tmp_path / "gains.png").exists()


@pytest.mark.slow
def test_the_table_holds_the_numbers_of_the_runs(finished):
    scores = {
        (run["recipe"], run["length"], run["seed"]): run["accuracy"] for run in finished[2]["runs"]
    }
    gain = np.mean([scores["sam", 1.0, s] - scores["plain", 1.0, s] for s in (0, 1)])
    equal = np.mean([scores["sam", 1.0, s] - scores["plain", 2.0, s] for s in (0, 1)])
    line = next(line for line in finished[3].splitlines() if line.startswith("| sam "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2].startswith(f"{np.mean([scores['sam', 1.0, s] for s in (0, 1)]):.3f}")
    assert cells[3].startswith(f"{100 * gain:+.1f} ")
    assert cells[5].startswith(f"{100 * equal:+.1f} ")
    assert cells[6] == "2.00"


def test_options_of_training_are_refused_with_from_json():
    with pytest.raises(InputError, match="--learning_rate has no effect with --from_json"):
        compare_methods.main(["--from_json", "x.json", "--learning_rate", "1"])


@pytest.mark.slow
def test_a_recipe_with_missing_runs_is_left_out_with_a_line(finished, tmp_path, capsys):
    content = finished[2]
    runs = [r for r in content["runs"] if (r["recipe"], r["seed"]) != ("quarter", 1)]
    (tmp_path / "part.json").write_text(json.dumps({**content, "runs": runs}))
    arguments = ["--from_json", str(tmp_path / "part.json"), "--output_dir", str(tmp_path)]
    compare_methods.main(arguments)
    out = capsys.readouterr().out
    assert "left out: quarter, 1 of its runs are missing" in out
    assert "| quarter" not in out

"""Compare ways to perturb, each a recipe of a YAML file: one table of what they gain and cost.

    python scripts/compare_methods.py                    # scikit-learn's digits, on one CPU core
    python scripts/compare_methods.py --recipes sam asam looksam --label_noise 0.4
    python scripts/compare_methods.py --tune             # search each rho anew
    python scripts/compare_methods.py --from_json outputs/compare_methods/digits/results.json
    python scripts/compare_methods.py --task cifar10 --train_file train.parquet \\
        --validation_file test.parquet --labels_file labels.parquet --label_column worse_label

    python scripts/compare_methods.py --task trec6 --train_file train.parquet \\
        --validation_file test.parquet --model_name_or_path path/to/encoder --train_fraction 1 0.1

All recipes have the same data, wrong labels, initial weights, order and schedule: a seed fixes
them. Scored is the final model, on test examples with right labels. A command that was stopped goes
on where it was. The table:

    accuracy          mean over the seeds, with its 95 % interval (Student's t); for CoLA the
                      Matthews correlation
    gain              over plain training, in points: mean of the differences seed by seed, averaged
                      over the noise levels, with the interval of the paired t-test
    share             of the gain of --reference, with Fieller's interval over the same pairs. "-":
                      the reference has no gain whose interval is above zero
    gain, equal       the same over plain training that is longer: as many passes as the recipe,
                      to the nearest twentieth
    passes            examples that go forward and backward, counted at the model, in units of plain
                      training. Those of a backward pass that skips some weights' gradients count in
                      full; `time` tells what that saves
    time              of an update, in units of a plain one: median of the rounds in which every
                      recipe trains one whole short schedule
    memory            peak beyond that of plain training, in units of the bytes of the model

A second table has what else is recorded of each final model, averaged over the noise levels, beside
that of plain training: calibration, the accuracy on corrupted images (scripts/corruptions.py), and
with --sharpness how sharp the training loss is around the weights (sam_hf.diagnostics); then
sharpness.png shows each model's score beside it.

--tune scores each rho of a grid on a part of the training examples with right labels, with other
seeds and at one noise level, and writes --rho_file. The test examples have no say in it.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from common.script_utils import InputError, OptionParser, require_writable, run_script
from compare.arguments import Options
from compare.costs import measure_costs
from compare.data import TUNING_SEEDS, Task
from compare.recipes import PLAIN, Recipe, RecipeBook
from compare.report import report
from compare.results import ResultsFile, RunSpec, read_results
from compare.runs import plain_length, run_all
from compare.tasks import build_task
from compare.tuning import conclude, read_rho_file, read_searches, warn_of_other_settings


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Tune, or train what is missing, measure the costs, and report."""
    parser = OptionParser((Options,), __doc__)
    (options,) = parser.parse(argv)
    folder = Path(options.output_dir)
    if options.from_json is not None:
        _refuse_options_of_training(options)
        require_writable(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        content = read_results(Path(options.from_json))
        report(content, options.recipes, options.reference, folder)
        return content
    require_writable(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.torch_num_threads)
    book = RecipeBook.read(options.recipes_file)
    if options.tune:
        return tune(book, options, folder)

    rho_file = Path(options.rho_file)
    found = read_rho_file(rho_file)
    recipes = book.choose(options.recipes, found.get("best", {}))
    if options.reference not in [recipe.name for recipe in recipes]:
        names = ", ".join(recipe.name for recipe in recipes)
        raise InputError(f"--reference {options.reference!r} is none of the recipes: {names}")
    task = build_task(options)
    file = ResultsFile(folder / "results.json", task.settings)
    file.add_recipes(recipes)
    if any(recipe.rho != book.recipes[recipe.name].rho for recipe in recipes):
        warn_of_other_settings(rho_file, found, task.settings)
        file.content["rho_search"] = found
    compare(recipes, task, options, file)
    asked = options.seeds, list(task.levels)
    report(file.content, options.recipes, options.reference, folder, *asked)
    return file.content


def compare(recipes: list[Recipe], task: Task, options: Options, file: ResultsFile) -> None:
    """Train all recipes, then plain training as long as they cost, then measure the costs."""
    points = [(level, seed) for seed in options.seeds for level in task.levels]
    wanted = [(r, RunSpec(r.name, level, seed)) for level, seed in points for r in recipes]
    run_all(wanted, task, options, file, "equal updates")

    plain = recipes[0]
    longer: dict[RunSpec, Recipe] = {}
    for level, seed in points:
        for recipe in recipes:
            records = [file.find(RunSpec(recipe.name, level, s)) for s in options.seeds]
            length = plain_length(record["passes"] for record in records)
            if length != 1:
                longer[RunSpec(PLAIN, level, seed, length)] = plain
    run_all([(r, spec) for spec, r in longer.items()], task, options, file, "plain, equal passes")

    if options.timing_rounds == 0:
        return
    names = [recipe.name for recipe in recipes]
    how = {"rounds": options.timing_rounds, "updates": options.timing_updates}
    how["threads"] = options.torch_num_threads
    costs = file.content.get("costs", {"recipes": {}})
    # All are measured together, or their rounds would not be the same.
    if {key: costs.get(key) for key in how} != how or not set(names) <= costs["recipes"].keys():
        level = "0.4" if "0.4" in task.levels else next(iter(task.levels))
        measured = measure_costs(recipes, task, level, options)
        file.content["costs"] = {**how, "level": level, "recipes": measured}
        file.write()


def tune(book: RecipeBook, options: Options, folder: Path) -> dict[str, Any]:
    """Score every rho of the grids; print and write what is best."""
    trials = book.to_tune(options.recipes)
    task = build_task(options)
    level = next(iter(task.levels))
    file = ResultsFile(folder / "tuning.json", task.settings)
    file.add_recipes([book.recipes[name] for name in {trial.name: 0 for trial in trials}])
    read_searches(Path(options.rho_file), file)  # refuses it now, and not when all is computed
    wanted = [
        (trial, RunSpec(trial.name, level, seed, tuned_rho=trial.rho))
        for seed in TUNING_SEEDS
        for trial in trials
    ]
    run_all(wanted, task, options, file, "search for rho")
    return conclude(wanted, file, Path(options.rho_file))


def _refuse_options_of_training(options: Options) -> None:
    usual = Options(task=options.task, from_json=options.from_json)
    used = ("from_json", "recipes", "reference", "output_dir", "task")
    for f in fields(Options):
        if f.name not in used and getattr(options, f.name) != getattr(usual, f.name):
            raise InputError(f"--{f.name} has no effect with --from_json")


if __name__ == "__main__":
    run_script(main)

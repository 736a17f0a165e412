"""Compare SAM recipes of a YAML file with plain training: what they gain and what they cost.

    python scripts/compare_methods.py                    # scikit-learn's digits, on one CPU core
    python scripts/compare_methods.py --recipes sam asam looksam --label_noise 0.4
    python scripts/compare_methods.py --tune             # search for each rho
    python scripts/compare_methods.py --from_json outputs/compare_methods/digits/results.json
    python scripts/compare_methods.py --task cifar10 --train_file train.parquet \\
        --validation_file test.parquet --labels_file labels.parquet --label_column worse_label
    python scripts/compare_methods.py --task trec6 --train_file train.parquet \\
        --validation_file test.parquet --model_name_or_path path/to/encoder --train_fraction 1 0.1
    python scripts/compare_methods.py --task forecasting --data_file series.csv --recipes auto \\
        --prediction_lengths 96 336

A seed fixes the data, wrong labels, initial weights, order and schedule, which are the same for all
recipes. The final model is scored on test examples with right labels. Levels are shares of wrong
labels, or the horizons of a series. An interrupted command continues when it is repeated. The
table:

    accuracy          mean over the seeds, with its 95 % interval (Student's t); for CoLA the
                      Matthews correlation, for a series the MSE of the last epoch
    gain              over plain training, in points, or in percent of its MSE: mean of the
                      differences seed by seed, averaged over the levels, with the interval of the
                      paired t-test
    share             of the gain of --reference, with Fieller's interval over the same pairs; "-"
                      if the interval of the reference's gain includes zero
    gain, equal       gain over longer plain training, with the recipe's number of passes to the
                      nearest twentieth
    passes            examples that pass forward and backward, counted at the model, in units of
                      plain training. A backward pass that skips some weights' gradients counts in
                      full; its savings show in `time`
    time              of an update, in units of a plain one: median over rounds in which every
                      recipe trains a complete short schedule
    memory            peak beyond that of plain training, in units of the bytes of the model

A second table has further measures of the final models, means over the levels, next to those of
plain training: calibration, scores on corrupted images (scripts/compare/corruptions.py) or in the
season after the test part, what rounding the weights and noise in them cost, and with --sharpness
the sharpness of the training loss (sam_hf.diagnostics), which sharpness.png shows for each model.

--tune scores each rho of a grid on a part of the training examples with right labels, with other
seeds and at one noise level, and writes --rho_file. The test examples are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.cli import InputError, OptionParser, run_script
from compare.arguments import Options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Tune, or train what is missing, measure the costs, and report."""
    (options,) = OptionParser((Options,), __doc__).parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    import torch
    from common.resuming import require_writable
    from compare.comparison import default_reference
    from compare.recipes import RecipeBook
    from compare.report import report
    from compare.results import ResultsFile, read_results, read_rho_file, warn_of_other_settings

    require_writable(options.output_dir)
    folder = Path(options.output_dir)
    if options.from_json is not None:
        content = read_results(Path(options.from_json))
        reference = options.reference or default_reference(options.recipes or content["recipes"])
        report(folder, content, reference, options.recipes)
        return content

    from compare.runs import compare, tune
    from compare.tasks import build_task

    torch.set_num_threads(options.torch_num_threads)
    book = RecipeBook.read(options.recipes_file)
    if options.tune:
        return tune(book, options, folder)
    rho_file = Path(options.rho_file)
    found = {} if options.rhos else read_rho_file(rho_file)
    book.require(options.rhos, "--rho")
    recipes = book.choose(options.recipes, options.rhos or found.get("best", {}))
    names = [recipe.name for recipe in recipes]
    reference = options.reference or default_reference(names)
    if reference not in names:
        known = ", ".join(names)
        raise InputError(f"--reference {reference!r} is none of the recipes: {known}")
    task = build_task(options)
    file = ResultsFile(folder / "results.json", task.settings)
    file.add_recipes(recipes)
    if found and any(recipe.rho != book.recipes[recipe.name].rho for recipe in recipes):
        warn_of_other_settings(rho_file, found, task.settings)
        file.content["rho_search"] = found
    compare(recipes, task, options, file)
    asked = (reference, options.recipes, options.seeds, list(task.levels))
    report(folder, file.content, *asked)
    return file.content


if __name__ == "__main__":
    run_script(main)

"""Compare the automatic radius with fixed ones and with plain training, on many tasks.

    python scripts/compare_radius.py                     # scikit-learn's digits
    python scripts/compare_radius.py configs/evidence_radius.yaml --data_dir path/to/data \\
        --model_name_or_path path/to/encoder
    python scripts/compare_radius.py --tasks etth1_96 cola --data_dir path/to/data ...
    python scripts/compare_radius.py --from_json outputs/evidence/radius/results.json

The YAML file names the tasks. On each, with the same number of updates:

    plain         training without SAM
    rho 0.05      SAM with the usual radius
    best fixed    with the best radius of a grid, on a part of the training data that is held out
                  (of a series: the validation part), with other seeds. The test data are not used
    auto          with sam_rho="auto", without a search

ASAM and sam_params="norms" where the YAML file has a grid for them; rho 0.05 is SAM's in any case.
A seed fixes all but the way to train. An interrupted command continues when it is repeated; each
run is kept in tasks/NAME.json, and results.json joins the tasks of the last command. The table has
means over the seeds, with their 95 % intervals (Student's t), and:

    median rho     of the updates with the automatic radius; the median over the seeds
    auto - best    paired by seed, positive where auto is better: in points, or of a series in
                   percent of plain training's MSE, of which less is better
    verdict        above or below; "within" if that interval includes 0, or if auto's mean is in the
                   interval of the best fixed radius
    ruined         runs that are no better than the most frequent class of the test data (Matthews
                   correlation: 0) or have an MSE 20 % above plain training's with the same seed
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from common.arguments import check_range, option
from common.cli import InputError, OptionParser, closest, read_yaml, run_script
from compare.arguments import CONFIGS, TEXT_TASKS
from compare.arguments import Options as TaskOptions

METHODS = {"sam": {}, "asam": {"sam_method": "asam"}, "norms": {"sam_params": "norms"}}
# Options of compare_methods.py that the command gives every task, and others that a task has not.
OF_ALL_TASKS = "num_workers torch_num_threads use_cpu"
NOT_OF_A_TASK = f"{OF_ALL_TASKS} seeds recipes recipes_file rho_file reference tune output_dir "
NOT_OF_A_TASK += "from_json timing_rounds timing_updates"


@dataclass
class Options:
    """Which tasks are trained, on what data, and where the results are written."""

    _argument_group_name = "comparison"

    tasks_file: str = option(
        "YAML file with the tasks; may stand first, without the option's name.",
        default=str(CONFIGS / "evidence_radius.yaml"),
    )
    tasks: list[str] | None = option(
        "Names in that file. Default: all, or without --data_dir those that need no files."
    )
    data_dir: str | None = option("Folder with the files that the tasks name.")
    model_name_or_path: str | None = option("Texts: pretrained encoder on the Hub or in a folder.")
    seeds: list[int] | None = option("Two seeds or more. 0 1 2 if not given.")
    output_dir: str = option("Folder for results, table and picture.", "outputs/evidence/radius")
    from_json: str | None = option("Make table and picture of this results.json, do not train.")
    num_workers: int = option("Runs at a time.", default=2)
    torch_num_threads: int = option("CPU threads of each run.", default=1)
    use_cpu: bool = option("Do not use the GPU.", default=not torch.cuda.is_available())

    def __post_init__(self) -> None:
        self.seeds = self.seeds or [0, 1, 2]
        check_range(self, 1, float("inf"), "num_workers", "torch_num_threads")
        if len(set(self.seeds)) < max(2, len(self.seeds)) or min(self.seeds) < 0:
            raise ValueError(f"--seeds must be two or more numbers from 0 up, got {self.seeds}")


@dataclass
class Entry:
    """A task of the YAML file, which explains the keys."""

    options: dict[str, Any]
    grids: dict[str, list[float]]
    files: dict[str, str] = field(default_factory=dict)
    only_at: dict[str, list[float]] = field(default_factory=dict)
    tuning_seeds: list[int] = field(default_factory=lambda: [100])

    def check(self, where: str, seeds: list[int]) -> None:
        for field_ in fields(self):
            kind = list if field_.name == "tuning_seeds" else dict
            if not isinstance(getattr(self, field_.name), kind):
                raise InputError(f"{where}: {field_.name} must be a {kind.__name__}")
        for name in (*self.grids, *self.only_at):
            if name not in METHODS:
                raise InputError(f"{where}: no method {name!r}{closest(name, METHODS)}")
        lists = [*self.grids.items(), *self.only_at.items(), ("tuning_seeds", self.tuning_seeds)]
        for name, values in lists:
            numbers = values if isinstance(values, list) else []
            if not numbers or not all(isinstance(x, int | float) for x in numbers):
                raise InputError(f"{where}: {name} must list numbers, got {values!r}")
        if unused := [name for name in NOT_OF_A_TASK.split() if name in self.options]:
            raise InputError(f"{where}: {unused[0]} is not an option of a task")
        if common := set(seeds) & set(self.tuning_seeds):
            raise InputError(f"{where}: seed {min(common)} is in --seeds and tuning_seeds")

    def build(self, options: Options, where: str) -> Any:
        """The options of the task, as `compare.runs.task_of` takes them."""
        from compare.forecasting import ForecastingOptions

        is_series = "config" in self.options
        values = self.options | {name: getattr(options, name) for name in OF_ALL_TASKS.split()}
        for name, file in self.files.items():
            if options.data_dir is None:
                raise InputError(f"{where} needs --data_dir, with {file}")
            path = Path(options.data_dir) / file
            if not path.is_file():
                raise InputError(f"{where}: --data_dir has no file {str(path)!r}")
            values[name] = str(path)
        if self.options.get("task") in TEXT_TASKS:
            if options.model_name_or_path is None:
                raise InputError(f"{where} needs --model_name_or_path")
            values["model_name_or_path"] = options.model_name_or_path
        tokens = []
        for name, value in values.items():
            tokens += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        try:
            if is_series:
                return ForecastingOptions(**values)
            return OptionParser((TaskOptions,)).parse(tokens)[0]
        except (TypeError, InputError) as error:
            raise InputError(f"{where}: {error}") from error


def read_tasks(options: Options) -> dict[str, Entry]:
    """The tasks to train, from the YAML file; an InputError if it is not as it should be."""
    file = options.tasks_file
    content = read_yaml(file, "--tasks_file")
    found = content.get("tasks") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{file} must hold `tasks:` alone, with names")
    entries = {}
    for name, values in found.items():
        where = f"{file}: task {name!r}"
        try:
            entries[name] = Entry(**values)
        except TypeError as error:  # an unknown key, one that is missing, or no keys at all
            reason = str(error).removeprefix("Entry.__init__() ")
            raise InputError(f"{where}: {reason}") from error
        entries[name].check(where, options.seeds)
    for name in options.tasks or ():
        if name not in entries:
            raise InputError(f"--tasks: {file} has no task {name!r}{closest(name, entries)}")
    if options.tasks is None and options.data_dir is None:
        return {name: entry for name, entry in entries.items() if not entry.files}
    return {name: entry for name, entry in entries.items() if name in (options.tasks or entries)}


def train_task(entry: Entry, task_options: Any, seeds: list[int], file_name: Path) -> dict:
    """Search for rho, then train all ways; the content of the task's results file."""
    from compare.radius import FIXED, Study, chance, recipe_name
    from compare.recipes import PLAIN, Recipe
    from compare.results import ResultsFile, RunSpec
    from compare.runs import run_all, task_of

    title, task = file_name.stem, task_of(task_options)
    file = ResultsFile(file_name, task.settings)
    levels = {
        method: [
            level
            for level in task.levels
            if method not in entry.only_at
            or level.partition(" at ")[0] in [f"{noise:g}" for noise in entry.only_at[method]]
        ]
        for method in entry.grids
    }
    if unmet := [method for method, found in levels.items() if not found]:
        noises = entry.only_at[unmet[0]]
        raise InputError(f"task {title!r}: only_at: {unmet[0]} has no level of {noises}")
    searched = {"grids": entry.grids, "levels": levels, "tuning_seeds": entry.tuning_seeds}
    scored = {"chance": chance(task), "lower_is_better": task.lower_is_better}
    file.content |= {**searched, **scored, "seeds": seeds}
    recipes = {PLAIN: Recipe(PLAIN, "the Trainer", group=PLAIN, trainer=PLAIN)}

    def run(method: str, rho: Any, level: str, seed: int, tuned: float | None = None) -> Any:
        name = PLAIN if method == PLAIN else recipe_name(method, rho)
        if name not in recipes:
            options = {**METHODS[method], "sam_rho": rho}
            recipes[name] = Recipe(name, f"{method} with rho {rho}", options=options)
            recipes[name].check()
        return recipes[name], RunSpec(name, level, seed, tuned_rho=tuned)

    searches = [
        run(method, rho, level, seed, tuned=rho)
        for seed in entry.tuning_seeds
        for method, grid in entry.grids.items()
        for level in levels[method]
        for rho in map(float, grid)
    ]
    file.add_recipes(list(recipes.values()))
    run_all(searches, task, task_options, file, f"{title}: search for rho")
    study, wanted = Study(file.content), {}
    for seed in seeds:
        for level in task.levels:
            ways = [(PLAIN, None), ("sam", FIXED)]
            for method in entry.grids:
                if level in levels[method]:
                    ways += [(method, study.best_rho(method, level)), (method, "auto")]
            # The best radius may be 0.05, which is then trained once.
            wanted |= {spec: recipe for recipe, spec in (run(*w, level, seed) for w in ways)}
    file.add_recipes(list(recipes.values()))
    pairs = [(recipe, spec) for spec, recipe in wanted.items()]
    run_all(pairs, task, task_options, file, title)
    file.write()
    return file.content


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train what is missing of each task, and report."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if tokens and not tokens[0].startswith("-"):
        tokens.insert(0, "--tasks_file")
    (options,) = OptionParser((Options,), __doc__).parse(tokens)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.resuming import require_writable
    from common.runs import save_json
    from compare.radius import read_study, report

    require_writable(options.output_dir)
    folder, contents = Path(options.output_dir), {}
    if options.from_json is not None:
        contents = read_study(Path(options.from_json), options.tasks)
        report(folder, contents)
        return contents
    torch.set_num_threads(options.torch_num_threads)
    entries = read_tasks(options)
    # All before the first is trained: a file that is missing shows at once.
    built = {name: entry.build(options, f"task {name!r}") for name, entry in entries.items()}
    for name, entry in entries.items():
        file = folder / "tasks" / f"{name}.json"
        contents[name] = train_task(entry, built[name], options.seeds, file)
        save_json(contents, folder / "results.json")
    report(folder, contents)
    return contents


if __name__ == "__main__":
    run_script(main)

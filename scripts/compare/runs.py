"""The runs of a comparison: one, many at a time, all of them, and their costs."""

from __future__ import annotations

import gc
import io
import math
import multiprocessing
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.benchmark_utils import Clock, peak_memory
from common.runs import ComputeMeter
from compare.arguments import TUNING_SEEDS
from compare.comparison import plain_length
from compare.forecasting import ForecastingOptions, ForecastingTask
from compare.measures import CurveMeter, RadiusMeter, finite, measure_model, scores, select
from compare.recipes import PLAIN, Recipe, RecipeBook
from compare.results import ResultsFile, RunSpec, conclude_search, read_rho_file
from compare.tasks import Task, build_task
from compare.third_party_sam import ThirdPartyTrainer
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from sam_hf import SAMConfig, SAMTrainer

MEMORY_UPDATES = 16  # enough for recipes that perturb late or rarely
Wanted = Sequence[tuple[Recipe, RunSpec]]


def task_of(options: Any) -> Task | ForecastingTask:
    """The task of the options, which are `Options` or `ForecastingOptions`."""
    is_series = isinstance(options, ForecastingOptions)
    return ForecastingTask(options) if is_series else build_task(options)


def compare(recipes: list[Recipe], task: Task, options: Any, file: ResultsFile) -> None:
    """Train all recipes, then plain training at equal passes, then measure the costs."""
    points = [(level, seed) for seed in options.seeds for level in task.levels]
    wanted = [(r, RunSpec(r.name, level, seed)) for level, seed in points for r in recipes]
    run_all(wanted, task, options, file, "equal updates")

    longer: dict[RunSpec, Recipe] = {}
    for level, seed in points:
        for recipe in recipes:
            records = [file.find(RunSpec(recipe.name, level, s)) for s in options.seeds]
            length = plain_length([record["passes"] for record in records])
            if length != 1:
                longer[RunSpec(PLAIN, level, seed, length)] = recipes[0]
    # The longest first: where it passes through the others, they are read from its curve.
    lengths = sorted({spec.length for spec in longer}, reverse=True)
    for length in lengths if task.has_prefixes else (None,):
        specs = [spec for spec in longer if length in (None, spec.length)]
        for spec in specs if task.has_prefixes else ():
            if file.find(spec) is None and (record := read_prefix(spec, lengths, file)):
                file.add(record)
        pairs = [(longer[spec], spec) for spec in specs]
        run_all(pairs, task, options, file, "plain, equal passes")

    if options.timing_rounds == 0:
        return
    how = {"rounds": options.timing_rounds, "updates": options.timing_updates}
    how["threads"] = options.torch_num_threads
    costs = file.content.get("costs", {"recipes": {}})
    # All are measured together, in the same rounds.
    is_measured = {recipe.name for recipe in recipes} <= costs["recipes"].keys()
    if not is_measured or any(costs.get(key) != value for key, value in how.items()):
        level = "0.4" if "0.4" in task.levels else next(iter(task.levels))
        measured = measure_costs(recipes, task, level, options)
        file.content["costs"] = {**how, "level": level, "recipes": measured}
        file.write()


def read_prefix(spec: RunSpec, lengths: list[float], file: ResultsFile) -> dict | None:
    """The record of a plain run, of a longer one with a constant learning rate; None if not in it.

    It has the scores of the curve alone: the model is not known any more.
    """
    updates = round(spec.length * file.find(replace(spec, length=1.0))["updates"])
    for length in lengths:
        longer = file.find(replace(spec, length=length)) if length > spec.length else None
        curve = [point for point in (longer or {}).get("curve", ()) if point["updates"] <= updates]
        if curve and curve[-1]["updates"] == updates:
            scores = {name: curve[-1][f"test_{name}"] for name in ("mse", "mae")}
            return {**asdict(spec), **scores, **select(curve), "passes": 1.0, "updates": updates}
    return None


def tune(book: RecipeBook, options: Any, folder: Path) -> dict[str, Any]:
    """Score every rho of the grids; print and write the best ones."""
    trials = book.to_tune(options.recipes)
    task = build_task(options)
    level = next(iter(task.levels))
    file, rho_file = ResultsFile(folder / "tuning.json", task.settings), Path(options.rho_file)
    file.add_recipes([book.recipes[trial.name] for trial in trials])
    read_rho_file(rho_file, file)  # a file that cannot be extended is refused before the search
    specs = [RunSpec(t.name, level, s, tuned_rho=t.rho) for s in TUNING_SEEDS for t in trials]
    wanted = list(zip(trials * len(TUNING_SEEDS), specs, strict=True))
    run_all(wanted, task, options, file, "search for rho")
    return conclude_search([file.find(spec) for spec in specs], file, rho_file)


def build_trainer(
    recipe: Recipe, task: Task, spec: RunSpec, options: Any, folder: str, updates: int | None = None
) -> Trainer:
    """The trainer of a run.

    Args:
        updates: how many; if None, those of the task's schedule times `spec.length`.
    """
    train, scored = task.sets(spec.level, spec.seed, is_tuning=spec.tuned_rho is not None)
    training, loaders = dict(task.training), options.dataloader_num_workers
    epochs, batch = training.pop("num_train_epochs"), training["per_device_train_batch_size"]
    # The gradient of a few remaining examples would be noise.
    drop_last = training.pop("dataloader_drop_last", True)
    if updates is None:
        of_epoch = len(train) // batch if drop_last else math.ceil(len(train) / batch)
        updates = round(spec.length * epochs * of_epoch)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=updates,
        dataloader_drop_last=drop_last,
        per_device_eval_batch_size=task.eval_batch,
        seed=spec.seed,
        **{f"{what}_strategy": "no" for what in ("logging", "eval", "save")},
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.use_cpu,
        bf16=options.bf16,
        dataloader_pin_memory=not options.use_cpu,
        dataloader_num_workers=loaders,
        dataloader_persistent_workers=loaders > 0,
        **training,
    )
    kwargs: dict[str, Any] = {"model": task.model(spec.seed, spec.level), "args": args}
    kwargs |= {"train_dataset": train, "eval_dataset": scored, "compute_metrics": scores}
    kwargs |= {"processing_class": task.processor, **task.trainer_options}
    if recipe.trainer == PLAIN:
        trainer = Trainer(**kwargs)
    elif recipe.trainer == "sam_hf":
        trainer = SAMTrainer(sam_config=SAMConfig(**recipe.options), **kwargs)
    else:
        trainer = ThirdPartyTrainer(optimizer=recipe.optimizer, options=recipe.options, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_once(recipe: Recipe, task: Task, spec: RunSpec, options: Any) -> dict[str, Any]:
    """Train, score and measure the final model; the record of the run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, task, spec, options, folder)
        is_automatic = isinstance(trainer, SAMTrainer) and trainer.sam_config.sam_rho is None
        radius = RadiusMeter(trainer) if is_automatic else None
        if radius is not None:
            trainer.add_callback(radius)
        sets = task.curve_sets(spec.level) if spec.tuned_rho is None else {}
        curve = CurveMeter(trainer, sets) if sets else None
        if curve is not None:
            trainer.add_callback(curve)
        meter, clock, loss = train_quietly(trainer)
        measures = measure_model(trainer, task, spec, options.sharpness)
        measures |= radius.record() if radius is not None else {}
        measures |= curve.record() if curve is not None else {}
    return {
        **asdict(spec),
        **measures,
        "passes": meter.computed / meter.drawn,
        "updates": trainer.state.global_step,
        "examples_computed": meter.computed,
        "examples_drawn": meter.drawn,
        "seconds": round(sum(clock.seconds), 3),
        "train_loss": finite(loss),
    }


def train_quietly(trainer: Trainer) -> tuple[ComputeMeter, Clock, float]:
    """Train without output, which would break the progress bar of all runs; with the loss."""
    meter, clock = ComputeMeter(), Clock()
    trainer.add_callback(meter)
    trainer.add_callback(clock)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return meter, clock, trainer.train().training_loss


def run_all(wanted: Wanted, task: Task, options: Any, file: ResultsFile, what: str) -> None:
    """Train what the file does not hold yet, and add each run to it as soon as it is finished."""
    pending = [(recipe, spec) for recipe, spec in wanted if file.find(spec) is None]
    done = len(wanted) - len(pending)
    with tqdm(total=len(wanted), initial=done, desc=what, unit="run", smoothing=0) as bar:
        for record in _records(pending, task, options):
            file.add(record)
            score = "-" if record[task.metric] is None else f"{record[task.metric]:.3f}"
            bar.set_postfix_str(f"{record['recipe']}, {record['level']}: {score}")
            bar.update()


def _records(pending: Wanted, task: Task, options: Any) -> Iterator[dict[str, Any]]:
    if options.num_workers == 1:
        yield from (train_once(recipe, task, spec, options) for recipe, spec in pending)
        return
    # Spawned: a forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.num_workers, context, _prepare_worker, (options,)) as pool:
        try:
            runs = [pool.submit(_train_in_worker, recipe, spec) for recipe, spec in pending]
            for run in as_completed(runs):
                yield run.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: dict[str, Any] = {}


def _prepare_worker(options: Any) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.torch_num_threads)
    _worker.update(options=options, task=task_of(options))


def _train_in_worker(recipe: Recipe, spec: RunSpec) -> dict[str, Any]:
    return train_once(recipe, _worker["task"], spec, _worker["options"])


def measure_costs(recipes: Sequence[Recipe], task: Task, level: str, options: Any) -> dict:
    """For each recipe: seconds of a complete short schedule in each round, and peak memory.

    In a complete schedule, a recipe that perturbs late or rarely has its plain and its other
    updates in their proportion. In every round each recipe trains once, in random order, so that
    other load on the machine affects all of them. The time is that of the updates, without loading
    of data.
    """
    spec = RunSpec("", level, seed=0)
    costs: dict[str, dict[str, Any]] = {}
    total = len(recipes) * (options.timing_rounds + 2)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, desc="costs") as bar:
        for recipe in recipes:
            trainer = build_trainer(recipe, task, spec, options, folder, MEMORY_UPDATES)
            model = trainer.model
            gc.collect()  # an earlier trainer must not be released while this one is measured
            costs[recipe.name] = {
                "seconds": [],
                "peak_bytes": peak_memory(lambda t=trainer: train_quietly(t), model),
                "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            }
            bar.update()
        generator = random.Random(0)  # `train` seeds the global one
        for round_ in range(options.timing_rounds + 1):
            for recipe in generator.sample(recipes, len(recipes)):
                trainer = build_trainer(recipe, task, spec, options, folder, options.timing_updates)
                meter, clock, _ = train_quietly(trainer)
                if round_ > 0:  # the first one is a warm-up
                    costs[recipe.name]["seconds"].append(sum(clock.seconds))
                    costs[recipe.name]["passes"] = meter.computed / meter.drawn
                bar.update()
    return costs

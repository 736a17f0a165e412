"""The runs of `compare_methods.py`: one of them, and many."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from typing import Any

import torch
from benchmarks.benchmark_utils import Clock
from common.training_utils import ComputeMeter
from compare.data import Task
from compare.measures import finite, measure_model, scores
from compare.recipes import PLAIN, Recipe
from compare.results import ResultsFile, RunSpec
from compare.tasks import build_task
from compare.third_party_sam import ThirdPartyTrainer
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from sam_hf import SAMConfig, SAMTrainer

LENGTH_STEP = 0.05  # lengthened plain runs are shared by recipes whose cost rounds to the same


def build_trainer(
    recipe: Recipe, task: Task, spec: RunSpec, options: Any, folder: str, updates: int | None = None
) -> Trainer:
    """The trainer of a run.

    Args:
        updates: how many to train for; those of the task's schedule, times `length`, if None.
    """
    train, scored = task.sets(spec.level, spec.seed, is_tuning=spec.tuned_rho is not None)
    training = dict(task.training)
    epochs, batch = training.pop("num_train_epochs"), training["per_device_train_batch_size"]
    if updates is None:
        updates = round(spec.length * epochs * (len(train) // batch))
    args = TrainingArguments(
        output_dir=folder,
        max_steps=updates,
        dataloader_drop_last=True,  # the gradient of a few left over would be mere noise
        per_device_eval_batch_size=task.eval_batch,
        seed=spec.seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.use_cpu,
        bf16=options.bf16,
        dataloader_pin_memory=not options.use_cpu,
        dataloader_num_workers=options.dataloader_num_workers,
        dataloader_persistent_workers=options.dataloader_num_workers > 0,
        **training,
    )
    kwargs: dict[str, Any] = {
        "model": task.model(spec.seed),
        "args": args,
        "train_dataset": train,
        "eval_dataset": scored,
        "processing_class": task.processing_class,
        "compute_metrics": scores(task.metric),
    }
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
        meter, clock = ComputeMeter(), Clock()
        trainer.add_callback(meter)
        trainer.add_callback(clock)
        loss = train_quietly(trainer).training_loss
        measures = measure_model(trainer, task, spec, options.sharpness)
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


def train_quietly(trainer: Trainer) -> Any:
    """`trainer.train()`, without lines that would break the bar of all runs."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return trainer.train()


# ------------------------------------------------------------------------------------- many of them


def run_all(
    wanted: Sequence[tuple[Recipe, RunSpec]],
    task: Task,
    options: Any,
    file: ResultsFile,
    what: str,
) -> None:
    """Train what the file does not hold yet, and note each run in it as soon as it is finished."""
    pending = [(recipe, spec) for recipe, spec in wanted if file.find(spec) is None]
    done = len(wanted) - len(pending)
    with tqdm(total=len(wanted), initial=done, desc=what, unit="run", smoothing=0) as bar:
        for record in _records(pending, task, options):
            file.add(record)
            bar.set_postfix_str(f"{record['recipe']}, {record['level']}: {record[task.metric]:.3f}")
            bar.update()


def _records(
    pending: Sequence[tuple[Recipe, RunSpec]], task: Task, options: Any
) -> Iterator[dict[str, Any]]:
    if options.num_workers == 1:
        yield from (train_once(recipe, task, spec, options) for recipe, spec in pending)
        return
    # Spawned: a forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.num_workers, context, _prepare, (options,)) as pool:
        try:
            runs = [pool.submit(_train_in_worker, recipe, spec) for recipe, spec in pending]
            for run in as_completed(runs):
                yield run.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: dict[str, Any] = {}


def _prepare(options: Any) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.torch_num_threads)
    _worker.update(options=options, task=build_task(options))


def _train_in_worker(recipe: Recipe, spec: RunSpec) -> dict[str, Any]:
    return train_once(recipe, _worker["task"], spec, _worker["options"])


def plain_length(passes: Iterable[float]) -> float:
    """How many times the plain schedule has as many passes, rounded, from those of the seeds."""
    passes = list(passes)
    return round(round(sum(passes) / len(passes) / LENGTH_STEP) * LENGTH_STEP, 2)

"""The runs of `compare_methods.py`: one run, many of them, and the file that keeps them."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_utils import Clock
from comparison_data import Task
from comparison_measures import finite, measure_model, scores
from comparison_recipes import PLAIN, Recipe
from comparison_tasks import build_task
from script_utils import InputError
from third_party_sam import ThirdPartyTrainer
from tqdm import tqdm
from training_utils import ComputeMeter
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

import sam_hf
from sam_hf import SAMConfig, SAMTrainer

LENGTH_STEP = 0.05  # lengthened plain runs are shared by recipes whose cost rounds to the same


@dataclass(frozen=True)
class RunSpec:
    """Which run of a recipe. `length`: of the training, in units of the plain schedule."""

    recipe: str
    level: str
    seed: int
    length: float = 1.0
    tuned_rho: float | None = None  # set in a run of the search for rho


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


# ----------------------------------------------------------------------------------------- the file


class ResultsFile:
    """A JSON file with settings, versions and every finished run.

    Raises:
        InputError: the file holds runs of other settings or versions, or is no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        head = json.loads(json.dumps({"settings": settings, "versions": versions()}))
        if path.exists():
            self.content = read_results(path)
            self._refuse_difference("", {k: self.content.get(k) for k in head}, head)
        else:
            self.content = {**head, "device": device(), "recipes": {}, "runs": []}
        self._by_spec = {_key(record): record for record in self.content["runs"]}

    def find(self, spec: RunSpec) -> dict[str, Any] | None:
        return self._by_spec.get(_key(asdict(spec)))

    def add(self, record: dict[str, Any]) -> None:
        self.content["runs"].append(record)
        self._by_spec[_key(record)] = record
        self.write()

    def add_recipes(self, recipes: Sequence[Recipe]) -> None:
        """Note what the runs are made of.

        Raises:
            InputError: runs of a recipe are there, made with other options.
        """
        for recipe in recipes:
            definition = json.loads(json.dumps(recipe.definition()))
            known = self.content["recipes"].get(recipe.name)
            if known is not None:
                known = {key: known.get(key) for key in definition}
                self._refuse_difference(f"recipe {recipe.name!r}: ", known, definition)
            texts = {"description": recipe.description, "group": recipe.group}
            self.content["recipes"][recipe.name] = {**texts, **definition}

    def write(self) -> None:
        """All or nothing: an interrupt leaves the file of before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"_{self.path.name}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def _refuse_difference(self, where: str, theirs: Any, ours: Any) -> None:
        different = first_difference(theirs, ours)
        if different is not None:
            key, before, now = different
            raise InputError(
                f"{self.path} was made with {where}{key}={before!r}, and now it is {now!r}: choose "
                "another --output_dir, or go back to what it was"
            )


def read_results(path: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: there is no such file, or it is not one of these.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not {"settings", "recipes", "runs"} <= content.keys():
        raise InputError(f"{path} is no file of results: it has no settings, recipes and runs")
    return content


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sam_hf": sam_hf.__version__,
    }


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.processor() or platform.machine()})"


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in RunSpec.__dataclass_fields__)


def first_difference(before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Where two nested dictionaries differ first, and what stands there; None if nowhere."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
    return {key: item for part in parts for key, item in part.items()}

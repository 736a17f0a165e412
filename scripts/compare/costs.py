"""What a recipe of `compare_methods.py` costs an update, beside plain training: time and memory."""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.benchmark_utils import Clock, peak_memory
from common.training_utils import ComputeMeter
from compare.data import Task
from compare.recipes import PLAIN, Recipe
from compare.results import RunSpec
from compare.runs import build_trainer, train_quietly
from tqdm import tqdm

MEMORY_UPDATES = 16  # enough that recipes that begin late or pause have perturbed


def measure_costs(
    recipes: Sequence[Recipe], task: Task, level: str, options: Any
) -> dict[str, dict[str, Any]]:
    """For each recipe: seconds of a whole short schedule in each round, and peak memory.

    The schedule is whole, so that a recipe that begins late or perturbs now and then has its plain
    and its other updates in their proportion. In every round each recipe trains once, in an order
    that is drawn anew, so that whatever else the machine does falls on all of them. The time is
    that of the updates: without the loading of data, and nothing is logged.
    """
    spec = RunSpec("", level, seed=0)
    costs: dict[str, dict[str, Any]] = {}
    total = len(recipes) * (options.timing_rounds + 2)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, desc="costs") as bar:
        for recipe in recipes:
            trainer = build_trainer(recipe, task, spec, options, folder, MEMORY_UPDATES)
            model = trainer.model
            gc.collect()  # an earlier trainer must not be released while this one is measured
            peak = peak_memory(lambda t=trainer: train_quietly(t), model)
            costs[recipe.name] = {
                "seconds": [],
                "peak_bytes": peak,
                "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            }
            bar.update()
        shuffle = random.Random(0).shuffle  # of its own: `train` seeds the global one
        order = list(recipes)
        for round_ in range(options.timing_rounds + 1):
            shuffle(order)
            for recipe in order:
                clock, meter = Clock(), ComputeMeter()
                trainer = build_trainer(recipe, task, spec, options, folder, options.timing_updates)
                trainer.add_callback(clock)
                trainer.add_callback(meter)
                train_quietly(trainer)
                if round_ > 0:  # the very first does not count
                    costs[recipe.name]["seconds"].append(sum(clock.seconds))
                    costs[recipe.name]["passes"] = meter.computed / meter.drawn
                bar.update()
    return costs


def relative_time(costs: dict[str, dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Time of an update in units of plain's: the median over the rounds, and the quartiles."""
    pairs = zip(costs[name]["seconds"], costs[PLAIN]["seconds"], strict=True)
    ratios = [seconds / plain for seconds, plain in pairs]
    if len(ratios) < 2:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def extra_memory(costs: dict[str, dict[str, Any]], name: str) -> float:
    """Peak memory beyond that of plain training, in units of the bytes of the model."""
    cost = costs[name]
    return (cost["peak_bytes"] - costs[PLAIN]["peak_bytes"]) / cost["model_bytes"]

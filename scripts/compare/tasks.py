"""The tasks of `compare_methods.py`, by name."""

from __future__ import annotations

from typing import Any

from common.script_utils import InputError
from compare.data import VALIDATION_SHARE, Task, hash_of
from compare.images import cifar10, digits
from compare.measures import SHARPNESS
from compare.texts import text_task

BUILDERS = {"digits": digits, "cifar10": cifar10}


def build_task(options: Any) -> Task:
    """The task that --task names.

    Raises:
        InputError: its files are missing or do not fit together.
    """
    task = BUILDERS.get(options.task, text_task)(options)
    for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate"):
        if getattr(options, name) is not None:
            task.training[name] = getattr(options, name)
    kind, examples = task.data.examples, len(task.data.train)
    batch = task.training["per_device_train_batch_size"]
    fraction = min(options.train_fraction)
    if batch > int(int((1 - VALIDATION_SHARE) * examples) * fraction):
        part = f"{fraction:g} of " if fraction < 1 else ""
        raise InputError(
            f"--per_device_train_batch_size {batch} is more than {part}the {examples} training "
            f"{kind}, or than what is left of them for --tune: choose less"
        )
    task.settings |= {
        "task": options.task,
        f"training_{kind}": examples,
        f"test_{kind}": len(task.data.test),
        "training": task.training,
    }
    # What else may differ behind the same options: other files, and how the device rounds.
    task.settings["labels"] = hash_of(task.labels(task.data.train), task.labels(task.data.test))
    if options.bf16:
        task.settings["bf16"] = True
    if not options.use_cpu:
        task.settings["device"] = "gpu"
    if task.metric != "accuracy":
        task.settings["metric"] = task.metric
    if options.sharpness:
        task.settings["sharpness"] = SHARPNESS
    return task

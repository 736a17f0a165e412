"""The texts that `compare_methods.py` trains on: TREC-6 and tasks of GLUE, in parquet files."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from common.text_arguments import TASKS, DataArguments, ModelArguments
from common.text_data import load_text_data
from compare.data import Task, noise_levels
from torch.utils.data import Dataset
from train_text_classification import build_model, encode
from transformers import PreTrainedModel
from transformers.utils import logging

# A little above the longest text, or where pairs are long, above nearly all of them.
MAX_LENGTHS = {"trec6": 64, "cola": 64, "rte": 256, "sst2": 80}
EPOCHS = {"trec6": 5, "cola": 5, "rte": 5, "sst2": 3}


class Encoded(Dataset):
    """Token numbers and labels."""

    def __init__(self, rows: list[dict[str, list[int]]], labels: np.ndarray) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "labels": int(self.labels[index])}


@dataclass(kw_only=True)
class TextTask(Task):
    """
    Args:
        max_length: longer texts, or pairs, are cut to so many tokens.
    """

    tuning_noise: ClassVar[float] = 0.2

    max_length: int

    def labels(self, examples: datasets.Dataset) -> np.ndarray:
        return np.array(examples["labels"])

    def take(self, examples: datasets.Dataset, indices: np.ndarray) -> datasets.Dataset:
        return examples.select(indices)

    def prepare(self, examples: datasets.Dataset, is_training: bool = False) -> Encoded:
        encoded = encode(examples, self.processing_class, self.max_length)
        return Encoded(encoded.remove_columns("labels").to_list(), self.labels(examples))

    def relabel(self, prepared: Encoded, labels: np.ndarray) -> Encoded:
        other = copy.copy(prepared)
        other.labels = labels
        return other


def text_task(options: Any) -> TextTask:
    """Fine-tuning of --model_name_or_path. A validation file of GLUE is the test set.

    Raises:
        InputError: a file, a column or the model is missing, or labels are wrong: those of GLUE's
            own test files are hidden.
    """
    is_glue = options.task in TASKS
    names = {"task_name": options.task} if is_glue else {"text_column": "sentence"}
    data = load_text_data(
        DataArguments(
            train_file=options.train_file,
            validation_file=options.validation_file,
            max_train_samples=options.max_train_samples,
            max_eval_samples=options.max_eval_samples,
            **names,
        )
    )
    max_length = options.max_length or MAX_LENGTHS[options.task]
    arguments = ModelArguments(
        model_name_or_path=options.model_name_or_path, ignore_mismatched_sizes=True
    )

    def build() -> tuple[PreTrainedModel, Any]:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the head is new on purpose
        try:
            return build_model(arguments, data, max_length)
        finally:
            logging.set_verbosity(verbosity)

    model, tokenizer = build()
    return TextTask(
        data=data,
        new_model=lambda: build()[0],
        processing_class=tokenizer,
        max_length=max_length,
        eval_batch=64,
        training={
            "num_train_epochs": EPOCHS[options.task],
            "per_device_train_batch_size": 32,
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,  # of all
        },
        levels=noise_levels(options, (0.0, 0.2), TextTask.tuning_noise),
        metric=data.metrics[0],
        settings={
            "model": {"pretrained": _identity(options.model_name_or_path, model)},
            "max_length": max_length,
        },
    )


def _identity(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """What tells pretrained weights apart, wherever they lie."""
    weights = hashlib.sha256()
    for key, weight in sorted(model.base_model.state_dict().items()):
        weights.update(key.encode() + weight.numpy().tobytes())
    folder = Path(name)
    return {
        "name": "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else name,
        "parameters": model.num_parameters(),
        "sha256": weights.hexdigest()[:16],
    }

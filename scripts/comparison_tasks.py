"""What `compare_methods.py` trains on: data, labels at each noise level, model, schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from experiment import class_labels
from image_arguments import DataArguments, ModelArguments
from image_data import ImageData, ImageTensors, LabeledImages, load_image_data
from labeled_data import (
    add_symmetric_noise,
    draw,
    hold_out,
    load_files,
    number_labels,
    read_labels,
)
from script_utils import InputError
from train_image_classification import build_model
from transformers import PreTrainedModel, ViTImageProcessorPil, set_seed
from wide_resnet import WideResNetConfig, WideResNetForImageClassification

VALIDATION_SHARE = 0.2  # of the training images, with their right labels, to choose rho by
TUNING_SEEDS = (100, 101, 102)
TUNING_NOISE = 0.4
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class Task:
    """One task of the comparison.

    Args:
        data: both sets with their right labels.
        new_model: makes an untrained model, from the global random state.
        training: options of `TrainingArguments`.
        levels: by name, the share of wrong labels, or the labels that people gave.
        settings: all that the results depend on, apart from recipe, level and seed.
    """

    data: ImageData
    new_model: Callable[[], PreTrainedModel]
    processor: Any
    mode: str
    augment: bool
    training: dict[str, Any]
    levels: dict[str, float | np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int) -> PreTrainedModel:
        """The same initial weights for the same seed."""
        set_seed(seed)
        return self.new_model()

    def sets(self, level: str, seed: int, is_tuning: bool) -> tuple[ImageTensors, ImageTensors]:
        """The training images with the labels of this level and seed, and what is scored.

        While rho is tuned, that is a part of the training images, with their right labels. The
        test images have no say in it.
        """
        train, scored, part = self._tuning_sets if is_tuning else self._final_sets
        noise = self.levels[level]
        right = train.data.labels
        if isinstance(noise, float):
            labels = add_symmetric_noise(right, len(self.data.class_names), noise, seed)
        else:
            labels = noise[part]
        noisy = copy.copy(train)  # the images are prepared once for all levels and seeds
        noisy.data = LabeledImages(train.data.images, labels, train.data.image_column)
        return noisy, scored

    @cached_property
    def _final_sets(self) -> tuple[ImageTensors, ImageTensors, np.ndarray]:
        everything = np.arange(len(self.data.train))
        return self._tensors(self.data.train, True), self._tensors(self.data.test), everything

    @cached_property
    def _tuning_sets(self) -> tuple[ImageTensors, ImageTensors, np.ndarray]:
        train = self.data.train
        what = "--tune: a part of the training images"
        part, rest = hold_out(len(train), VALIDATION_SHARE, what, train.labels)
        return self._tensors(train.take(part), True), self._tensors(train.take(rest)), part

    def _tensors(self, images: LabeledImages, is_training: bool = False) -> ImageTensors:
        augment = self.augment and is_training
        return ImageTensors(images, self.processor, self.mode, augment)


def build_task(options: Any) -> Task:
    """The task that --task names.

    Raises:
        InputError: its files are missing or do not fit together.
    """
    task = {"digits": _digits, "cifar10": _cifar10}[options.task](options)
    for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate"):
        if getattr(options, name) is not None:
            task.training[name] = getattr(options, name)
    batch, images = task.training["per_device_train_batch_size"], len(task.data.train)
    if batch > (1 - VALIDATION_SHARE) * images:
        raise InputError(
            f"--per_device_train_batch_size {batch} is more than the {images} training images, or "
            "than what is left of them for --tune: choose less"
        )
    task.settings |= {
        "task": options.task,
        "training_images": len(task.data.train),
        "test_images": len(task.data.test),
        "training": task.training,
    }
    return task


def _digits(options: Any) -> Task:
    # Half of the images are for the test: its score is then known to about a percent.
    data = load_image_data(
        DataArguments(eval_fraction=0.5, max_train_samples=options.max_train_samples)
    )
    sizes = {
        "patch_size": 4,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    }
    _, processor = build_model(ModelArguments(**sizes), data)
    return Task(
        data=data,
        new_model=lambda: build_model(ModelArguments(**sizes), data)[0],
        processor=processor,
        mode="RGB",
        augment=False,
        training={
            "num_train_epochs": 64,
            "per_device_train_batch_size": 128,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "lr_scheduler_type": "cosine",
        },
        levels=_noise_levels(options, (0.0, 0.2, 0.4, 0.6)),
        settings={"model": {"vit": sizes}},
    )


def _cifar10(options: Any) -> Task:
    # All images at first: the file with the labels has a row for each of them.
    data = load_image_data(
        DataArguments(
            train_file=options.train_file,
            validation_file=options.validation_file,
            image_column=options.image_column,
            max_eval_samples=options.max_eval_samples,
        )
    )
    kept = draw(len(data.train), options.max_train_samples)
    human = {} if options.labels_file is None else _human_labels(options, data)
    levels: dict[str, Any] = {column: labels[kept] for column, labels in human.items()}
    if not human or options.label_noise is not None:
        levels = _noise_levels(options, (0.0, 0.4)) | levels
    data.train = data.train.take(kept)
    sizes = {"depth": options.depth, "width": options.width, "dropout": options.dropout}
    try:
        config = WideResNetConfig(**sizes, **class_labels(data.class_names))
    except ValueError as error:
        raise InputError(f"--{error}") from error
    processor = ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=CIFAR10_MEAN, image_std=CIFAR10_STD
    )
    return Task(
        data=data,
        new_model=lambda: WideResNetForImageClassification(config),
        processor=processor,
        mode="RGB",
        augment=True,
        training={
            "num_train_epochs": 30,
            "per_device_train_batch_size": 128,
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
            "lr_scheduler_type": "cosine",
            "optim": "sgd",
            "optim_args": "momentum=0.9,nesterov=True",
            "max_grad_norm": 0.0,  # as in the papers: BatchNorm keeps the steps in bounds
        },
        levels=levels,
        settings={"model": {"wide_resnet": sizes}},
    )


def _noise_levels(options: Any, usual: Sequence[float]) -> dict[str, float]:
    chosen = usual if options.label_noise is None else options.label_noise
    if options.tune:
        chosen = [TUNING_NOISE]
    return {f"{noise:g}": float(noise) for noise in chosen}


def _human_labels(options: Any, data: ImageData) -> dict[str, np.ndarray]:
    """The class numbers in each --label_column, one for each training image.

    Raises:
        InputError: the rows are not those of the training images.
    """
    table = load_files("labels_file", [options.labels_file], builder="parquet")
    if len(table) != len(data.train):
        raise InputError(
            f"--labels_file {options.labels_file!r} has {len(table)} rows, and there are "
            f"{len(data.train)} training images: it must have a row for each of them"
        )
    numbers = list(range(len(data.class_names)))

    def column(name: str) -> np.ndarray:
        labels = read_labels(table, name, f"rows of {options.labels_file}")
        if isinstance(labels[0], str):
            return number_labels(labels, data.class_names, "labels")
        return number_labels(labels, numbers, "labels")

    if "clean_label" in table.column_names:  # the order of the images is not to be taken on trust
        differing = int((column("clean_label") != data.train.labels).sum())
        if differing:
            raise InputError(
                f"--labels_file {options.labels_file!r}: {differing} values of its clean_label "
                "differ from the labels of --train_file: the rows are in another order"
            )
    return {name: column(name) for name in options.label_column}

"""The images that `compare_methods.py` trains on, and their models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from common.experiment import class_labels
from common.image_arguments import DataArguments, ModelArguments
from common.image_data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    ImageData,
    ImageTensors,
    LabeledImages,
    load_image_data,
)
from common.labeled_data import draw, load_files, number_labels, read_labels
from common.script_utils import InputError
from common.wide_resnet import WideResNetConfig, WideResNetForImageClassification
from compare.corruptions import CORRUPTIONS, corrupt
from compare.data import Level, Task, at_fractions, hash_of, noise_levels
from torch.utils.data import Dataset
from train_image_classification import build_model
from transformers import ViTImageProcessorPil

CORRUPTED_IMAGES = 2000  # at most, of the test: enough to know a mean over ten kinds
DIGITS_VIT = {
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
CIFAR10_VIT = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
SGD = {
    "num_train_epochs": 30,
    "per_device_train_batch_size": 128,
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "lr_scheduler_type": "cosine",
    "optim": "sgd",
    "optim_args": "momentum=0.9,nesterov=True",
    "max_grad_norm": 0.0,  # as in the papers: BatchNorm keeps the steps in bounds
}
ADAMW = {
    "num_train_epochs": 30,
    "per_device_train_batch_size": 128,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all
}


@dataclass(kw_only=True)
class ImageTask(Task):
    """
    Args:
        mode: that of Pillow, of the images that the model takes.
        augment: train on random crops and flips.
    """

    processor: Any
    mode: str = "RGB"
    augment: bool = False

    def labels(self, examples: LabeledImages) -> np.ndarray:
        return examples.labels

    def take(self, examples: LabeledImages, indices: np.ndarray) -> LabeledImages:
        return examples.take(indices)

    def prepare(self, examples: LabeledImages, is_training: bool = False) -> ImageTensors:
        augment = self.augment and is_training
        return ImageTensors(examples, self.processor, self.mode, augment)

    def relabel(self, prepared: ImageTensors, labels: np.ndarray) -> ImageTensors:
        other, images = copy.copy(prepared), prepared.data
        other.data = LabeledImages(images.images, labels, images.image_column)
        return other

    def corrupted_sets(self) -> dict[str, Dataset]:
        pixels, labels = self._test_pixels
        return {
            f"{kind} {severity:g}": _Tensors(
                self._normalise(corrupt(pixels, kind, severity)), labels
            )
            for kind, severities in CORRUPTIONS.items()
            for severity in severities
        }

    @cached_property
    def _test_pixels(self) -> tuple[torch.Tensor, np.ndarray]:
        """From 0 to 1, as they were before they were normalised."""
        _, scored, _ = self._final_sets
        chosen = draw(len(scored), CORRUPTED_IMAGES)
        pixels = torch.stack([scored[int(i)]["pixel_values"] for i in chosen])
        mean, std = self._mean_and_std()
        return (pixels * std + mean).clamp(0, 1), scored.data.labels[chosen]

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = self._mean_and_std()
        return (pixels - mean) / std

    def _mean_and_std(self) -> list[torch.Tensor]:
        both = self.processor.image_mean, self.processor.image_std
        return [torch.tensor(values)[:, None, None] for values in both]


class _Tensors(Dataset):
    def __init__(self, pixels: torch.Tensor, labels: np.ndarray) -> None:
        self._pixels, self._labels = pixels, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self._pixels[index], "labels": int(self._labels[index])}


def digits(options: Any) -> ImageTask:
    """scikit-learn's digits and a small ViT."""
    # Half of the images are for the test: its score is then known to about a percent.
    data = load_image_data(
        DataArguments(eval_fraction=0.5, max_train_samples=options.max_train_samples)
    )
    arguments = ModelArguments(**DIGITS_VIT)
    return ImageTask(
        data=data,
        new_model=lambda: build_model(arguments, data)[0],
        processor=build_model(arguments, data)[1],
        training={
            "num_train_epochs": 64,
            "per_device_train_batch_size": 128,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "lr_scheduler_type": "cosine",
        },
        levels=noise_levels(options, (0.0, 0.2, 0.4, 0.6), ImageTask.tuning_noise),
        settings={"model": {"vit": DIGITS_VIT}},
    )


def cifar10(options: Any) -> ImageTask:
    """CIFAR-10 in files, with a Wide-ResNet or a small ViT."""
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
    human, identity = ({}, None) if options.labels_file is None else _human_labels(options, data)
    levels: dict[str, Level] = at_fractions(
        {c: labels[kept] for c, labels in human.items()}, options
    )
    if not human or options.label_noise is not None:
        levels = noise_levels(options, (0.0, 0.4), ImageTask.tuning_noise) | levels
    data.train = data.train.take(kept)
    build = {"wrn": _wide_resnet, "vit": _vit}[options.model or "wrn"]
    parts = build(options, data)
    if identity is not None:
        parts["settings"]["labels_file"] = identity
    if not options.augment:
        parts["settings"]["augment"] = False
    return ImageTask(data=data, augment=options.augment, levels=levels, **parts)


def _wide_resnet(options: Any, data: ImageData) -> dict[str, Any]:
    sizes = {"depth": options.depth, "width": options.width, "dropout": options.dropout}
    try:
        config = WideResNetConfig(**sizes, **class_labels(data.class_names))
    except ValueError as error:
        raise InputError(f"--{error}") from error
    return {
        "new_model": lambda: WideResNetForImageClassification(config),
        "processor": ViTImageProcessorPil(
            size={"height": 32, "width": 32}, image_mean=CIFAR10_MEAN, image_std=CIFAR10_STD
        ),
        "training": dict(SGD),
        "settings": {"model": {"wide_resnet": sizes}},
    }


def _vit(options: Any, data: ImageData) -> dict[str, Any]:
    sizes = {"patch_size": options.patch_size, **CIFAR10_VIT}
    arguments = ModelArguments(image_size=32, **sizes)
    return {
        "new_model": lambda: build_model(arguments, data)[0],
        "processor": build_model(arguments, data)[1],
        "training": dict(ADAMW),
        "settings": {"model": {"vit": sizes}},
    }


def _human_labels(options: Any, data: ImageData) -> tuple[dict[str, np.ndarray], str]:
    """The class numbers in each --label_column, one for each training image; a hash of the file.

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
    identity = hash_of(*(np.array(table[name]) for name in sorted(table.column_names)))
    return {name: column(name) for name in options.label_column}, identity

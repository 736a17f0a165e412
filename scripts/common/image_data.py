"""The data of the image classification script: sources, splits, label noise, tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common.classification import ClassificationData
from common.image_arguments import DataArguments
from common.labeled_data import (
    draw,
    find_classes,
    hold_out,
    load,
    load_files,
    load_sets,
    number_labels,
    read_labels,
    require_column,
)
from common.script_utils import InputError
from PIL import Image
from sklearn.datasets import load_digits

TRAINING, EVALUATION = "training images", "evaluation images"
# Of the training images, for each channel from 0 to 1.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CACHE_BYTES = 2**30  # tensors of a data set up to this size are made once and kept: all of CIFAR-10


@dataclass
class LabeledImages:
    """Images, still undecoded where they come from files, and their class numbers."""

    images: Sequence[Any]  # each gives a PIL image, or a row {column: PIL image}
    labels: np.ndarray
    image_column: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        row = self.images[int(index)]
        return row if self.image_column is None else row[self.image_column]

    def take(self, indices: np.ndarray) -> LabeledImages:
        if self.image_column is None:
            images: Sequence[Any] = [self.images[i] for i in indices]
        else:
            images = self.images.select(indices)
        return LabeledImages(images, self.labels[indices], self.image_column)

    def divide(self, fraction: float, what: str) -> list[LabeledImages]:
        """Two stratified parts, the second with this fraction of the images."""
        parts = hold_out(len(self), fraction, what, self.labels)
        return [self.take(part) for part in parts]


class ImageData(ClassificationData):
    """Images of both sets, as `LabeledImages`."""

    examples = "images"

    def divide(self, fraction: float, what: str) -> list[LabeledImages]:
        return self.train.divide(fraction, what)


def load_image_data(args: DataArguments) -> ImageData:
    """Load both sets and add the label noise to the training set.

    Raises:
        InputError: there is no such source, a column is missing, or images have no label.
    """
    name, train, test, class_names = _load_source(args)
    if test is None:
        fraction = args.eval_fraction or 0.2
        train, test = train.divide(fraction, f"--eval_fraction {fraction}")
    train = train.take(draw(len(train), args.max_train_samples))
    test = test.take(draw(len(test), args.max_eval_samples))
    data = ImageData(name, train, test, class_names)
    train.labels = data.noisy(train.labels, args)
    return data


def _load_source(
    args: DataArguments,
) -> tuple[str, LabeledImages, LabeledImages | None, list[str]]:
    if args.dataset_name is not None or args.train_file is not None:
        name = args.dataset_name or Path(args.train_file[0]).parent.resolve().name
        train, test = load_sets(args, partial(load_files, builder="parquet"))
    elif args.train_dir is not None:
        name = Path(args.train_dir).resolve().name
        train = _load_folder("train_dir", args.train_dir)
        test = _load_folder("validation_dir", args.validation_dir)
    else:
        digits = load_digits()
        scans = (digits.images * (255 / 16)).round().astype(np.uint8)  # 17 grey levels
        images = [Image.fromarray(scan) for scan in scans]
        return "digits", LabeledImages(images, digits.target), None, [str(i) for i in range(10)]
    image_column, label_column = args.image_column or "image", args.label_column or "label"
    train_labels = read_labels(train, label_column, TRAINING)
    classes = find_classes(train, label_column, train_labels, TRAINING)
    return (
        name,
        _labeled_images(train, image_column, train_labels, classes, TRAINING),
        test
        and _labeled_images(
            test, image_column, read_labels(test, label_column, EVALUATION), classes, EVALUATION
        ),
        [str(c) for c in classes],
    )


def _load_folder(option: str, folder: str | None) -> datasets.Dataset | None:
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise InputError(f"--{option} {folder!r}: there is no such folder")
    return load(
        f"--{option} {folder!r}",
        "imagefolder",
        data_files=str(Path(folder) / "**"),  # with data_dir, a class "test" would be a split
        drop_labels=False,  # as the default would for a folder with a single class
        split="train",
    )


def _labeled_images(
    data: datasets.Dataset, column: str, labels: list[Any], classes: list[Any], which: str
) -> LabeledImages:
    numbers = number_labels(labels, classes, which)
    require_column(data, "image_column", column, which)
    images = data.select_columns([column])
    try:
        if not isinstance(data.features[column], datasets.Image):
            images = images.cast_column(column, datasets.Image())
        images[0]
    except Exception as error:  # not bytes, not a path, or not those of an image
        raise InputError(
            f"--image_column {column!r} holds {data.features[column]}, and its first value cannot "
            f"be read as an image: {error}"
        ) from error
    return LabeledImages(images, numbers, column)


class ImageTensors(torch.utils.data.Dataset):
    """`pixel_values` and `labels` as the model takes them, from the model's own image processor.

    A small set is processed once and kept. A large one is processed image by image, by the
    workers of the data loader.
    """

    def __init__(self, data: LabeledImages, processor: Any, mode: str, augment: bool = False):
        self.data, self.processor, self.mode, self.augment = data, processor, mode, augment
        self._kept: torch.Tensor | None = None
        first = self._process(0)
        if first.nbytes * len(data) <= CACHE_BYTES:
            # One tensor: the workers of a data loader share its memory.
            self._kept = first.new_empty((len(data), *first.shape))
            for i in range(len(data)):
                self._kept[i] = self._process(i)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._process(index) if self._kept is None else self._kept[index]
        if self.augment:
            pixels = random_crop_and_flip(pixels)
        return {"pixel_values": pixels, "labels": int(self.data.labels[index])}

    def _process(self, index: int) -> torch.Tensor:
        try:
            image = self.data.image(index).convert(self.mode)
        except (OSError, AttributeError) as error:  # broken, or none at all
            raise InputError(f"image number {index} of its set cannot be read: {error}") from error
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def random_crop_and_flip(pixels: torch.Tensor) -> torch.Tensor:
    """A random crop of the same size after padding by 1/8 of the side, flipped half of the time.

    The padding is 0, which is the mean colour: the pixels (channels, height, width) are normalised.
    """
    _, height, width = pixels.shape
    pad_y, pad_x = height // 8, width // 8
    padded = torch.nn.functional.pad(pixels, (pad_x, pad_x, pad_y, pad_y))
    top = int(torch.randint(2 * pad_y + 1, ()))
    left = int(torch.randint(2 * pad_x + 1, ()))
    cropped = padded[:, top : top + height, left : left + width]
    return cropped.flip(-1) if torch.rand(()) < 0.5 else cropped

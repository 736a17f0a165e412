"""The data of the image classification script: sources, splits, label noise, tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from image_arguments import DataArguments
from PIL import Image
from script_utils import InputError, closest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0  # for what must be the same in every run, whatever its --seed
CACHE_BYTES = 256 * 2**20  # tensors of a data set up to this size are made once and kept


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


@dataclass
class ImageData:
    """A training and an evaluation set with the same classes."""

    name: str
    train: LabeledImages
    test: LabeledImages
    class_names: list[str]
    noise: str  # in words, '' if none
    labels_changed: int

    def describe(self) -> str:
        changed = f"; {self.labels_changed} training labels are wrong" if self.noise else ""
        return (
            f"{self.title}: {len(self.train)} training and {len(self.test)} test images, "
            f"{len(self.class_names)} classes{changed}"
        )

    @property
    def title(self) -> str:
        return f"{self.name}, {self.noise}" if self.noise else self.name


def load_image_data(args: DataArguments) -> ImageData:
    """Load both sets and add the label noise to the training set.

    Raises:
        InputError: there is no such source, a column is missing, or images have no label.
    """
    name, train, test, class_names = _load_source(args)
    if test is None:
        train, test = _split(train, args.eval_fraction or 0.2)
    train = _subset(train, args.max_train_samples)
    test = _subset(test, args.max_eval_samples)
    clean = train.labels
    train.labels = add_symmetric_noise(
        clean, len(class_names), args.label_noise, args.label_noise_seed or 0
    )
    noise = f"{100 * args.label_noise:g}% label noise" if args.label_noise else ""
    changed = int((train.labels != clean).sum())
    return ImageData(name, train, test, class_names, noise, changed)


def add_symmetric_noise(
    labels: np.ndarray, num_classes: int, fraction: float, seed: int
) -> np.ndarray:
    """A copy in which exactly round(fraction * N) labels are another class, uniformly drawn."""
    random = np.random.default_rng(seed)
    changed = random.choice(len(labels), size=round(fraction * len(labels)), replace=False)
    noisy = labels.copy()
    # A shift by 1 to C - 1 classes reaches each of the others equally often, and never the own one.
    noisy[changed] = (labels[changed] + random.integers(1, num_classes, len(changed))) % num_classes
    return noisy


def _load_source(
    args: DataArguments,
) -> tuple[str, LabeledImages, LabeledImages | None, list[str]]:
    if args.dataset_name is not None:
        name = args.dataset_name
        train, test = (
            _load(f"--dataset_name {name}", name, args.dataset_config_name, split=split)
            for split in (args.train_split or "train", args.eval_split or "test")
        )
    elif args.train_file is not None:
        name = Path(args.train_file[0]).parent.resolve().name
        train = _load_parquet("train_file", args.train_file)
        test = _load_parquet("validation_file", args.validation_file)
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
    train_labels = _read_labels(train, label_column, "training")
    classes = _classes(train, label_column, train_labels)
    return (
        name,
        _labeled_images(train, image_column, train_labels, classes, "training"),
        test
        and _labeled_images(
            test,
            image_column,
            _read_labels(test, label_column, "evaluation"),
            classes,
            "evaluation",
        ),
        [str(c) for c in classes],
    )


def _load(option: str, *source: Any, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(*source, **options)
    # Whatever is wrong with a source, and there are a dozen exceptions for it, the user chose it.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{option} cannot be loaded: {reason}") from error


def _load_parquet(option: str, files: list[str] | None) -> datasets.Dataset | None:
    if files is None:
        return None
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"--{option} {file!r}: there is no such file")
    return _load(f"--{option} {files}", "parquet", data_files=files, split="train")


def _load_folder(option: str, folder: str | None) -> datasets.Dataset | None:
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise InputError(f"--{option} {folder!r}: there is no such folder")
    return _load(
        f"--{option} {folder!r}",
        "imagefolder",
        data_files=str(Path(folder) / "**"),  # with data_dir, a class "test" would be a split
        drop_labels=False,  # as the default would for a folder with a single class
        split="train",
    )


def _read_labels(data: datasets.Dataset, column: str, which: str) -> list[Any]:
    """The labels as the source has them: class names for a ClassLabel, else strings or integers."""
    _require_column(data, "label_column", column, which)
    feature = data.features[column]
    labels = list(data.select_columns([column]).with_format(None)[column])
    is_class = isinstance(feature, datasets.ClassLabel)
    unlabeled = sum(label is None or (is_class and label < 0) for label in labels)
    if unlabeled:
        raise InputError(
            f"{unlabeled} of the {len(labels)} {which} images have no label (empty or -1) in "
            f"--label_column {column!r}: leave them out, or choose another split or column"
        )
    if not is_class and not all(type(label) in (int, str) for label in labels):
        raise InputError(
            f"--label_column {column!r} holds {feature}; classes must be integers or strings"
        )
    return feature.int2str(labels) if is_class else labels


def _classes(data: datasets.Dataset, column: str, labels: list[Any]) -> list[Any]:
    feature = data.features[column]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(labels))
    if len(classes) < 2:
        raise InputError(f"the training images have only the class {classes}: two are needed")
    return classes


def _labeled_images(
    data: datasets.Dataset, column: str, labels: list[Any], classes: list[Any], which: str
) -> LabeledImages:
    # By name: the numbers of an evaluation folder that lacks a class are not those of the training.
    number = {name: i for i, name in enumerate(classes)}
    strange = sorted(set(labels) - set(classes))
    if strange:
        raise InputError(f"the {which} images have classes that the training has not: {strange}")
    _require_column(data, "image_column", column, which)
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
    return LabeledImages(images, np.array([number[name] for name in labels]), column)


def _require_column(data: datasets.Dataset, option: str, column: str, which: str) -> None:
    if column not in data.column_names:
        hint = closest(column, data.column_names)
        raise InputError(
            f"--{option}: the {which} data has no column {column!r}{hint}; its columns: "
            f"{', '.join(data.column_names)}"
        )


def _split(data: LabeledImages, fraction: float) -> tuple[LabeledImages, LabeledImages]:
    try:
        train, test = train_test_split(
            np.arange(len(data)),
            test_size=fraction,
            stratify=data.labels,
            random_state=SPLIT_SEED,
        )
    except ValueError as error:  # a class with one image, or fewer images than classes
        raise InputError(f"--eval_fraction {fraction} cannot be set aside: {error}") from error
    return data.take(train), data.take(test)


def _subset(data: LabeledImages, size: int | None) -> LabeledImages:
    if size is None or size >= len(data):
        return data
    return data.take(np.random.default_rng(SPLIT_SEED).permutation(len(data))[:size])


class ImageTensors(torch.utils.data.Dataset):
    """`pixel_values` and `labels` as the model takes them, from the model's own image processor.

    A small set is processed once and kept. A large one is processed image by image, by the
    workers of the data loader.
    """

    def __init__(self, data: LabeledImages, processor: Any, mode: str, augment: bool = False):
        self.data, self.processor, self.mode, self.augment = data, processor, mode, augment
        self._kept: list[torch.Tensor] | None = None
        if self._process(0).nbytes * len(data) <= CACHE_BYTES:
            self._kept = [self._process(i) for i in range(len(data))]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._process(index) if self._kept is None else self._kept[index]
        if self.augment:
            pixels = random_crop_and_flip(pixels)
        return {"pixel_values": pixels, "labels": int(self.data.labels[index])}

    def _process(self, index: int) -> torch.Tensor:
        image = self.data.image(index).convert(self.mode)
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

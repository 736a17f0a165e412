"""The options of the image classification script."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from shared_arguments import (
    ClassifierArguments,
    LabelArguments,
    SearchArguments,
    output_dir_field,
)

from sam_hf import SAMTrainingArguments


@dataclass
class DataArguments(LabelArguments):
    """Which images, from where. With no source at all: scikit-learn's handwritten digits."""

    _sources: ClassVar = {**LabelArguments._sources, "train_dir": ("validation_dir",)}
    _evaluation = (*LabelArguments._evaluation, "validation_dir")
    _built_in = "the built-in digits"
    _columns = ("image_column", "label_column")

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Image data set on the Hub, such as uoft-cs/cifar10. Without --dataset_name, "
            "--train_file and --train_dir: the 1,797 handwritten digits of scikit-learn."
        },
    )
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Local parquet files with the training images."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Local parquet files with the evaluation images."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={"help": "Local folder of training images with one sub-folder per class."},
    )
    validation_dir: str | None = field(
        default=None,
        metadata={"help": "Local folder of evaluation images with one sub-folder per class."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images. 'image' if not given."}
    )
    augment: bool = field(
        default=False,
        metadata={
            "help": "Train on random crops (after padding by 1/8 of the side) and horizontal "
            "flips. Usual for natural images, wrong for digits."
        },
    )


@dataclass
class ModelArguments(ClassifierArguments):
    """Which model: a pretrained one, or a small ViT made from its configuration."""

    _sizes = ("image_size", "patch_size", *ClassifierArguments._sizes)

    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images that the untrained model takes; others are resized. The "
            "side of the first training image if not given."
        },
    )
    patch_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the untrained model's patches. A quarter of the image if not given."
        },
    )


@dataclass
class TrainArguments(SearchArguments, SAMTrainingArguments):
    """The Trainer's options with those of SAM, the comparison and the search."""

    output_dir: str = output_dir_field("outputs/image_classification", "image processor")

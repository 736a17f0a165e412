"""The options of the image classification script."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from common.shared_arguments import (
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
    """Which model: a pretrained one, or a ViT or Wide-ResNet made from its configuration."""

    _sizes = ("image_size", "patch_size", *ClassifierArguments._sizes)
    # Each untrained model with the options that have no effect on another.
    _models: ClassVar[dict[str, tuple[str, ...]]] = {
        "vit": ("patch_size", *ClassifierArguments._sizes),
        "wide_resnet": ("depth", "width", "dropout"),
    }

    model_type: Literal["vit", "wide_resnet"] | None = field(
        default=None, metadata={"help": "Which untrained model is made. vit if not given."}
    )
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
    depth: int | None = field(
        default=None, metadata={"help": "Of the Wide-ResNet: 6 n + 4. 16 if not given."}
    )
    width: int | None = field(
        default=None,
        metadata={"help": "Of the Wide-ResNet: the factor of its channels. 8 if not given."},
    )
    dropout: float | None = field(
        default=None,
        metadata={"help": "Of the Wide-ResNet: share dropped inside each block. 0 if not given."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_type", *self._models["wide_resnet"]):
            if self.model_name_or_path is not None and getattr(self, name) is not None:
                raise ValueError(f"--{name} has no effect with --model_name_or_path")
        chosen = self.model_type or "vit"
        for model_type, options in self._models.items():
            for name in options:
                if model_type != chosen and getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} has no effect on a {chosen}: it is of --model_type {model_type}"
                    )

    def wide_resnet_sizes(self) -> dict[str, float]:
        """Those that were given, as `WideResNetConfig` names them."""
        sizes = {name: getattr(self, name) for name in self._models["wide_resnet"]}
        return {name: value for name, value in sizes.items() if value is not None}


@dataclass
class TrainArguments(SearchArguments, SAMTrainingArguments):
    """The Trainer's options with those of SAM, the comparison and the search."""

    output_dir: str = output_dir_field("outputs/image_classification", "image processor")

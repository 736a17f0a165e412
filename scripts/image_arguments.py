"""The options of the image classification script."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sam_hf import SAMTrainingArguments

MODEL_SIZES = (
    "image_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclass
class DataArguments:
    """Which images, from where. With no source at all: scikit-learn's handwritten digits."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Image data set on the Hub, such as uoft-cs/cifar10. Without --dataset_name, "
            "--train_file and --train_dir: the 1,797 handwritten digits of scikit-learn."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub data set, where it has several."}
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Training split of the Hub data set. 'train' if not given."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Evaluation split of the Hub data set. 'test' if not given."},
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
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the images to set aside for evaluation, where the source has none of "
            "its own (the digits; no --validation_file or --validation_dir). 0.2 if not given. "
            "Stratified, and the same images whatever --seed is."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images. 'image' if not given."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the labels. 'label' if not given."}
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Symmetric label noise: this share of the training labels, from 0 to 1, is "
            "replaced by another class, each of the others equally likely. The evaluation labels "
            "stay as they are."
        },
    )
    label_noise_seed: int | None = field(
        default=None,
        metadata={"help": "Chooses the labels that the noise changes. 0 if not given."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Use this many training images, drawn at random but the same every time."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Use this many evaluation images, drawn at random but the same every time."
        },
    )
    augment: bool = field(
        default=False,
        metadata={
            "help": "Train on random crops (after padding by 1/8 of the side) and horizontal "
            "flips. Usual for natural images, wrong for digits."
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"--label_noise must be from 0 to 1, got {self.label_noise}")
        if self.label_noise_seed is not None and self.label_noise == 0:
            raise ValueError("--label_noise_seed has no effect without --label_noise")
        if self.label_noise_seed is not None and self.label_noise_seed < 0:
            raise ValueError(f"--label_noise_seed must be 0 or more, got {self.label_noise_seed}")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction must be between 0 and 1, got {self.eval_fraction}")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")
        self._check_source()

    @property
    def hub_dataset(self) -> str | None:
        """The data set's name on the Hub, if it comes from there."""
        is_local = self.dataset_name is None or Path(self.dataset_name).exists()
        return None if is_local else self.dataset_name

    def _check_source(self) -> None:
        sources = [n for n in ("dataset_name", "train_file", "train_dir") if getattr(self, n)]
        if len(sources) > 1:
            raise ValueError(f"give one of --{' and --'.join(sources)}: they are different sources")
        needs = {
            "dataset_config_name": "dataset_name",
            "train_split": "dataset_name",
            "eval_split": "dataset_name",
            "validation_file": "train_file",
            "validation_dir": "train_dir",
        }
        for name, source in needs.items():
            if getattr(self, name) is not None and source not in sources:
                raise ValueError(f"--{name} has no effect without --{source}")
        if not sources:
            for name in ("image_column", "label_column"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} has no effect on the built-in digits")
        if self.eval_fraction is not None and (
            self.dataset_name or self.validation_file or self.validation_dir
        ):
            raise ValueError(
                "--eval_fraction has no effect: this source has its own evaluation data"
            )


@dataclass
class ModelArguments:
    """Which model: a pretrained one, or a small one made from its configuration."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained model on the Hub or in a folder. Without it, an untrained model is "
            "made from the options below."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Give a pretrained model with another number of classes a new head."},
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
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the untrained model. 64 if not given."}
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of the untrained model. 4 if not given."}
    )
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Attention heads of the untrained model. 4 if not given."}
    )
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "Width of the untrained model's MLPs. Twice hidden_size if not given."},
    )

    def __post_init__(self) -> None:
        for name in MODEL_SIZES:
            value = getattr(self, name)
            if value is not None and self.model_name_or_path is not None:
                raise ValueError(f"--{name} has no effect with --model_name_or_path")
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")
        if self.ignore_mismatched_sizes and self.model_name_or_path is None:
            raise ValueError("--ignore_mismatched_sizes has no effect without --model_name_or_path")


@dataclass
class TrainArguments(SAMTrainingArguments):
    """The Trainer's options with those of SAM, and the comparison."""

    _argument_group_name = "training"

    output_dir: str = field(
        default="outputs/image_classification",
        metadata={
            "help": "Folder for the model, the image processor, the metrics and the picture. Those "
            "of an earlier run are overwritten; with its checkpoints there, the run is refused."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to go on from: a folder, or 'last' for the newest in --output_dir."
        },
    )
    compare_with_plain: bool = field(
        default=False,
        metadata={
            "help": "Afterwards train the same model from the same initial weights without SAM, "
            "with as many forward-backward passes (twice the epochs if SAM is on in every update), "
            "and report both."
        },
    )
    torch_num_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads that torch computes with; its own choice if not given. 1 is best "
            "for a tiny model: several would mostly wait for each other, above all when another "
            "program keeps a core busy."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.torch_num_threads is not None and self.torch_num_threads < 1:
            raise ValueError(f"--torch_num_threads must be 1 or more, got {self.torch_num_threads}")
        # Pinned memory speeds up the way to an accelerator. Without one, torch only warns.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.compare_with_plain and self.sam_rho == 0:
            raise ValueError("--compare_with_plain has no effect with --sam_rho 0: both are plain")

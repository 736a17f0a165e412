"""The options that the scripts share: where the examples come from, the model, the training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from common.script_utils import InputError


@dataclass
class SourceArguments:
    """A data set on the Hub, local files, or what the script has built in."""

    _argument_group_name = "data"
    # Each source with the options that have no effect without it.
    _sources: ClassVar[dict[str, tuple[str, ...]]] = {
        "dataset_name": ("dataset_config_name", "train_split", "eval_split"),
        "train_file": ("validation_file",),
    }
    _evaluation = ("dataset_name", "validation_file")  # what brings evaluation data of its own
    _built_in = "the built-in data"
    _columns = ()  # options that what is built in has no use for

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
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
        default=None, metadata={"help": "Local files with the training examples."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Local files with the evaluation examples."}
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the examples to set aside for evaluation, where the source has none "
            "of its own. 0.2 if not given. The same examples whatever --seed is."
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Use this many training examples, drawn at random but the same every time."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Use this many evaluation examples, drawn at random but the same every time."
        },
    )

    def __post_init__(self) -> None:
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction must be between 0 and 1, got {self.eval_fraction}")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")
        self._check_source()

    @property
    def source(self) -> str | None:
        """The option that names the source; None for what is built in."""
        return next((name for name in self._sources if getattr(self, name)), None)

    @property
    def hub_dataset(self) -> str | None:
        """The data set's name on the Hub, if it comes from there."""
        is_local = self.dataset_name is None or Path(self.dataset_name).exists()
        return None if is_local else self.dataset_name

    def _check_source(self) -> None:
        given = [name for name in self._sources if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of --{' and --'.join(given)}: they are different sources")
        for source, options in self._sources.items():
            for name in options:
                if getattr(self, name) is not None and source not in given:
                    raise ValueError(f"--{name} has no effect without --{source}")
        for name in self._columns:
            if not given and getattr(self, name) is not None:
                raise ValueError(f"--{name} has no effect on {self._built_in}")
        if self.eval_fraction is not None and any(getattr(self, n) for n in self._evaluation):
            raise ValueError(
                "--eval_fraction has no effect: this source has its own evaluation data"
            )


@dataclass
class LabelArguments(SourceArguments):
    """The options of examples with labels, some of which may be made wrong."""

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

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"--label_noise must be from 0 to 1, got {self.label_noise}")
        if self.label_noise_seed is not None and self.label_noise == 0:
            raise ValueError("--label_noise_seed has no effect without --label_noise")
        if self.label_noise_seed is not None and self.label_noise_seed < 0:
            raise ValueError(f"--label_noise_seed must be 0 or more, got {self.label_noise_seed}")
        super().__post_init__()


@dataclass
class ModelArguments:
    """A pretrained model, or the sizes of a small one that is made from its configuration."""

    _argument_group_name = "model"
    _sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained model on the Hub or in a folder. Without it, an untrained model is "
            "made from the options below."
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
        for name in self._sizes:
            value = getattr(self, name)
            if value is not None and self.model_name_or_path is not None:
                raise ValueError(f"--{name} has no effect with --model_name_or_path")
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")

    def encoder_sizes(self) -> dict[str, int]:
        """The sizes of the untrained model, as the configurations of transformers name them.

        Raises:
            InputError: the heads do not divide the width.
        """
        hidden_size, heads = self.hidden_size or 64, self.num_attention_heads or 4
        require_multiple("hidden_size", hidden_size, "num_attention_heads", heads)
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": self.num_hidden_layers or 4,
            "num_attention_heads": heads,
            "intermediate_size": self.intermediate_size or 2 * hidden_size,
        }


def require_multiple(name: str, size: int, part: str, parts: int) -> None:
    """Raise `InputError` for a size that the model would silently cut off."""
    if size % parts:
        raise InputError(f"--{name} {size} must be a multiple of --{part}, which is {parts}")


@dataclass
class ClassifierArguments(ModelArguments):
    """A model with a head that has an output for each class."""

    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Give a pretrained model with another number of classes a new head."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_mismatched_sizes and self.model_name_or_path is None:
            raise ValueError("--ignore_mismatched_sizes has no effect without --model_name_or_path")


@dataclass
class ScriptArguments:
    """What the scripts add to the options of training. It stands before `SAMTrainingArguments`."""

    _argument_group_name = "training"

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: a folder, or True for the newest in --output_dir."
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
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's default would make a CPU slower
        super().__post_init__()
        if self.torch_num_threads is not None and self.torch_num_threads < 1:
            raise ValueError(f"--torch_num_threads must be 1 or more, got {self.torch_num_threads}")
        # Pinned memory speeds up the way to an accelerator. Without one, torch only warns.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.compare_with_plain and self.sam_rho == 0:
            raise ValueError("--compare_with_plain has no effect with --sam_rho 0: both are plain")
        if self.compare_with_plain and self.deepspeed_plugin is not None:
            raise ValueError(
                "--compare_with_plain does not go with DeepSpeed, which trains one model in a "
                "process: give --compare_with_plain false, and train again with --sam_rho 0"
            )


@dataclass
class SharpnessArguments(ScriptArguments):
    """The options of scripts whose loss is a function of the weights and of fixed examples."""

    sharpness_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure every so many updates how sharp the loss is around the weights, on "
            "evaluation examples, log it as sharpness/* and draw it; 0: at the end alone. The "
            "seconds that are reported include it. Not with FSDP or DeepSpeed."
        },
    )
    sharpness_examples: int | None = field(
        default=None,
        metadata={
            "help": "On how many of them. 256 if not given. A measure is some 200 passes over "
            "them, in batches of --per_device_eval_batch_size."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sharpness_every", 0), ("sharpness_examples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be {least} or more, got {value}")
        if self.sharpness_examples is not None and self.sharpness_every is None:
            raise ValueError("--sharpness_examples has no effect without --sharpness_every")


@dataclass
class SearchArguments(SharpnessArguments):
    """The options of scripts that can search for sam_rho first."""

    search_rho: int = field(
        default=0,
        metadata={
            "help": "First try this many values of sam_rho with Optuna, each in a whole training "
            "on four fifths of the training data and judged on the rest; then train with the best."
        },
    )
    search_rho_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value that the search may try. If not given, a tenth of "
            "sam_rho and ten times sam_rho."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_rho < 0:
            raise ValueError(f"--search_rho must be 0 (no search) or more, got {self.search_rho}")
        if self.search_rho_range is not None:
            if self.search_rho == 0:
                raise ValueError("--search_rho_range has no effect without --search_rho")
            if len(self.search_rho_range) != 2 or not (
                0 < self.search_rho_range[0] < self.search_rho_range[1] < math.inf
            ):
                raise ValueError(
                    "--search_rho_range must be two numbers above 0, the lower first, got "
                    f"{self.search_rho_range}"
                )
        if self.search_rho and self.sam_rho == 0:
            raise ValueError("--search_rho has no effect with --sam_rho 0, which turns SAM off")
        if self.search_rho and self.resume_from_checkpoint is not None:
            raise ValueError("--search_rho cannot go with --resume_from_checkpoint: it begins anew")


def output_dir_field(default: str, saved: str) -> Any:
    """The option --output_dir of a script that saves the model and, beside it, `saved`."""
    return field(
        default=default,
        metadata={
            "help": f"Folder for the model, the {saved}, the metrics and the picture. Those of an "
            "earlier run are overwritten; with its checkpoints there, the run is refused."
        },
    )

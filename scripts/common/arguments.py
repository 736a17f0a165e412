"""The options that the scripts share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

POSITIVE = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
NOT_NEGATIVE = "learning_rate weight_decay adam_epsilon seed max_grad_norm dataloader_num_workers"
NO_EFFECT = "do_predict prediction_loss_only batch_eval_metrics label_names metric_for_best_model"
CHOOSING = {"save_strategy": "best", "lr_scheduler_type": "reduce_lr_on_plateau"}
CHOOSING |= {"load_best_model_at_end": True}


def option(help: str, default: Any = None) -> Any:
    """A field of a dataclass that is an option, with its line of `--help`."""
    return field(default=default, metadata={"help": help})


def check_range(options: Any, least: float, most: float, *names: str) -> None:
    """Raise a ValueError if one of these options is given and not in [least, most]."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            allowed = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"--{name} must be {allowed}, got {value}")


def check_used(options: Any, names: Any, is_used: bool, where: str) -> None:
    """Raise a ValueError if one of these options is given where it has no effect."""
    given = [name for name in names if getattr(options, name) not in (None, False)]
    if given and not is_used:
        raise ValueError(f"--{given[0]} has no effect {where}")


@dataclass
class DataArguments:
    """The examples: from the Hub, from files, or the script's built-in ones."""

    _argument_group_name = "data"

    dataset_name: str | None = option("Data set on the Hub or in a folder; else built-in examples.")
    dataset_config_name: str | None = option("Configuration of the data set.")
    train_split: str | None = option("Training split of the data set. 'train' if not given.")
    eval_split: str | None = option("Evaluation split of the data set. 'test' if not given.")
    train_file: list[str] | None = option("Files with the training examples.")  # noqa: RUF009
    validation_file: list[str] | None = option("Files with the evaluation examples.")  # noqa: RUF009
    eval_fraction: float | None = option(
        "Share of the training examples to evaluate on, the same for every --seed. 0.2 if needed."
    )
    max_train_samples: int | None = option("Train on a random subset, the same for every --seed.")
    max_eval_samples: int | None = option("Evaluate on a random subset, the same for every --seed.")

    def __post_init__(self) -> None:
        from sam_hf.config.file import is_missing_path  # here, since it takes seconds to import

        if self.dataset_name is not None and is_missing_path(self.dataset_name):
            raise ValueError(f"--dataset_name: there is no folder {self.dataset_name!r}")
        hub = ("dataset_config_name", "train_split", "eval_split")
        check_used(self, hub, self.dataset_name is not None, "without --dataset_name")
        check_used(self, ["validation_file"], self.train_file is not None, "without --train_file")
        check_used(self, ["train_file"], self.dataset_name is None, "with --dataset_name")
        has_own = self.eval_split is not None or self.validation_file is not None
        check_used(self, ["eval_fraction"], not has_own, "on evaluation data that is given")
        check_range(self, 1, math.inf, "max_train_samples", "max_eval_samples")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction must be between 0 and 1, got {self.eval_fraction}")

    @property
    def is_built_in(self) -> bool:
        return self.dataset_name is None and self.train_file is None

    @property
    def hub_dataset(self) -> str | None:
        return None if Path(self.dataset_name or ".").exists() else self.dataset_name


@dataclass
class LabeledDataArguments(DataArguments):
    """Examples with labels, and optional label noise."""

    label_column: str | None = option("Column with the labels. 'label' if not given.")
    label_noise: float = option(
        "Share of the training labels that is replaced by another class, drawn uniformly.", 0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, 1, "label_noise")
        check_used(self, ["label_column"], not self.is_built_in, "on the built-in examples")

    def title(self, name: str) -> str:
        """The data's name, with the label noise."""
        return f"{name}, {100 * self.label_noise:g}% label noise" if self.label_noise else name


@dataclass
class ModelArguments:
    """A pretrained model, or a small untrained one."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option("Pretrained model on the Hub or in a folder.")
    config_overrides: str | None = option(
        "Configuration of the untrained model, such as hidden_size=128,num_hidden_layers=4."
    )

    def __post_init__(self) -> None:
        from sam_hf.config.file import is_missing_path

        name = self.model_name_or_path
        if name is not None and is_missing_path(name):
            raise ValueError(f"--model_name_or_path: there is no folder {name!r}")
        check_used(self, ["config_overrides"], not name, "with --model_name_or_path")


@dataclass
class ClassifierArguments(ModelArguments):
    """A model with one output for each class."""

    ignore_mismatched_sizes: bool = option("Replace a head with other classes.", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_pretrained = self.model_name_or_path is not None
        check_used(self, ["ignore_mismatched_sizes"], is_pretrained, "without --model_name_or_path")


@dataclass
class ScriptArguments:
    """Options in addition to those of training. Precedes `SAMTrainingArguments` in the MRO."""

    _argument_group_name = "script"

    resume_from_checkpoint: str | None = option("Checkpoint, or True: newest in --output_dir.")
    compare_with_plain: bool = option(
        "Also train the same initial model without SAM, for the same number of passes.", False
    )
    torch_num_threads: int | None = option("CPU threads of torch. 1 is best for a tiny model.")

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's default would make a CPU slower
        super().__post_init__()
        # Pinned memory speeds up copies to an accelerator. Without one, torch only warns.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        check_used(self, ["compare_with_plain"], self.sam_rho != 0, "with --sam_rho 0")
        check_used(self, ["fp16"], self.device.type != "cpu", "without a GPU: choose --bf16")
        # The Trainer accepts smaller values, and fails late or trains nothing.
        check_range(self, 1, math.inf, "torch_num_threads", *POSITIVE.split())
        check_range(self, 0, math.inf, *NOT_NEGATIVE.split())
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"--num_train_epochs must be above 0, got {self.num_train_epochs}")
        for name, value in CHOOSING.items():
            if getattr(self, name) == value:
                raise ValueError(f"--{name} {value} would select the model on the test data")
        check_used(self, NO_EFFECT.split(), False, "in this script, which reports the final model")
        if self.compare_with_plain and self.deepspeed_plugin is not None:
            raise ValueError("--compare_with_plain is not supported with DeepSpeed")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and self.world_size == 1:
            raise ValueError("several processes without a GPU each train alone: give --use_cpu")


@dataclass
class SharpnessArguments(ScriptArguments):
    """The options of scripts whose loss is a function of the weights on fixed examples."""

    sharpness_every: int | None = option(
        "Measure sharpness every N updates; 0: at the end. Takes about a tenth of the passes."
    )
    sharpness_examples: int | None = option("Examples to measure it on; default: as many as fit.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, math.inf, "sharpness_every")
        check_range(self, 1, math.inf, "sharpness_examples")
        is_measured = self.sharpness_every is not None
        check_used(self, ["sharpness_examples"], is_measured, "without --sharpness_every")

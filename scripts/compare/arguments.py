"""The options of `compare_methods.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from compare.data import TUNING_SEEDS

TEXT_TASKS = ("trec6", "cola", "rte", "sst2")
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class ComparisonArguments:
    """What to compare, on what, and where to write it."""

    _argument_group_name = "comparison"

    task: Literal["digits", "cifar10", "trec6", "cola", "rte", "sst2"] = field(
        default="digits",
        metadata={
            "help": "digits: scikit-learn's, a small ViT. cifar10: parquet files, a WRN or a small "
            "ViT. The others: parquet files, a pretrained encoder."
        },
    )
    recipes: list[str] | None = field(
        default=None,
        metadata={"help": "Only these, and plain. All of --recipes_file if not given."},
    )
    recipes_file: str = field(
        default=str(CONFIGS / "compare_methods.yaml"), metadata={"help": "YAML with the recipes."}
    )
    rho_file: str | None = field(
        default=None,
        metadata={
            "help": "What --tune found; --tune writes it. configs/compare_methods_TASK_rho.json if "
            "not given."
        },
    )
    reference: str = field(
        default="sam", metadata={"help": "The recipe whose gain the others are to have a share of."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "At least two."}
    )
    label_noise: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of wrong training labels. 0 0.2 0.4 0.6 for digits, 0 0.4 for cifar10 "
            "and 0 0.2 for texts if not given."
        },
    )
    train_fraction: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Shares of the training examples, drawn by the seed with equal shares of each "
            "class; each with each kind of labels is a level."
        },
    )
    sharpness: bool = field(
        default=False,
        metadata={"help": "Measure how sharp each final model is, on 256 training examples."},
    )
    tune: bool = field(default=False, metadata={"help": "Search for each rho. No table."})
    from_json: str | None = field(
        default=None,
        metadata={"help": "Make the table and the picture of this file of results. No training."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "outputs/compare_methods/TASK if not given."}
    )
    num_workers: int = field(
        default=1, metadata={"help": "Runs at a time, each in a process. Costs are measured alone."}
    )
    torch_num_threads: int = field(default=1, metadata={"help": "CPU threads of each process."})
    use_cpu: bool = field(
        default=not torch.cuda.is_available(), metadata={"help": "Do not use the GPU."}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bf16."})
    timing_rounds: int = field(
        default=7,
        metadata={"help": "Rounds in which times are taken. 0: times and memory are left out."},
    )
    timing_updates: int = field(default=40, metadata={"help": "Updates of a recipe in a round."})
    num_train_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Of the plain schedule. 64 for digits, 30 for cifar10, 5 for texts, 3 for sst2."
        },
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "128 for images and 32 for texts if not given."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "AdamW: 2e-3 for digits, 1e-3 for a ViT on cifar10, 5e-5 for texts. SGD: 0.1 "
            "for a WRN."
        },
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that prepare examples, for many of them."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use so many training examples, always the same."}
    )


@dataclass
class FileArguments:
    """The options of tasks whose data are in files: all but digits."""

    _argument_group_name = "files"

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Parquet files with the training examples and labels."}
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parquet files with the test examples and labels. For tasks of GLUE its "
            "validation set: the labels of its test set are hidden."
        },
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use so many test examples, always the same."}
    )


@dataclass
class TextArguments:
    """The options of the tasks with texts alone."""

    _argument_group_name = "texts"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained encoder: a folder, or a name on the Hub."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer texts, or pairs, are cut to so many tokens. 64 for trec6 and cola, 80 "
            "for sst2, 256 for rte if not given."
        },
    )


@dataclass
class CifarArguments:
    """The options of --task cifar10 alone."""

    _argument_group_name = "cifar10"

    model: Literal["wrn", "vit"] | None = field(
        default=None, metadata={"help": "wrn (if not given): a Wide-ResNet. vit: a small ViT."}
    )
    patch_size: int = field(
        default=4, metadata={"help": "Of the ViT: side of its patches. 8 costs a quarter of 4."}
    )
    image_column: str = field(default="img", metadata={"help": "Column with the images."})
    augment: bool = field(
        default=True, metadata={"help": "Train on random crops and horizontal flips."}
    )
    labels_file: str | None = field(
        default=None,
        metadata={
            "help": "Parquet file with labels that people gave (CIFAR-10N), a row for each "
            "training image. Levels of noise beside those of --label_noise, if it is given."
        },
    )
    label_column: list[str] | None = field(
        default=None, metadata={"help": "Columns of --labels_file; each is a level of noise."}
    )
    depth: int = field(default=10, metadata={"help": "Of the WRN: 6 n + 4."})
    width: int = field(default=1, metadata={"help": "Of the WRN; 16-8 is a common size."})
    dropout: float = field(default=0.0, metadata={"help": "Of the WRN's blocks."})


@dataclass
class Options(TextArguments, CifarArguments, FileArguments, ComparisonArguments):
    """All of them. The fields are checked here, since one often depends on another."""

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"outputs/compare_methods/{self.task}"
        self.rho_file = self.rho_file or str(CONFIGS / f"compare_methods_{self.task}_rho.json")
        self._check_ranges()
        self._check_task()
        if (self.labels_file is None) != (self.label_column is None):
            raise ValueError("--labels_file and --label_column go together: give both or none")
        if self.tune and (self.label_noise is not None or self.from_json):
            name = "from_json" if self.from_json else "label_noise"
            raise ValueError(f"--{name} does not go with --tune, which has its own noise level")
        if self.tune and self.sharpness:
            raise ValueError("--sharpness does not go with --tune: the final models are measured")
        if self.tune and len(self.train_fraction) > 1:
            raise ValueError(f"--train_fraction {self.train_fraction}: --tune takes one of them")

    def _check_task(self) -> None:
        is_text = self.task in TEXT_TASKS
        groups = (
            (self.task != "digits", FileArguments, "a task whose data are in files"),
            (self.task == "cifar10", CifarArguments, "--task cifar10"),
            (is_text, TextArguments, f"--task {', '.join(TEXT_TASKS[:-1])} or {TEXT_TASKS[-1]}"),
        )
        for has_them, group, what in groups:
            for f in fields(group):
                if not has_them and getattr(self, f.name) != f.default:
                    raise ValueError(f"--{f.name} has no effect without {what}")
        sizes = {"wrn": ("depth", "width", "dropout"), "vit": ("patch_size",)}
        for owner, names in sizes.items():
            for name in names if owner != (self.model or "wrn") else ():
                if getattr(self, name) != getattr(CifarArguments, name):
                    raise ValueError(f"--{name} has no effect without --model {owner}")
        if self.task != "digits" and not self.from_json:
            for name in ("train_file", "validation_file"):
                if getattr(self, name) is None:
                    raise ValueError(f"--task {self.task} needs --{name}, parquet files")
        if is_text and not self.from_json and self.model_name_or_path is None:
            raise ValueError(
                f"--task {self.task} needs --model_name_or_path, a pretrained encoder: a folder, "
                "or a name on the Hub"
            )

    def _check_ranges(self) -> None:
        least = {
            "num_workers": 1,
            "torch_num_threads": 1,
            "timing_rounds": 0,
            "timing_updates": 1,
            "dataloader_num_workers": 0,
            "per_device_train_batch_size": 1,
            "max_train_samples": 1,
            "max_eval_samples": 1,
            "max_length": 8,
            "patch_size": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} must be {low} or more, got {value}")
        for name in ("num_train_epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}")
        for name in ("seeds", "label_noise", "train_fraction", "label_column"):
            values = getattr(self, name)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"--{name} {values}: a value stands there twice")
        if len(self.seeds) < 2 or min(self.seeds) < 0:
            raise ValueError(f"--seeds must be two or more numbers from 0 up, got {self.seeds}")
        if set(self.seeds) & set(TUNING_SEEDS):
            raise ValueError(f"--seeds {self.seeds}: {TUNING_SEEDS} are those that rho is tuned on")
        for noise in self.label_noise or ():
            if not 0 <= noise <= 1:
                raise ValueError(f"--label_noise must be from 0 to 1, got {noise}")
        for fraction in self.train_fraction:
            if not 0 < fraction <= 1:
                raise ValueError(f"--train_fraction must be above 0 and at most 1, got {fraction}")

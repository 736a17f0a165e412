"""The options of `compare_methods.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from comparison_tasks import TUNING_SEEDS

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass
class ComparisonArguments:
    """What to compare, on what, and where to write it."""

    _argument_group_name = "comparison"

    task: Literal["digits", "cifar10"] = field(
        default="digits",
        metadata={"help": "digits: scikit-learn's, a small ViT. cifar10: parquet files, a WRN."},
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
            "help": "Shares of wrong training labels. 0 0.2 0.4 0.6 for digits and 0 0.4 for "
            "cifar10 if not given."
        },
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
    timing_rounds: int = field(default=7, metadata={"help": "Rounds in which times are taken."})
    timing_updates: int = field(default=40, metadata={"help": "Updates of a recipe in a round."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Of the plain schedule. 64 for digits, 30 for cifar10."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "128 if not given."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "2e-3 (AdamW) for digits, 0.1 (SGD) for cifar10."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that prepare images, for many of them."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use so many training images, always the same."}
    )


@dataclass
class CifarArguments:
    """The options of --task cifar10 alone."""

    _argument_group_name = "cifar10"

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Parquet files with the training images and labels."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Parquet files with the test images and labels."}
    )
    image_column: str = field(default="img", metadata={"help": "Column with the images."})
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
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use so many test images, always the same."}
    )
    depth: int = field(default=10, metadata={"help": "Of the WRN: 6 n + 4."})
    width: int = field(default=1, metadata={"help": "Of the WRN; 16-8 is a common size."})
    dropout: float = field(default=0.0, metadata={"help": "Of the WRN's blocks."})


@dataclass
class Options(CifarArguments, ComparisonArguments):
    """Both. The fields are checked here, since one often depends on another."""

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"outputs/compare_methods/{self.task}"
        self.rho_file = self.rho_file or str(CONFIGS / f"compare_methods_{self.task}_rho.json")
        self._check_ranges()
        cifar = [f for f in fields(CifarArguments) if getattr(self, f.name) != f.default]
        if self.task != "cifar10" and cifar:
            raise ValueError(f"--{cifar[0].name} has no effect without --task cifar10")
        if self.task == "cifar10" and not self.from_json:
            for name in ("train_file", "validation_file"):
                if getattr(self, name) is None:
                    raise ValueError(f"--task cifar10 needs --{name}, parquet files")
        if (self.labels_file is None) != (self.label_column is None):
            raise ValueError("--labels_file and --label_column go together: give both or none")
        if self.tune and (self.label_noise is not None or self.from_json):
            name = "from_json" if self.from_json else "label_noise"
            raise ValueError(f"--{name} does not go with --tune, which has its own noise level")

    def _check_ranges(self) -> None:
        least = {
            "num_workers": 1,
            "torch_num_threads": 1,
            "timing_rounds": 1,
            "timing_updates": 1,
            "dataloader_num_workers": 0,
            "per_device_train_batch_size": 1,
            "max_train_samples": 1,
            "max_eval_samples": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} must be {low} or more, got {value}")
        for name in ("num_train_epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}")
        for name in ("seeds", "label_noise", "label_column"):
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

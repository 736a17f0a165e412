"""The options of `compare_methods.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from common.arguments import check_range, option

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT_TASKS = ("trec6", "cola", "rte", "sst2")
SERIES_MODELS = ("samformer", "patchtsmixer", "patchtst")
# The search for rho: its seeds, and the share of the training examples that it is scored on.
TUNING_SEEDS, VALIDATION_SHARE = (100, 101, 102), 0.2
# Options that have no effect on other tasks or models.
OF_FILES = ("train_file", "validation_file", "max_eval_samples")
OF_TEXTS = ("model_name_or_path", "max_length")
OF_SERIES = ("data_file", "config", "prediction_lengths", "config_overrides")
OF_CLASSES = ("label_noise", "train_fraction", "max_train_samples")
OF_CIFAR10 = ("patch_size", "augment", "labels_file", "label_column", "depth", "width")
OF_REPORTS = ("from_json", "recipes", "reference", "output_dir", "task")


@dataclass
class Options:
    """What is compared, on what data, and where the results are written."""

    _argument_group_name = "comparison"

    task: Literal["digits", "cifar10", "forecasting", "trec6", "cola", "rte", "sst2"] = option(
        "digits: scikit-learn's digits, a small ViT. cifar10: parquet files, a Wide-ResNet or a "
        "small ViT. forecasting: a series, a forecaster. The others: parquet files, a pretrained "
        "encoder.",
        default="digits",
    )
    recipes: list[str] | None = option("Compare these recipes and plain training. Default: all.")
    recipes_file: str = option("YAML file.", default=str(CONFIGS / "compare_methods.yaml"))
    rho_file: str | None = option(
        "Result of --tune. configs/compare_methods_TASK_rho.json if not given."
    )
    rho: list[str] | None = option(
        "NAME=RHO of recipes without one, in place of --rho_file: sam=0.7 msam=2.8."
    )
    reference: str | None = option(
        "Recipe whose gain the others are a share of. If not given, sam, or without it the first."
    )
    seeds: list[int] | None = option("Two seeds or more. 0 1 2 3 4 if not given.")
    label_noise: list[float] | None = option(
        "Shares of wrong training labels. 0 0.2 0.4 0.6 for digits, 0 0.4 for cifar10 and 0 0.2 "
        "for texts if not given."
    )
    train_fraction: list[float] | None = option(
        "Shares of the training examples, drawn by the seed, each with each label noise. 1 if not "
        "given."
    )
    sharpness: bool = option(
        "Measure the sharpness of each final model on 256 training examples.", default=False
    )
    tune: bool = option("Search for rho instead of comparing the recipes.", default=False)
    from_json: str | None = option("Make tables and pictures of this results file, do not train.")
    output_dir: str | None = option("outputs/compare_methods/TASK if not given.")
    num_workers: int = option("Runs at a time. Costs are measured one at a time.", default=1)
    torch_num_threads: int = option("CPU threads of each run.", default=1)
    use_cpu: bool = option("Do not use the GPU.", default=not torch.cuda.is_available())
    bf16: bool = option("Train in bf16 (mixed precision).", default=False)
    timing_rounds: int = option("Times each recipe is timed. 0: costs are left out.", default=7)
    timing_updates: int = option("Updates of a recipe in a round.", default=40)
    num_train_epochs: float | None = option(
        "Of plain training. 64 for digits, 30 for cifar10, 3 for sst2, 5 for other texts, for "
        "forecasting that of --config if not given."
    )
    per_device_train_batch_size: int | None = option(
        "128 for images, 32 for texts, for forecasting that of --config if not given."
    )
    learning_rate: float | None = option(
        "2e-3 for digits, 1e-3 for a ViT and 0.1 (SGD) for a Wide-ResNet on cifar10, 5e-5 for "
        "texts, for forecasting that of --config if not given."
    )
    dataloader_num_workers: int = option("Processes that load the data of a run.", default=0)
    max_train_samples: int | None = option("Train on a random subset, the same for every seed.")
    max_eval_samples: int | None = option("Evaluate on a random subset, the same for every seed.")
    train_file: list[str] | None = option("Parquet files with the training examples.")
    validation_file: list[str] | None = option(
        "Parquet files with the test examples: of GLUE, the validation set, which has labels."
    )
    model_name_or_path: str | None = option("Texts: pretrained encoder on the Hub or in a folder.")
    max_length: int | None = option(
        "Texts are cut to this many tokens. 64 for trec6 and cola, 80 for sst2, 256 for rte if not "
        "given."
    )
    model: Literal["wrn", "vit", "samformer", "patchtsmixer", "patchtst"] | None = option(
        "cifar10: a Wide-ResNet (wrn, if not given) or a small ViT. forecasting: one of the "
        "others, that of --config if not given."
    )
    data_file: str | None = option("forecasting: CSV or parquet file, a row for each time step.")
    config: str = option(
        "forecasting: YAML file of train_forecasting.py, in the folder configs.",
        default="etth1_samformer.yaml",
    )
    prediction_lengths: list[int] | None = option(
        "forecasting: time steps that are forecast; each is a level. 96 if not given."
    )
    config_overrides: str | None = option("forecasting: d_model=16,num_layers=2.")
    patch_size: int = option("cifar10: side of the ViT's patches.", default=4)
    augment: bool = option("cifar10: train on random crops and flips.", default=True)
    labels_file: str | None = option(
        "cifar10: parquet file with human labels (CIFAR-10N), one row for each training image."
    )
    label_column: list[str] | None = option(
        "cifar10: columns of --labels_file, each a level of label noise. With --label_noise in "
        "addition to its levels."
    )
    depth: int = option("cifar10: depth of the Wide-ResNet, 6 n + 4.", default=10)
    width: int = option("cifar10: width of the Wide-ResNet.", default=1)

    def __post_init__(self) -> None:
        self._check_used()
        self.seeds = self.seeds or [0, 1, 2, 3, 4]
        self.train_fraction = self.train_fraction or [1.0]
        self._check_ranges()
        self.prediction_lengths = self.prediction_lengths or [96]
        needed = ["data_file"] if self.task == "forecasting" else []
        needed += ["train_file", "validation_file"] if self.task in (*TEXT_TASKS, "cifar10") else []
        needed += ["model_name_or_path"] if self.task in TEXT_TASKS else []
        for name in needed if self.from_json is None else ():
            if getattr(self, name) is None:
                raise ValueError(f"--task {self.task} needs --{name}")
        if (self.labels_file is None) != (self.label_column is None):
            raise ValueError("--labels_file and --label_column need each other")
        if self.tune and len(self.train_fraction) > 1:
            raise ValueError(f"--tune takes one --train_fraction, got {self.train_fraction}")
        self.output_dir = self.output_dir or f"outputs/compare_methods/{self.task}"
        self.rho_file = self.rho_file or str(CONFIGS / f"compare_methods_{self.task}_rho.json")

    @property
    def rhos(self) -> dict[str, float]:
        """By the names of the recipes, of `rho`."""
        try:
            pairs = [text.rpartition("=")[::2] for text in self.rho or ()]
            found = {name: float(rho) for name, rho in pairs}
        except ValueError:
            raise ValueError(f"--rho takes NAME=NUMBER, got {self.rho}") from None
        if any(not 0 < rho < math.inf for rho in found.values()):
            raise ValueError(f"--rho must be above 0 and finite, got {self.rho}")
        return found

    def _check_ranges(self) -> None:
        _ = self.rhos
        check_range(self, 0, math.inf, "timing_rounds", "dataloader_num_workers")
        from_1 = ("num_workers", "torch_num_threads", "timing_updates", "patch_size", "width")
        from_1 += ("per_device_train_batch_size", "max_train_samples", "max_eval_samples")
        check_range(self, 1, math.inf, *from_1)
        check_range(self, 8, math.inf, "max_length")
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"--depth must be 10, 16, 22, ... (6 n + 4), got {self.depth}")
        for name in ("num_train_epochs", "learning_rate"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("label_noise", "train_fraction"):
            values = getattr(self, name) or []
            if any(not 0 <= value <= 1 for value in values):
                raise ValueError(f"--{name} must be from 0 to 1, got {values}")
        for name in (
            "seeds",
            "label_noise",
            "train_fraction",
            "label_column",
            "prediction_lengths",
        ):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {values}: a value appears twice")
        if len(self.seeds) < 2 or min(self.seeds) < 0 or set(self.seeds) & set(TUNING_SEEDS):
            allowed = f"two or more numbers from 0 up, without {TUNING_SEEDS}, which tune rho"
            raise ValueError(f"--seeds must be {allowed}, got {self.seeds}")

    def _check_used(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}

        def check(names: Sequence[str], is_used: bool, where: str) -> None:
            given = [name for name in names if getattr(self, name) != defaults[name]]
            if given and not is_used:
                raise ValueError(f"--{given[0]} has no effect {where}")

        model, is_text = self.model or "wrn", self.task in TEXT_TASKS
        is_series = self.task == "forecasting"
        check(OF_SERIES, is_series, "without --task forecasting")
        check(OF_CLASSES, not is_series, "with --task forecasting")
        models = {"cifar10": ("wrn", "vit"), "forecasting": SERIES_MODELS}.get(self.task, ())
        check(("model",), model in models, f"with --task {self.task}")
        check(OF_FILES, self.task in (*TEXT_TASKS, "cifar10"), f"with --task {self.task}")
        check(OF_CIFAR10, self.task == "cifar10", "without --task cifar10")
        check(OF_TEXTS, is_text, f"without --task {', '.join(TEXT_TASKS[:-1])} or {TEXT_TASKS[-1]}")
        check(("patch_size",), model == "vit", "without --model vit")
        check(("depth", "width"), model == "wrn", "with --model vit")
        others = [name for name in defaults if name not in OF_REPORTS]
        check(others, self.from_json is None, "with --from_json")
        check(("label_noise", "sharpness", "rho"), not self.tune, "with --tune")
        check(("rho_file",), not self.rho, "with --rho")

"""Forecasting as a task of a comparison: the data, model and schedule of `train_forecasting.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import train_forecasting as forecasting
from common.cli import OptionParser
from compare.arguments import CONFIGS
from compare.measures import SHARPNESS
from torch.utils.data import Subset
from transformers import PreTrainedModel, set_seed

LEVEL = "all"  # of one horizon: a series has no label noise
# Options of the script that decide how it trains.
TRAINING = "num_train_epochs per_device_train_batch_size learning_rate weight_decay "
TRAINING += "lr_scheduler_type warmup_steps optim max_grad_norm dataloader_drop_last"


@dataclass
class ForecastingOptions:
    """What is trained and how, and what `compare.runs` reads of the options of any task.

    Args:
        config: YAML file of `train_forecasting.py`, in the folder `configs`.
        arguments: further options of that script, which win over those of the file.
        prediction_lengths: each is a level; if empty, there is one level, of the script's option.
    """

    data_file: str
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    prediction_lengths: Sequence[int] = ()
    num_workers: int = 1
    torch_num_threads: int = 1
    use_cpu: bool = not torch.cuda.is_available()
    bf16: bool = False
    dataloader_num_workers: int = 0
    sharpness: bool = False


class ForecastingTask:
    """Windows of a series. The score is the test MSE of the final model: lower is better.

    While rho is tuned, the validation part is scored. The interface is that of `compare.Task`.
    """

    metric, measures, lower_is_better = "mse", ("mse", "mae"), True
    shifted_key = "next_season_mse"
    processor = None

    def __init__(self, options: ForecastingOptions) -> None:
        kinds = (forecasting.DataArguments, forecasting.ForecasterArguments)
        parser = OptionParser((*kinds, forecasting.TrainArguments))
        parser.set_defaults(**forecasting.DEFAULTS)
        arguments = {**options.arguments, "data_file": options.data_file}
        tokens = [f"--{name}={value}" for name, value in arguments.items()]
        tokens += ["--use_cpu"] if options.use_cpu else []
        data, self._model, args = parser.parse([str(CONFIGS / options.config), *tokens])
        lengths = {f"{length} steps": length for length in options.prediction_lengths}
        self._sizes, self._parts, windows = {}, {}, {}
        for level, length in (lengths or {LEVEL: data.prediction_length}).items():
            frame, parts = forecasting.load_data(replace(data, prediction_length=length))
            sizes = {"context_length": data.context_length, "num_input_channels": frame.shape[1]}
            self._sizes[level] = {**sizes, "prediction_length": length}
            # What is forecast after the test part, which nothing else uses.
            first, end = parts[-1].indices[-1] + length, len(frame) - data.context_length - length
            parts.append(Subset(parts[-1].dataset, range(first, end + 1)))
            self._parts[level] = parts
            windows[level] = [len(part) for part in parts]
        values = {name: getattr(args, name) for name in TRAINING.split()}
        recorded = {name: getattr(value, "value", value) for name, value in values.items()}
        # A batch is a dictionary, not a list of examples.
        batches = {"remove_unused_columns": False, "label_names": ["future_values"]}
        self.training, self.eval_batch = recorded | batches, args.per_device_eval_batch_size
        self.trainer_options = {
            "data_collator": dict,
            "compute_metrics": forecasting.errors,
            # PatchTSMixer and PatchTST give more than the forecast.
            "preprocess_logits_for_metrics": lambda o, _: o[0] if isinstance(o, tuple) else o,
        }
        self.levels = dict.fromkeys(self._parts, (0.0, 1.0))
        series = hashlib.sha256(frame.to_numpy("float32").tobytes()).hexdigest()[:16]
        model = {"name": self._model.model, "overrides": self._model.config_overrides}
        self.settings = {"task": "forecasting", "metric": self.metric, "training": recorded}
        self.settings |= {"file": Path(options.data_file).stem, "series": series, "model": model}
        self.settings |= {"sizes": self._sizes, "windows": windows}
        self.settings |= {} if options.use_cpu else {"device": "gpu"}
        self.settings |= {"sharpness": SHARPNESS} if options.sharpness else {}

    @property
    def has_prefixes(self) -> bool:
        """Whether a shorter training is the beginning of a longer one."""
        return self.training["lr_scheduler_type"] == "constant"

    def model(self, seed: int, level: str) -> PreTrainedModel:
        """The same initial weights for the same seed."""
        set_seed(seed)
        return forecasting.build_model(self._model, self._sizes[level])

    def sets(self, level: str, seed: int, is_tuning: bool) -> tuple[Subset, Subset]:
        """The training windows, and those that are scored."""
        train, validation, test, _ = self._parts[level]
        return train, validation if is_tuning else test

    def plain_examples(self, level: str, seed: int) -> Subset:
        """The training windows."""
        return self._parts[level][0]

    def curve_sets(self, level: str) -> dict[str, Subset]:
        """What is scored after each epoch."""
        return dict(zip(("validation", "test"), self._parts[level][1:3], strict=True))

    def shifted_sets(self, level: str) -> dict[str, Subset]:
        """The windows after the test part, if there are any: the next season."""
        rest = self._parts[level][3]
        return {"next season": rest} if len(rest) else {}

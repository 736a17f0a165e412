"""Forecasting as a task of a comparison: the data, model and schedule of `train_forecasting.py`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
import train_forecasting as forecasting
from common.cli import OptionParser
from compare.arguments import CONFIGS
from torch.utils.data import Subset
from transformers import PreTrainedModel, set_seed

LEVEL = "all"  # a series has no label noise
# Options of the script that decide how it trains.
TRAINING = "num_train_epochs per_device_train_batch_size learning_rate weight_decay "
TRAINING += "lr_scheduler_type warmup_steps optim max_grad_norm dataloader_drop_last"


@dataclass
class ForecastingOptions:
    """What is trained and how, and what `compare.runs` reads of the options of any task.

    Args:
        config: YAML file of `train_forecasting.py`, in the folder `configs`.
        arguments: further options of that script, which win over those of the file.
    """

    data_file: str
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
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
    processor = None

    def __init__(self, options: ForecastingOptions) -> None:
        arguments = {**options.arguments, "data_file": options.data_file}
        tokens = [f"--{name}={value}" for name, value in arguments.items()]
        tokens += ["--use_cpu"] if options.use_cpu else []
        kinds = (forecasting.DataArguments, forecasting.ForecasterArguments)
        parser = OptionParser((*kinds, forecasting.TrainArguments))
        parser.set_defaults(**forecasting.DEFAULTS)
        data, self._model, args = parser.parse([str(CONFIGS / options.config), *tokens])
        frame, self._parts = forecasting.load_data(data)
        self._sizes = {"context_length": data.context_length, "num_input_channels": frame.shape[1]}
        self._sizes["prediction_length"] = data.prediction_length
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
        self.levels = {LEVEL: (0.0, 1.0)}
        series = hashlib.sha256(frame.to_numpy("float32").tobytes()).hexdigest()[:16]
        model = {"name": self._model.model, "overrides": self._model.config_overrides}
        self.settings = {"task": "forecasting", "metric": self.metric, "training": recorded}
        self.settings |= {"model": {**model, **self._sizes}, "series": series}
        names = ("training_windows", "validation_windows", "test_windows")
        self.settings |= {name: len(part) for name, part in zip(names, self._parts, strict=True)}
        self.settings |= {} if options.use_cpu else {"device": "gpu"}

    def model(self, seed: int) -> PreTrainedModel:
        """The same initial weights for the same seed."""
        set_seed(seed)
        return forecasting.build_model(self._model, self._sizes)

    def sets(self, level: str, seed: int, is_tuning: bool) -> tuple[Subset, Subset]:
        """The training windows, and those that are scored."""
        train, validation, test = self._parts
        return train, validation if is_tuning else test

    def corrupted_sets(self) -> dict[str, Any]:
        return {}

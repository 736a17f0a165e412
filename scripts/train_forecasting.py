"""Train a time series forecaster with SAM or ASAM, on a CSV or parquet file of your own.

Examples:
    python scripts/train_forecasting.py
    python scripts/train_forecasting.py configs/etth1_samformer.yaml --data_file path/to/ETTh1.csv
    python scripts/train_forecasting.py --data_file path/to/series.parquet --columns load price \\
        --context_length 336 --prediction_length 96 --model patchtst --sam_rho 0.1

The model sees a window of the series, in all channels, and forecasts what follows. It is validated
during the training and tested at the end; errors are those of standardised values. Without a file,
the series is a short one that ships inside statsmodels. The options may come from a YAML file, from
the command line, or from both: the command line wins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common.experiment import build_trainer, prepare, publish, show_results, train_and_compare
from common.forecasting_data import DataArguments, ForecastingData, collate, load_data
from common.samformer import SAMformerConfig, SAMformerForPrediction
from common.script_utils import InputError, OptionParser, run_script
from common.shared_arguments import SharpnessArguments, output_dir_field
from common.training_utils import Run
from torch.utils.data import Subset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PatchTSMixerConfig,
    PatchTSMixerForPrediction,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from sam_hf import SAMTrainer, SAMTrainingArguments

# What the parser takes where neither the command line nor a YAML file says otherwise.
DEFAULTS = {
    "num_train_epochs": 50,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "no",
}
HEADS = 4  # of PatchTST


@dataclass
class ModelArguments:
    """Which model. All are made untrained, from their configuration."""

    _argument_group_name = "model"

    model: Literal["samformer", "patchtsmixer", "patchtst"] = field(
        default="samformer", metadata={"help": "Architecture of the forecaster."}
    )
    d_model: int | None = field(
        default=None,
        metadata={"help": "Width; of the queries and keys of SAMformer. 16 if not given."},
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of PatchTSMixer and PatchTST. 3 if not given."}
    )
    patch_length: int | None = field(
        default=None,
        metadata={"help": "Time steps in a patch of PatchTSMixer and PatchTST. 16 if not given."},
    )

    def __post_init__(self) -> None:
        for name in ("d_model", "num_hidden_layers", "patch_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")
            if value is not None and name != "d_model" and self.model == "samformer":
                raise ValueError(f"--{name} has no effect on --model samformer")
        if self.model == "patchtst" and (self.d_model or HEADS) % HEADS:
            raise ValueError(
                f"--d_model {self.d_model} must be a multiple of {HEADS}, the heads of PatchTST"
            )


@dataclass
class TrainArguments(SharpnessArguments, SAMTrainingArguments):
    """The Trainer's options with those of SAM, the comparison and early stopping."""

    output_dir: str = output_dir_field("outputs/forecasting", "forecasts")
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when the validation loss has not improved in this many evaluations, and "
            "take the weights of the best one. Checkpoints are kept in --output_dir."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        patience = self.early_stopping_patience
        if patience is not None and patience < 1:
            raise ValueError(f"--early_stopping_patience must be 1 or more, got {patience}")
        if patience is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError("--early_stopping_patience needs --eval_strategy epoch or steps")
        if self.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end: give --early_stopping_patience instead")

    def set_for_forecasting(self) -> None:
        """Set what the windows and early stopping need, once the user's own options are checked."""
        self.remove_unused_columns = False  # a batch is not a list of examples
        self.label_names = ["future_values"]
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
            self.metric_for_best_model, self.greater_is_better = "eval_loss", False
            self.save_strategy = SaveStrategy(self.eval_strategy)
            self.save_steps = self.eval_steps
            self.save_total_limit = self.save_total_limit or 1


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, test, compare, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    parser.set_defaults(**DEFAULTS)
    data_args, model_args, training_args = parser.parse(argv)
    resume_from = prepare(training_args, data_args)
    training_args.set_for_forecasting()

    data = load_data(data_args)
    set_seed(training_args.seed)
    model = build_model(model_args, *data_args.lengths, channels=data.frame.shape[1])
    if training_args.process_index == 0:
        print(data.describe())

    def build(args: TrainArguments, model: PreTrainedModel) -> SAMTrainer:
        patience = args.early_stopping_patience
        return build_trainer(
            SAMTrainer,
            args,
            model=model,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=collate,
            compute_metrics=compute_errors,
            preprocess_logits_for_metrics=keep_forecast,
            callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
        )

    trainer, runs = train_and_compare(
        build,
        model,
        training_args,
        resume_from,
        ("mse", "mae"),
        details={
            "data": data.describe(),
            "data_arguments": asdict(data_args),
            "model_arguments": asdict(model_args),
        },
        test_dataset=data.test,
    )
    plot_forecasts(trainer, data)
    show_results(trainer, runs, data.name, "model, forecasts.png")
    tags = ["time-series-forecasting", "sam_hf"]
    publish(trainer, {"tasks": tags[0], "tags": tags, "dataset": data.name})
    return runs


def build_model(
    args: ModelArguments, context_length: int, prediction_length: int, channels: int
) -> PreTrainedModel:
    """The untrained model.

    Raises:
        InputError: a patch is as long as the context.
    """
    sizes: dict[str, Any] = {
        "context_length": context_length,
        "prediction_length": prediction_length,
        "num_input_channels": channels,
        "d_model": args.d_model or 16,
        "name_or_path": ".",  # not a name: the model card then says "trained from scratch"
    }
    if args.model == "samformer":
        return SAMformerForPrediction(SAMformerConfig(**sizes))
    patch = args.patch_length or min(16, max(1, context_length // 2))
    if patch >= context_length:
        raise InputError(f"--patch_length {patch} must be below --context_length {context_length}")
    sizes |= {"patch_length": patch, "patch_stride": patch}
    layers = args.num_hidden_layers or 3
    if args.model == "patchtsmixer":
        return PatchTSMixerForPrediction(PatchTSMixerConfig(num_layers=layers, **sizes))
    sizes |= {"num_attention_heads": HEADS, "ffn_dim": 8 * sizes["d_model"], "ff_dropout": 0.2}
    return PatchTSTForPrediction(PatchTSTConfig(num_hidden_layers=layers, **sizes))


def keep_forecast(outputs: Any, labels: Any) -> torch.Tensor:
    """Drop what PatchTSMixer and PatchTST give in addition to the forecast."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def compute_errors(prediction: EvalPrediction) -> dict[str, float]:
    error = prediction.predictions - prediction.label_ids
    return {"mse": float(np.square(error).mean()), "mae": float(np.abs(error).mean())}


def plot_forecasts(trainer: SAMTrainer, data: ForecastingData) -> None:
    """Save forecasts.png: the first, middle and last test window, up to four channels of each."""
    chosen = sorted({0, len(data.test) // 2, len(data.test) - 1})
    forecasts = trainer.predict(Subset(data.test, chosen)).predictions  # on all processes
    if not trainer.is_world_process_zero():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    context, horizon = data.test.context_length, forecasts.shape[1]
    shape = (min(data.frame.shape[1], 4), len(chosen))
    size = (3.6 * shape[1], 0.8 + 1.8 * shape[0])
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for window, forecast, column in zip(chosen, forecasts, grid.T, strict=True):
        now = data.test_start + window + context  # the row of the first step to forecast
        past = data.frame.iloc[now - min(context, 2 * horizon) : now]
        future = data.frame.iloc[now : now + horizon]
        forecast = data.scaler.inverse_transform(forecast)
        for i, axes in enumerate(column):  # colours of Okabe and Ito
            axes.plot(past.iloc[:, i], color="black", lw=1, label="context")
            axes.plot(future.iloc[:, i], color="#0072B2", label="truth")
            axes.plot(future.index, forecast[:, i], "--", color="#D55E00", label="forecast")
            axes.xaxis.set_major_locator(locator := AutoDateLocator())
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
            axes.grid(alpha=0.3)
    for axes, name in zip(grid[:, 0], data.frame.columns, strict=False):
        axes.set_ylabel(name)
    keys, title = axes.get_legend_handles_labels(), f"{data.name}: forecasts of test windows"
    figure.legend(*keys, title=title, ncols=3, loc="outside upper center")
    figure.savefig(Path(trainer.args.output_dir) / "forecasts.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)

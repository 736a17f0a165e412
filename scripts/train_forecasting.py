"""Train a time series forecaster with SAM or ASAM, on your own CSV or parquet file.

Examples:
    python scripts/train_forecasting.py
    python scripts/train_forecasting.py configs/etth1_samformer.yaml --data_file path/to/ETTh1.csv
    python scripts/train_forecasting.py --data_file path/to/series.parquet --model patchtst

The model sees a window of the series, in all channels, and forecasts the steps after it. It is
validated during training and tested at the end, on values standardised by the training part.
The options come from a YAML file, the command line, or both: the command line wins.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from common.arguments import SharpnessArguments, check_range, check_used, option
from common.cli import InputError, OptionParser, run_script
from torch.utils.data import Dataset, Subset

from sam_hf import SAMTrainingArguments

if TYPE_CHECKING:
    from common.runs import Run
    from transformers import EvalPrediction, PreTrainedModel, Trainer

DEFAULTS = {"num_train_epochs": 50, "per_device_train_batch_size": 32, "logging_strategy": "epoch"}
DEFAULTS |= {"learning_rate": 1e-3, "per_device_eval_batch_size": 256, "eval_strategy": "epoch"}
DEFAULTS |= {"lr_scheduler_type": "constant", "save_strategy": "no", "save_total_limit": 1}


@dataclass
class DataArguments:
    """Which series, and how it is split."""

    _argument_group_name = "data"

    data_file: str | None = option(
        "CSV or parquet file with a row for each time step. Without it: El Niño, from statsmodels."
    )
    date_column: str | None = option("Column with the dates. 'date' if not given.")
    columns: list[str] | None = option("Columns to forecast. All but the dates if not given.")
    split_months: list[float] | None = option("Months of 30 days for training, validation, test.")
    split_fractions: list[float] | None = option("Fractions of the rows: 0.7 0.1 0.2 if not given.")
    context_length: int = option("Time steps that the model sees.", default=96)
    prediction_length: int = option("Time steps that the model forecasts.", default=12)

    def __post_init__(self) -> None:
        check_used(self, ["date_column", "columns"], bool(self.data_file), "without --data_file")
        check_used(self, ["split_fractions"], self.split_months is None, "with --split_months")
        check_range(self, 1, math.inf, "context_length", "prediction_length")
        parts = self.split_months or self.split_fractions or [0.7, 0.1, 0.2]
        is_whole = bool(self.split_months) or math.isclose(sum(parts), 1)
        if len(parts) != 3 or min(parts) <= 0 or not is_whole:
            name = "split_months" if self.split_months else "split_fractions"
            raise ValueError(f"--{name} takes 3 numbers above 0 (fractions: sum 1), got {parts}")


@dataclass
class ForecasterArguments:
    """Which model. All are made untrained, from their configuration."""

    _argument_group_name = "model"

    model: Literal["samformer", "patchtsmixer", "patchtst"] = option("Model.", default="samformer")
    config_overrides: str | None = option("Changes to its configuration: d_model=32,num_layers=4.")


@dataclass
class TrainArguments(SharpnessArguments, SAMTrainingArguments):
    """The options of training, of SAM, and of the comparison with plain training."""

    output_dir: str = option("Folder for the model, metrics and pictures.", "outputs/forecasting")
    early_stopping_patience: int | None = option(
        "Stop when the validation loss has not improved in this many evaluations, and keep the "
        "weights of the best one. A checkpoint is saved at each evaluation."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "early_stopping_patience")
        is_evaluated = self.eval_strategy != "no"
        check_used(self, ["early_stopping_patience"], is_evaluated, "with --eval_strategy no")


class Windows(Dataset):
    """All windows of a series (channels, rows), as views (windows, channels, steps) of it."""

    def __init__(self, series: torch.Tensor, context: int, horizon: int) -> None:
        self.past = series[:, :-horizon].unfold(1, context, 1).transpose(0, 1)
        self.future = series[:, context:].unfold(1, horizon, 1).transpose(0, 1)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch, each value (windows, steps, channels), in one indexing operation."""
        batch = {"past_values": self.past[indices], "future_values": self.future[indices]}
        return {name: values.transpose(1, 2) for name, values in batch.items()}


def load_data(args: DataArguments) -> tuple[pd.DataFrame, list[Subset]]:
    """The series, standardised by its training part, and the windows of its three parts."""
    frame = read_series(args)
    rows, context, horizon = len(frame), args.context_length, args.prediction_length
    if args.split_months is not None:
        months = np.cumsum(args.split_months) * pd.Timedelta(days=30)
        ends = [int(end / np.median(np.diff(frame.index))) for end in months]
    else:
        train, _, test = args.split_fractions or (0.7, 0.1, 0.2)
        ends = [int(train * rows), rows - int(test * rows), rows]
    # The first context of a part is in the part before.
    parts = list(zip((0, ends[0] - context, ends[1] - context), ends, strict=True))
    for first, end in parts:
        if first < 0 or end > rows or end - first < context + horizon:
            lengths = f"--context_length {context} and --prediction_length {horizon}"
            raise InputError(f"rows {first} to {end} of {rows} hold no window of {lengths}")
    part = frame[: ends[0]]
    frame = (frame - part.mean()) / part.std(ddof=0).where(part.nunique() > 1, 1)
    windows = Windows(torch.tensor(frame.to_numpy("float32").T.copy()), context, horizon)
    return frame, [Subset(windows, range(a, b - context - horizon + 1)) for a, b in parts]


def read_series(args: DataArguments) -> pd.DataFrame:
    """A column for each channel, indexed by dates in equal steps; months and years are equal."""
    file, date = args.data_file, args.date_column or "date"
    try:
        if file is None:
            from statsmodels.datasets import elnino

            values = elnino.load_pandas().data.drop(columns="YEAR").to_numpy().ravel()
            months = pd.date_range("1950-01-01", periods=len(values), freq="MS")
            return pd.DataFrame({"temperature": values}, index=months)
        frame = pd.read_parquet(file) if file.endswith(".parquet") else pd.read_csv(file)
        columns = args.columns or [name for name in frame if name != date]
        if missing := [name for name in (date, *columns) if name not in frame]:
            raise ValueError(f"no column {missing[0]!r}; its columns: {', '.join(map(str, frame))}")
        if len(frame) < 2 or not columns:
            raise ValueError("a series needs two rows or more, and a column next to the dates")
        frame = frame.set_index(pd.DatetimeIndex(frame[date]))[columns]
        frame = frame.astype(dict.fromkeys(columns, "float64"))
        if unusable := list(frame.columns[~np.isfinite(frame).all()]):
            raise ValueError(f"missing or infinite values in {unusable}: fill them")
        steps, usual = np.diff(frame.index), np.median(np.diff(frame.index))
        odd = np.flatnonzero(~(abs(steps - usual) < usual / 2))  # also where a date is missing
        if len(odd):
            step = f"{frame.index[odd[0]]} is followed by {frame.index[odd[0] + 1]}"
            raise ValueError(f"dates must ascend in equal steps, but {step}: sort, and fill gaps")
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise InputError(f"--data_file {file}: {error}") from error
    return frame


def build_model(args: ForecasterArguments, sizes: dict[str, int]) -> PreTrainedModel:
    """The untrained model. Raises an InputError if these sizes are not possible."""
    import transformers
    from common.experiment import new_model
    from models.samformer import SAMformerConfig, SAMformerForPrediction

    patch = min(16, max(1, sizes["context_length"] // 2))
    small = {"d_model": 16, "patch_length": patch, "patch_stride": patch}
    if args.model == "samformer":
        model = new_model(SAMformerForPrediction, SAMformerConfig(**sizes), args)
    elif args.model == "patchtsmixer":
        mixer = transformers.PatchTSMixerConfig(**sizes, **small)
        model = new_model(transformers.PatchTSMixerForPrediction, mixer, args)
    else:
        patchtst = transformers.PatchTSTConfig(**sizes, **small, ffn_dim=128, ff_dropout=0.2)
        model = new_model(transformers.PatchTSTForPrediction, patchtst, args)
    if any(getattr(model.config, name) != size for name, size in sizes.items()):
        raise InputError(f"--config_overrides: {', '.join(sizes)} have options of their own")
    return model


def errors(prediction: EvalPrediction) -> dict[str, float]:
    error = prediction.predictions - prediction.label_ids
    return {"mse": float(np.square(error).mean()), "mae": float(np.abs(error).mean())}


def plot_forecasts(trainer: Trainer, frame: pd.DataFrame, windows: Subset, context: int) -> None:
    """Save forecasts.png: the first, middle and last test window, up to four channels of each."""
    from matplotlib.figure import Figure

    chosen = [windows.indices[i] for i in (0, len(windows) // 2, -1)]
    forecasts = trainer.predict(Subset(windows.dataset, chosen)).predictions  # on all processes
    horizon, channels = forecasts.shape[1], min(frame.shape[1], 4)
    figure = Figure((3.6 * len(chosen), 0.8 + 1.8 * channels), layout="constrained")
    grid = figure.subplots(channels, len(chosen), squeeze=False)
    for first, forecast, column in zip(chosen, forecasts, grid.T, strict=True):
        shown = frame[first : first + context + horizon][-3 * horizon :]
        for name, values, axes in zip(frame, forecast.T, column, strict=False):
            axes.plot(shown[name], color="black", label="truth")
            axes.plot(shown.index[-horizon:], values, color="#D55E00", label="forecast")
            axes.set_ylabel(f"{name} (standardised)")
    figure.autofmt_xdate()
    figure.legend(*axes.get_legend_handles_labels(), ncols=2, loc="outside upper center")
    if trainer.is_world_process_zero():
        figure.savefig(Path(trainer.args.output_dir) / "forecasts.png", dpi=150)


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, save, push."""
    parser = OptionParser((DataArguments, ForecasterArguments, TrainArguments), __doc__)
    parser.set_defaults(**DEFAULTS)
    data_args, model_args, args = parser.parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.experiment import build_trainer, prepare, publish, train_and_compare
    from transformers import EarlyStoppingCallback, set_seed

    from sam_hf import SAMTrainer

    resume_from = prepare(args, data_args)
    args.remove_unused_columns = False  # a batch is not a list of examples
    args.label_names = ["future_values"]
    if patience := args.early_stopping_patience:
        args.load_best_model_at_end, args.metric_for_best_model = True, "eval_loss"
        args.save_strategy, args.save_steps = args.eval_strategy, args.eval_steps
    frame, (train, validation, test) = load_data(data_args)
    name = Path(data_args.data_file or "El Niño").stem
    counts = f"{len(train)} training, {len(validation)} validation, {len(test)} test"
    summary = f"{name}: {frame.shape[1]} channels, {len(frame)} rows; windows: {counts}"
    if args.process_index == 0:
        print(summary)
    set_seed(args.seed)
    sizes = {"context_length": data_args.context_length, "num_input_channels": frame.shape[1]}
    model = build_model(model_args, {**sizes, "prediction_length": data_args.prediction_length})
    options = {"train_dataset": train, "eval_dataset": validation, "compute_metrics": errors}
    options["data_collator"] = dict  # a batch is a dictionary already
    # PatchTSMixer and PatchTST return more than the forecast.
    options["preprocess_logits_for_metrics"] = lambda o, _: o[0] if isinstance(o, tuple) else o

    def build(args: TrainArguments, model: PreTrainedModel) -> SAMTrainer:
        callbacks = [EarlyStoppingCallback(patience)] if patience else None
        return build_trainer(SAMTrainer, args, model=model, callbacks=callbacks, **options)

    details = {"data": summary, "model_arguments": asdict(model_args)}
    report = {"title": name, "data_args": data_args, "details": details, "test_dataset": test}
    trainer, runs = train_and_compare(build, model, args, resume_from, ["mse", "mae"], **report)
    plot_forecasts(trainer, frame, test, data_args.context_length)
    tags = ["time-series-forecasting", "sam_hf"]
    publish(trainer, tasks=tags[0], tags=tags, dataset=name)
    return runs


if __name__ == "__main__":
    run_script(main)

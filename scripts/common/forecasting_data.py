"""The data of the forecasting script: a multivariate series, its split, and its windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common.script_utils import InputError, closest
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils.data import Dataset

READERS = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
PARTS = ("training", "validation", "test")
MONTH = pd.Timedelta(days=30)


@dataclass
class DataArguments:
    """Which series, and how it is split. With no file: monthly sea surface temperatures."""

    _argument_group_name = "data"

    data_file: str | None = field(
        default=None,
        metadata={
            "help": f"Local file ({', '.join(READERS)}) with one row for each time step: a column "
            "of dates, and numbers. Without it: the temperatures of the eastern Pacific, 1950 to "
            "2010, that ship inside statsmodels."
        },
    )
    date_column: str | None = field(
        default=None, metadata={"help": "Column with the dates. 'date' if not given."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns that are the channels. All but the dates if not given."},
    )
    split_months: list[float] | None = field(
        default=None,
        metadata={
            "help": "Months of 30 days for training, validation and test, from the first row on, "
            "such as 12 4 4, usual for the ETT data."
        },
    )
    split_fractions: list[float] | None = field(
        default=None,
        metadata={
            "help": "Fractions of the rows for training, validation and test. 0.7 0.1 0.2 if "
            "neither this nor --split_months is given."
        },
    )
    context_length: int | None = field(
        default=None,
        metadata={
            "help": "Time steps that the model sees. 512 if not given, 96 without --data_file."
        },
    )
    prediction_length: int | None = field(
        default=None,
        metadata={
            "help": "Time steps that the model forecasts. 96 if not given, 12 without --data_file."
        },
    )

    def __post_init__(self) -> None:
        for name in ("date_column", "columns"):
            if getattr(self, name) is not None and self.data_file is None:
                raise ValueError(f"--{name} has no effect without --data_file")
        for name in ("context_length", "prediction_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}")
        if self.split_months is not None and self.split_fractions is not None:
            raise ValueError("give --split_months or --split_fractions, not both")
        for name in ("split_months", "split_fractions"):
            parts = getattr(self, name)
            if parts is not None and not (
                len(parts) == 3 and all(0 < part < math.inf for part in parts)
            ):
                raise ValueError(
                    f"--{name} must be three numbers above 0, for {', '.join(PARTS)}, got {parts}"
                )
        if self.split_fractions is not None and not math.isclose(sum(self.split_fractions), 1):
            raise ValueError(f"--split_fractions must add up to 1, got {self.split_fractions}")

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps of the context, and of the forecast."""
        context, horizon = (96, 12) if self.data_file is None else (512, 96)
        return self.context_length or context, self.prediction_length or horizon


class Windows(Dataset):
    """All windows of a series, cut as views of one tensor and read a batch at a time.

    Args:
        series: (channels, rows), standardised.
        context_length, prediction_length: steps of a window that the model sees, and forecasts.
    """

    def __init__(self, series: Tensor, context_length: int, prediction_length: int) -> None:
        self.context_length = context_length
        # (channels, windows, steps of a window), without a copy
        self.views = series.unfold(1, context_length + prediction_length, 1)

    def __len__(self) -> int:
        return self.views.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: batch[0] for name, batch in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch, each value (windows, steps, channels), in one indexing operation."""
        batch = self.views[:, indices].permute(1, 2, 0)
        past, future = batch[:, : self.context_length], batch[:, self.context_length :]
        return {"past_values": past, "future_values": future}


def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`Windows` has made the batch."""
    return batch


@dataclass
class ForecastingData:
    """A series in its own units and the standardised windows of its three parts."""

    name: str
    frame: pd.DataFrame  # a column for each channel, indexed by the dates
    scaler: StandardScaler  # of the training part
    train: Windows
    validation: Windows
    test: Windows
    test_start: int  # row at which the context of the first test window begins

    def describe(self) -> str:
        windows = (f"{len(getattr(self, part))} {part}" for part in ("train", "validation", "test"))
        rows, channels = self.frame.shape
        plural = "s" if channels > 1 else ""
        return (
            f"{self.name}: {channels} channel{plural}, {rows} rows; windows: {', '.join(windows)}"
        )


def load_data(args: DataArguments) -> ForecastingData:
    """Read the series, standardise it by the training part, and cut each part into windows.

    The first validation and the first test window have their context in the part before.

    Raises:
        InputError: there is no such series, it has gaps, or a part is too short for a window.
    """
    if args.data_file is None:
        name, frame = "sea surface temperature (El Niño)", load_el_nino()
    else:
        name, frame = Path(args.data_file).stem, read_file(args)
    context, horizon = args.lengths
    rows = split_rows(frame.index, args)
    needed = (context + horizon, horizon, horizon)
    for part, count, least in zip(PARTS, rows, needed, strict=True):
        if count < least:
            raise InputError(
                f"the {part} part has {count} of {len(frame)} rows and needs {least} for a window: "
                f"choose a smaller --context_length (now {context}) or --prediction_length (now "
                f"{horizon}), or another split"
            )
    scaler = StandardScaler().fit(frame.to_numpy()[: rows[0]])
    series = torch.tensor(scaler.transform(frame.to_numpy()).T, dtype=torch.float32).contiguous()
    ends = np.cumsum(rows)
    starts = (0, ends[0] - context, ends[1] - context)
    windows = (
        Windows(series[:, start:end], context, horizon)
        for start, end in zip(starts, ends, strict=True)
    )
    return ForecastingData(name, frame, scaler, *windows, test_start=int(starts[2]))


def load_el_nino() -> pd.DataFrame:
    """Monthly means in the Pacific at 0 to 10 degrees south and 90 to 80 west, in Celsius (NOAA).

    Raises:
        InputError: statsmodels is not installed.
    """
    try:
        from statsmodels.datasets import elnino
    except ImportError as error:
        raise InputError(
            f"without --data_file: {error}; pip install 'sam-hf[scripts]', or give a file"
        ) from error
    years = elnino.load_pandas().data.set_index("YEAR")  # a column for each month
    months = pd.date_range(f"{years.index[0]:.0f}-01-01", periods=years.size, freq="MS")
    return pd.DataFrame({"temperature": years.to_numpy().ravel()}, index=months)


def read_file(args: DataArguments) -> pd.DataFrame:
    """The channels of --data_file, indexed by their dates.

    Raises:
        InputError: it cannot be read, a column is missing or not of numbers, or the dates do not
            ascend in equal steps, or values are missing.
    """
    file, date_column = args.data_file, args.date_column or "date"
    reader = READERS.get(Path(file).suffix)
    if reader is None:
        raise InputError(f"--data_file {file!r} must end in {' or '.join(READERS)}")
    if not Path(file).is_file():
        raise InputError(f"--data_file {file!r}: there is no such file")
    try:
        frame = reader(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--data_file {file!r} cannot be read: {error}") from error
    for option, names in (("date_column", [date_column]), ("columns", args.columns or [])):
        missing = [name for name in names if name not in frame.columns]
        if missing:
            known = ", ".join(map(str, frame.columns))
            hint = closest(missing[0], map(str, frame.columns))
            raise InputError(
                f"--{option}: {file} has no column {missing[0]!r}{hint}; its columns: {known}"
            )
    dates = read_dates(frame[date_column], f"--date_column {date_column!r} of {file}")
    names = args.columns or [name for name in frame.columns if name != date_column]
    if not names:
        raise InputError(f"--data_file {file!r} has no column but the dates")
    for name in names:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise InputError(
                f"--data_file {file!r}: column {name!r} does not hold numbers, but "
                f"{frame[name].dtype}: name those to use with --columns"
            )
    values = frame[names].astype("float64").set_axis(dates)
    unusable = (~np.isfinite(values)).sum()
    if unusable.any():
        where = ", ".join(f"{count} in {name}" for name, count in unusable.items() if count)
        raise InputError(
            f"--data_file {file!r}: {unusable.sum()} values are missing or infinite ({where}): "
            "fill them, for example with interpolate() of pandas, or leave these columns out with "
            "--columns"
        )
    return values


def read_dates(column: pd.Series, option: str) -> pd.DatetimeIndex:
    """The dates, ascending in equal steps. Months, quarters and years count as equal.

    Raises:
        InputError: they are no dates, or they do not.
    """
    try:
        dates = pd.DatetimeIndex(pd.to_datetime(column))
    except (ValueError, TypeError) as error:
        raise InputError(f"{option} does not hold dates: {error}") from error
    if len(dates) < 2:
        raise InputError(f"{option}: the series needs 2 rows or more, got {len(dates)}")
    steps = np.diff(dates)
    if not (steps > np.timedelta64(0)).all():
        row = int(np.argmin(steps > np.timedelta64(0)))
        raise InputError(
            f"{option}: dates must ascend, but {dates[row]} is followed by {dates[row + 1]}: sort "
            "the rows, and keep one for each date"
        )
    usual = time_step(dates)
    odd = np.flatnonzero(abs(steps - usual) > usual / 2)
    if len(odd):
        raise InputError(
            f"{option}: {len(odd)} of {len(steps)} time steps are not the usual {usual}, the first "
            f"after {dates[odd[0]]}: fill the gaps, for example with resample(...).interpolate() "
            "of pandas"
        )
    return dates


def time_step(dates: pd.DatetimeIndex) -> pd.Timedelta:
    """The usual time between two rows."""
    return pd.Timedelta(np.median(np.diff(dates)))


def split_rows(dates: pd.DatetimeIndex, args: DataArguments) -> Sequence[int]:
    """The rows of training, validation and test.

    Raises:
        InputError: there are fewer rows than the months need.
    """
    count = len(dates)
    if args.split_months is None:
        train, _, test = args.split_fractions or (0.7, 0.1, 0.2)
        train, test = int(train * count), int(test * count)
        return train, count - train - test, test
    step = time_step(dates)
    rows = [int(months * MONTH / step) for months in args.split_months]
    if sum(rows) > count:
        given = " ".join(f"{months:g}" for months in args.split_months)
        raise InputError(
            f"--split_months {given}: months of 30 days are {sum(rows)} rows at the time step "
            f"{step}, and the series has {count}: give fewer, or --split_fractions"
        )
    return rows

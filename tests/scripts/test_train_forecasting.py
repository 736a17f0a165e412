"""The forecasting script: its data, SAMformer against a twin, and the course to the saved files."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common.cli import InputError, OptionParser, run_script
from models.samformer import RevIN, SAMformerConfig, SAMformerForPrediction
from PIL import Image
from torch.utils.data import Subset
from train_forecasting import (
    DEFAULTS,
    DataArguments,
    ForecasterArguments,
    TrainArguments,
    Windows,
    build_model,
    load_data,
    main,
)
from transformers import AutoModelForTimeSeriesPrediction

CONFIG = Path(__file__).parents[2] / "configs" / "etth1_samformer.yaml"
SHORT = "--use_cpu --max_steps 2 --context_length 16 --prediction_length 4"
ETT_ROWS = 17_420


def run(folder: Path, options: str):
    return main([*options.split(), "--output_dir", str(folder)])


def hourly(rows: int, channels: int = 2) -> pd.DataFrame:
    """A series whose channel c is c + 10 times the number of the row."""
    dates = pd.date_range("2016-07-01", periods=rows, freq="h")
    values = {f"x{c}": 10.0 * np.arange(rows) + c for c in range(channels)}
    return pd.DataFrame({"date": dates, **values})


def write(folder: Path, frame: pd.DataFrame, name: str = "series.csv") -> str:
    file = folder / name
    frame.to_csv(file, index=False) if file.suffix == ".csv" else frame.to_parquet(file)
    return str(file)


# ------------------------------------------------------------------------------------------ data


def test_the_windows_are_those_of_the_ett_protocol_and_none_crosses_into_the_next_part(tmp_path):
    frame = hourly(ETT_ROWS)  # a row's number can be read off its values
    options = {"split_months": [12, 4, 4], "context_length": 512, "prediction_length": 96}
    _, parts = load_data(DataArguments(write(tmp_path, frame, "ett.parquet"), **options))
    assert [len(part) for part in parts] == [8033, 2785, 2785]
    borders = (0, 8640, 11520, 14400)  # the last 3,020 hours are not used
    of_training = frame.x0[:8640]
    for i, (part, start, end) in enumerate(zip(parts, borders, borders[1:], strict=False)):
        batch = part.__getitems__([0, len(part) - 1])
        assert batch["past_values"].shape == (2, 512, 2)
        steps = torch.cat([batch["past_values"], batch["future_values"]], dim=1)[..., 0].double()
        rows = (steps * of_training.std(ddof=0) + of_training.mean()) / 10  # standardised by it
        first = start - 512 if i else 0  # contexts look back into the part before
        wanted = torch.tensor([range(first, first + 608), range(end - 608, end)])
        assert (rows - wanted).abs().max() < 0.01


def test_fractions_use_all_rows(tmp_path):
    file = write(tmp_path, hourly(1001))
    for fractions, wanted in ((None, [671, 92, 191]), ([0.5, 0.25, 0.25], [471, 242, 241])):
        _, parts = load_data(
            DataArguments(file, split_fractions=fractions, context_length=20, prediction_length=10)
        )
        assert [len(part) for part in parts] == wanted


def test_a_constant_channel_is_not_divided_by_zero(tmp_path):
    frame, _ = load_data(DataArguments(write(tmp_path, hourly(300).assign(x1=0.1))))
    assert frame.x1.abs().max() < 1e-12


def test_a_batch_is_its_windows_cut_as_views_without_a_copy():
    series = torch.arange(60.0).reshape(2, 30)
    windows = Windows(series, 5, 3)
    for views in (windows.past, windows.future):
        assert len(views) == 23
        assert views.untyped_storage().data_ptr() == series.untyped_storage().data_ptr()
    batch = Subset(windows, range(23)).__getitems__([4, 0, 22])
    for position, index in enumerate((4, 0, 22)):
        assert torch.equal(batch["past_values"][position], series[:, index : index + 5].T)
        assert torch.equal(batch["future_values"][position], series[:, index + 5 : index + 8].T)


def test_parquet_and_csv_give_the_same_and_columns_chooses_channels_in_order(tmp_path):
    frame = hourly(300, channels=3).rename(columns={"date": "hour"})
    csv, parquet = (
        load_data(
            DataArguments(write(tmp_path, frame, name), date_column="hour", columns=["x2", "x0"])
        )[0]
        for name in ("series.csv", "series.parquet")
    )
    assert list(csv.columns) == ["x2", "x0"]
    pd.testing.assert_frame_equal(csv, parquet, check_freq=False)


@pytest.mark.parametrize("frequency", ["MS", "QS", "YS", "W", "15min"])
def test_calendar_steps_are_no_gaps(tmp_path, frequency):
    dates = pd.date_range("1900-01-01", periods=99, freq=frequency)
    file = write(tmp_path, pd.DataFrame({"date": dates, "x": np.arange(99.0)}))
    frame, _ = load_data(DataArguments(file, context_length=8, prediction_length=2))
    assert frame.shape == (99, 1)


# ----------------------------------------------------------------------------------------- model


def twin_forward(model: SAMformerForPrediction, window: np.ndarray) -> np.ndarray:
    """One window (L, D) through the equations of the paper, in loops; returns (H, D)."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    length, channels = window.shape
    scale, shift = w["revin.weight"][:, 0], w["revin.bias"][:, 0]
    x, mean, std = np.zeros((channels, length)), np.zeros(channels), np.zeros(channels)
    for d in range(channels):  # RevIN
        mean[d] = sum(window[:, d]) / length
        std[d] = math.sqrt(sum((window[:, d] - mean[d]) ** 2) / length + model.config.norm_eps)
        x[d] = (window[:, d] - mean[d]) / std[d] * scale[d] + shift[d]

    def linear(name: str, row: np.ndarray) -> np.ndarray:
        return np.array([sum(weight * row) for weight in w[f"{name}.weight"]]) + w[f"{name}.bias"]

    queries, keys, values = (
        [linear(name, x[d]) for d in range(channels)] for name in ("query", "key", "value")
    )
    forecast = np.zeros((model.config.prediction_length, channels))
    for d in range(channels):
        scores = [sum(queries[d] * key) / math.sqrt(model.config.d_model) for key in keys]
        total = sum(math.exp(score) for score in scores)
        attended = sum(math.exp(scores[e]) / total * values[e] for e in range(channels))
        out = linear("head", x[d] + attended)
        forecast[:, d] = (out - shift[d]) / scale[d] * std[d] + mean[d]
    return forecast


def small_samformer() -> SAMformerForPrediction:
    config = SAMformerConfig(
        context_length=12, prediction_length=5, num_input_channels=3, d_model=4
    )
    model = SAMformerForPrediction(config)
    with torch.no_grad():  # RevIN's own are 1 and 0, which would hide a mistake
        model.revin.weight.uniform_(0.5, 2)
        model.revin.bias.uniform_(-1, 1)
    return model


def test_samformer_is_that_of_the_paper():
    model = small_samformer().double()
    past, future = 3 * torch.randn(2, 12, 3).double() + 5, torch.randn(2, 5, 3).double()
    with torch.no_grad():
        output = model(past, future)
    wanted = torch.tensor(np.stack([twin_forward(model, window.numpy()) for window in past]))
    assert torch.allclose(output.prediction_outputs, wanted, rtol=1e-12, atol=1e-12)
    assert output.loss.item() == pytest.approx(((wanted - future) ** 2).mean().item(), rel=1e-12)


def test_revin_is_inverted_exactly():
    revin = RevIN(3, eps=1e-5).double()
    with torch.no_grad():
        revin.weight.uniform_(0.5, 2)
        revin.bias.uniform_(-1, 1)
    x = 100 * torch.randn(4, 3, 20).double() + 7
    x[0, 0] = 3.0  # a constant channel
    normal, mean, std = revin(x)
    assert torch.allclose(revin.inverse(normal, mean, std), x, rtol=1e-12, atol=1e-12)
    plain = (normal[1:] - revin.bias) / revin.weight
    assert plain.mean(-1).abs().max() < 1e-12
    assert (plain.square().mean(-1) - 1).abs().max() < 1e-6


def test_samformer_begins_with_the_initial_weights_of_torch_and_the_size_of_the_paper():
    model = SAMformerForPrediction(SAMformerConfig())
    assert model.num_parameters() == 328_334  # 0.33 M
    assert torch.equal(model.revin.weight, torch.ones(7, 1))
    assert torch.equal(model.revin.bias, torch.zeros(7, 1))
    for layer in (model.query, model.key, model.value, model.head):
        for p in (layer.weight, layer.bias):
            bound = 1 / math.sqrt(512)
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)


def test_a_saved_samformer_forecasts_the_same(tmp_path):
    model, past = small_samformer(), torch.randn(2, 12, 3)
    model.save_pretrained(tmp_path)
    for loader in (SAMformerForPrediction, AutoModelForTimeSeriesPrediction):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is SAMformerForPrediction
        assert torch.equal(loaded(past).prediction_outputs, model(past).prediction_outputs)


def test_overrides_also_change_the_sizes_that_follow_from_them():
    args = ForecasterArguments("patchtsmixer", "patch_length=4,patch_stride=4,d_model=8")
    sizes = {"context_length": 32, "prediction_length": 4, "num_input_channels": 1}
    assert build_model(args, sizes).config.num_patches == 8


# ---------------------------------------------------------------------------------------- course


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_default_run_needs_no_file_and_saves_model_results_and_pictures(tmp_path, capsys):
    (result,) = run(tmp_path, "--use_cpu --max_steps 30 --report_to none")
    output = capsys.readouterr().out
    counts = "405 training, 63 validation, 135 test"
    assert f"El Niño: 1 channels, 732 rows; windows: {counts}" in output
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        assert (tmp_path / name).is_file(), name
    for name, width in (("curves.png", 600), ("forecasts.png", 1200)):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > width
    (saved,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (saved["mse"], saved["mae"]) == (result.scores["mse"], result.scores["mae"])
    assert saved["curve_data"] == "validation"
    card = (tmp_path / "README.md").read_text()
    assert "- time-series-forecasting\n- sam_hf\n" in card
    assert "trained from scratch on the El Niño dataset" in card
    assert f"- Mse: {result.score:.4f}" in card


def errors(folder: Path, windows: Subset) -> tuple[float, float]:
    """The mean squared and the mean absolute error of a saved SAMformer."""
    batch = windows.__getitems__(list(range(len(windows))))
    with torch.no_grad():
        forecast = SAMformerForPrediction.from_pretrained(folder)(**batch).prediction_outputs
    error = forecast - batch["future_values"]
    return error.square().mean().item(), error.abs().mean().item()


def test_the_saved_model_has_the_reported_errors_on_the_test_windows(tmp_path):
    (result,) = run(tmp_path, "--use_cpu --max_steps 30 --learning_rate 1e-2")
    _, (_, validation, test) = load_data(DataArguments())
    assert tuple(result.scores.values()) == pytest.approx(errors(tmp_path, test), rel=1e-5)
    assert result.curve[-1][1] == pytest.approx(errors(tmp_path, validation)[0], rel=1e-5)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    scores = [entry["eval_mse"] for entry in history if "eval_mse" in entry]
    assert [score for _, score in result.curve] == scores[:-1]  # the last is that of the test data
    assert scores[-1] == result.score
    assert all(entry["eval_loss"] == pytest.approx(entry["eval_mse"]) for entry in history[1::2])


@pytest.mark.parametrize("model", ["samformer", "patchtsmixer", "patchtst"])
def test_each_model_trains_with_sam_and_not_as_without(tmp_path, model):
    file = write(tmp_path, hourly(200).assign(x1=np.sin(np.arange(200))))
    options = f"{SHORT} --data_file {file} --model {model} --config_overrides d_model=8"
    options += " --logging_strategy steps --logging_steps 1"
    first = []
    for name, rho in (("sam", 0.5), ("plain", 0), ("again", 0)):
        (result,) = run(tmp_path / name, f"{options} --sam_rho {rho}")
        assert math.isfinite(result.score)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["model_type"], config["d_model"]) == (model, 8)
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        first.append(state["log_history"][0]["loss"])
    assert weights(tmp_path / "sam") != weights(tmp_path / "plain") == weights(tmp_path / "again")
    assert first[0] == first[1]


def test_the_comparison_has_the_same_compute_and_both_are_tested(tmp_path, capsys):
    sam, plain = run(tmp_path, f"{SHORT} --max_steps 26 --compare_with_plain")
    assert (sam.name, plain.name) == ("SAM (rho auto)", "AdamW")
    assert sam.passes == plain.passes
    assert plain.epochs == 2 * sam.epochs
    assert (sam.curve_data, plain.curve_data) == ("validation", "validation")
    assert len(plain.curve) == 2 * len(sam.curve)
    assert "test mse test mae" in capsys.readouterr().out


def test_early_stopping_ends_both_trainings_and_tests_the_best_weights(tmp_path):
    options = f"{SHORT} --max_steps -1 --num_train_epochs 30 --learning_rate 0.02 --sam_rho 0.5"
    sam, plain = run(tmp_path, f"{options} --early_stopping_patience 2 --compare_with_plain")
    _, (_, _, test) = load_data(DataArguments(context_length=16, prediction_length=4))
    for result, folder in ((sam, tmp_path), (plain, tmp_path / "plain")):
        scores = [score for _, score in result.curve]
        assert scores.index(min(scores)) == len(scores) - 3  # two evaluations without a better one
        assert result.epochs == len(scores) < 30
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_metric"] == pytest.approx(min(scores))
        assert state["best_global_step"] < state["global_step"]
        best = Path(state["best_model_checkpoint"])
        assert result.score == pytest.approx(errors(best, test)[0], rel=1e-5)
        assert result is plain or weights(best) == weights(folder)


def test_a_run_that_is_resumed_ends_where_it_would_have_ended(tmp_path):
    options = f"{SHORT} --max_steps 26 --save_strategy epoch --save_total_limit 2"
    run(tmp_path / "a", options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-16").rename(tmp_path / "b" / "checkpoint-16")
    run(tmp_path / "b", f"{options} --resume_from_checkpoint True")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_without_validation_the_curve_is_the_test_score(tmp_path):
    (result,) = run(tmp_path, f"{SHORT} --eval_strategy no")
    assert result.curve_data == "test"
    assert [score for _, score in result.curve] == [result.score]


def test_sharpness_is_measured_on_validation_windows(tmp_path):
    run(tmp_path, f"{SHORT} --max_steps 30 --sharpness_every 0 --sharpness_examples 8")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("sharpness/" in name for entry in history for name in entry)


def test_the_recipe_is_that_of_the_evidence():
    parser = OptionParser((DataArguments, ForecasterArguments, TrainArguments))
    parser.set_defaults(**DEFAULTS)
    data, model, args = parser.parse([str(CONFIG)])
    assert (data.context_length, data.prediction_length) == (512, 96)
    assert data.split_months == [12, 4, 4]
    assert (model.model, model.config_overrides) == ("samformer", "d_model=16")
    assert (args.sam_method, args.sam_rho, args.num_train_epochs) == ("sam", 0.7, 20)
    assert (args.per_device_train_batch_size, args.learning_rate) == (256, 1e-3)
    assert (args.lr_scheduler_type, args.weight_decay) == ("constant", 0)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--date_column day", "--date_column has no effect without --data_file"),
        ("--columns x", "--columns has no effect without --data_file"),
        ("--context_length -1", "--context_length must be 1 or more, got -1"),
        ("--prediction_length 0", "--prediction_length must be 1 or more, got 0"),
        ("--split_months 12 4", r"--split_months.*got \[12.0, 4.0\]"),
        ("--split_months 12 -4 4", r"--split_months.*got \[12.0, -4.0, 4.0\]"),
        ("--split_fractions 0.7 0.1 0.1", r"--split_fractions.*got \[0.7, 0.1, 0.1\]"),
        ("--split_fractions 0.8 0.1 0.1 --split_months 1 1 1", "--split_fractions has no effect"),
        ("--split_months 1000 4 4", "rows 0 to 967 of 732 hold no window"),
        ("--context_length 600", "rows 0 to 512 of 732 hold no window of --context_length 600"),
        ("--prediction_length 99", "rows 416 to 586 of 732 hold no window of .*_length 99"),
        ("--model lstm", "--model.*invalid choice"),
        ("--config_overrides d_model=0", "--config_overrides 'd_model=0': .* not allowed"),
        ("--config_overrides patch_length=8", "--config_overrides .*patch_length"),
        ("--config_overrides context_length=8", "context_length, .* have options of their own"),
        ("--model patchtst --config_overrides d_model=6", "must be divisible by num_heads"),
        ("--model patchtst --config_overrides patch_length=99", "greater than the patch length"),
        ("--early_stopping_patience 0", "--early_stopping_patience must be 1 or more, got 0"),
        ("--early_stopping_patience 1 --eval_strategy no", "no effect with --eval_strategy no"),
        ("--load_best_model_at_end --save_strategy epoch", "--load_best_model_at_end"),
        ("--data_file nowhere.csv", "--data_file nowhere.csv: .*No such file"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_training(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, f"--use_cpu --max_steps 1 {options}")
    assert not (tmp_path / "model.safetensors").exists()


def with_value(row: int, column: str, value: object) -> pd.DataFrame:
    frame = hourly(300).astype({column: object})
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (hourly(300), "--date_column day", "no column 'day'; its columns: date, x0, x1"),
        (hourly(300).drop(columns="date"), "", "no column 'date'"),
        (hourly(300), "--columns x0 price", "no column 'price'; its columns: date, x0, x1"),
        (hourly(300)[["date"]], "", "a column next to the dates"),
        (hourly(300), "--date_column x0 --columns date", "could not convert string to float"),
        (with_value(5, "date", "soon"), "", "soon"),
        (with_value(5, "date", None), "", "dates must ascend in equal steps"),
        (with_value(5, "x1", "n.a.?"), "", r"'n\.a\.\?': .* column 'x1'"),
        (with_value(5, "x1", None), "", r"missing or infinite values in \['x1'\]: fill them"),
        (with_value(5, "x0", "inf"), "", r"missing or infinite values in \['x0'\]"),
        (hourly(300).iloc[::-1], "", "must ascend.* 2016-07-13 11:00:00 is followed by"),
        (hourly(300).iloc[[0, 1, 1, 2]], "", "but 2016-07-01 01:00:00 is followed by"),
        (hourly(300).drop(index=[7, 8]), "", "2016-07-01 06:00:00 is followed by 2016-07-01 09"),
        (hourly(300), "--split_months 12 4 4", "rows 0 to 8640 of 300 hold no window"),
        (hourly(30), "", "rows 0 to 21 of 30 hold no window"),
        (hourly(1), "", "needs two rows or more"),
        (hourly(0), "", "needs two rows or more"),
    ],
)
def test_a_series_that_cannot_be_used_is_refused_in_one_line(tmp_path, frame, options, message):
    file = write(tmp_path, frame)
    with pytest.raises(InputError, match=message) as error:
        load_data(*OptionParser((DataArguments,)).parse(["--data_file", file, *options.split()]))
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line_and_exit_code_2_and_names_a_missing_package(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("common.cli.logging.disable_progress_bar", lambda: None)
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "empty.csv").write_text("")
    for options, message in (
        ("", "statsmodels"),
        (f"--data_file {tmp_path / 'broken.parquet'}", "broken.parquet: "),
        (f"--data_file {tmp_path / 'empty.csv'}", "empty.csv: No columns"),
    ):
        with pytest.raises(SystemExit) as end:
            run_script(main, ["--use_cpu", *options.split(), f"--output_dir={tmp_path / 'out'}"])
        assert end.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert "error: " in line and message in line

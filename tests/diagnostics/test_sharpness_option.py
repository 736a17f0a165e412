"""--sharpness_every of the scripts, from the command line to the log, the picture and the card."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from common.cli import InputError, OptionParser
from train_image_classification import TrainArguments, main

DIGITS = "--config_overrides hidden_size=8,num_hidden_layers=1,num_attention_heads=2 --use_cpu "
DIGITS += "--max_train_samples 64 --per_device_train_batch_size 16 --save_strategy no --seed 1 "
DIGITS += "--per_device_eval_batch_size 256 "  # a measure has many passes over each batch
DIGITS += "--num_train_epochs 1"  # 4 updates
MEASURED = "sharpness/worst_sharpness"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def measured_at(folder: Path) -> list[int]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in log if MEASURED in entry]


def test_both_trainings_are_measured_and_drawn_and_no_weight_changes(tmp_path, capsys):
    options = [*DIGITS.split(), "--sam_rho", "0.1"]
    measured, unmeasured = tmp_path / "measured", tmp_path / "unmeasured"
    more = ["--sharpness_every", "0", "--sharpness_examples", "64", "--compare_with_plain"]
    main([*options, *more, "--output_dir", str(measured)])
    assert measured_at(measured) == [4] and measured_at(measured / "plain") == [8]
    capsys.readouterr()
    for folder in (measured, measured / "plain"):
        assert (folder / "sharpness.png").stat().st_size > 10_000
    card = (measured / "README.md").read_text()
    assert f"`{MEASURED}`" in card and "(sharpness.png)" in card

    unmeasured.mkdir()
    (unmeasured / "sharpness.png").write_text("of an earlier run")
    main([*options, "--output_dir", str(unmeasured)])
    assert "sharpness" not in capsys.readouterr().out
    assert measured_at(unmeasured) == []
    weights = [(f / "model.safetensors").read_bytes() for f in (measured, unmeasured)]
    assert weights[0] == weights[1]


def arguments(folder: Path, options: str) -> TrainArguments:
    parser = OptionParser((TrainArguments,))
    (args,) = parser.parse(["--use_cpu", "--output_dir", str(folder), *options.split()])
    return args


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--sharpness_every -1", "--sharpness_every must be 0 or more, got -1"),
        ("--sharpness_every 1 --sharpness_examples 0", "--sharpness_examples must be 1 or more"),
        ("--sharpness_examples 9", "--sharpness_examples has no effect without"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        arguments(tmp_path, options)

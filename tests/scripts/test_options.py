"""Options from YAML and command line, the checks of the training's options, errors in one line."""

from __future__ import annotations

import logging
import math
import re
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import pytest
import torch
from common.cli import InputError, OptionParser, run_script
from common.experiment import prepare
from train_image_classification import DataArguments, TrainArguments

from sam_hf import SAMConfig, SAMTrainingArguments


@dataclass
class Arguments:
    size: int = field(default=1, metadata={"help": "A number, 100 %% of it."})
    noise: float = 0.0
    name: str | None = None
    column: str = "image"
    files: list[str] | None = None
    deep: bool = False
    wide: bool = True

    def __post_init__(self) -> None:
        if self.noise > 1:
            raise ValueError(f"--noise must be at most 1,\n  got {self.noise}")


def parse(tmp_path: Path, text: str, *options: str, dataclass: type = Arguments):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return OptionParser([dataclass]).parse([str(file), *options])[0]


def test_options_win_over_the_yaml_and_the_yaml_over_the_defaults(tmp_path):
    args = parse(tmp_path, "size: 2\nnoise: 0.5", "--noise", "0.25")
    assert (args.size, args.noise, args.column) == (2, 0.25, "image")


def test_without_a_yaml_the_options_are_parsed_alone():
    assert OptionParser([Arguments]).parse(["--size", "3"])[0].size == 3


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("noise: 1e-3", "noise", 0.001),  # a string to YAML 1.1
        ("noise: 1", "noise", 1.0),
        ("noise: -1e-3", "noise", -0.001),
        ("size: -1", "size", -1),
        ("deep: true", "deep", True),
        ("deep: on", "deep", True),
        ("wide: false", "wide", False),
        ('deep: "yes"', "deep", True),
        ('name: "no"', "name", "no"),
        ("name: -x", "name", "-x"),
        ("name: a=1,b=2", "name", "a=1,b=2"),
        ("name:", "name", None),
        ("files: a.parquet", "files", ["a.parquet"]),
        ("files: [a, b]", "files", ["a", "b"]),
        ("", "size", 1),
    ],
)
def test_a_yaml_value_has_the_type_of_its_option(tmp_path, text, name, value):
    parsed = getattr(parse(tmp_path, text), name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise: 2", "config.yaml: unknown key 'sise' (did you mean size?)"),
        ("7: 2", "config.yaml: unknown key 7"),
        ("size: 2.5", "--size: invalid int value: '2.5'"),
        ("size: true", "config.yaml: size takes no boolean"),
        ("size: two", "--size: invalid int value: 'two'"),
        ("size: [1, 2]", "config.yaml: size takes one value, got [1, 2]"),
        ("size: {a: 1}", "config.yaml: size takes one value, got {'a': 1}"),
        ("size:", "config.yaml: size has no value; the default is 1"),
        ("noise: high", "--noise: invalid float value: 'high'"),
        ("column: no", "put such a word in quotes"),
        ("deep: 2", "expected"),
        ("deep: [true, false]", "deep takes one value"),
        ("files: []", "--files: expected at least one argument"),
        ("size: 1\nsize: 2", "the key 'size' appears twice"),
        ("- size", "config.yaml must hold `option: value` lines"),
        ("size: [", "config.yaml' cannot be read: while parsing"),
    ],
)
def test_a_bad_yaml_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        parse(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("logging_nan_inf_filter: false", "logging_nan_inf_filter", False),
        ("disable_tqdm: true", "disable_tqdm", True),
        ("lr_scheduler_type: cosine", "lr_scheduler_type", "cosine"),
        ("warmup_steps: 1e-1", "warmup_steps", 0.1),
        ("sam_rho: 5e-2", "sam_rho", 0.05),
        *(
            (f"sam_rho: 1\nsam_method: {method}\nsam_method_args: {args}", "sam_method_args", value)
            for method, args, value in (
                ("looksam", "{k: 3, alpha: 5e-1}", {"k": 3, "alpha": 0.5}),
                ("looksam", "k=3,alpha=5e-1", {"k": 3, "alpha": 0.5}),
                ("looksam", """'{"k": 3, "alpha": 5e-1}'""", {"k": 3, "alpha": 0.5}),
                ("wsam", "\n  gamma: 0.5\n  decoupled: false", {"gamma": 0.5, "decoupled": False}),
                ("bar", "{balance: weights}", {"balance": "weights"}),
            )
        ),
    ],
)
def test_the_trainers_own_options_can_come_from_yaml(tmp_path, text, name, value):
    args = parse(tmp_path, text, "--output_dir", str(tmp_path), dataclass=SAMTrainingArguments)
    assert getattr(args, name) == value


def test_options_of_a_method_on_the_command_line_win_over_those_of_the_yaml(tmp_path):
    text = f"output_dir: {tmp_path}\nsam_method: looksam\nsam_method_args: {{k: 3, alpha: 0.5}}"
    options = "--sam_method_args", "k=4"
    args = parse(tmp_path, text, *options, dataclass=SAMTrainingArguments)
    assert args.sam_method_args == {"k": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kk: 3}", "'kk'"),
        ("{k: 2.5}", "2.5"),
        ("{k: 3, k: 4}", "'k' appears twice"),
        ("[k, 3]", "takes one value, got ['k', 3]"),
        ("kk=3", "'kk'"),
    ],
)
def test_bad_options_of_a_method_in_yaml_are_refused_in_one_line(tmp_path, text, message):
    text = f"output_dir: {tmp_path}\nsam_method: looksam\nsam_method_args: {text}"
    with pytest.raises(InputError) as error:
        parse(tmp_path, text, dataclass=SAMTrainingArguments)
    assert message in str(error.value)
    assert "sam_method_args" in str(error.value) or "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sise", "2"], "unknown option --sise (did you mean --size?)"),
        (["--siz", "2"], "unknown option --siz (did you mean --size?)"),  # no abbreviations
        (["--size=x"], "--size: invalid int value: 'x'"),
        (["--noise", "2"], "--noise must be at most 1, got 2.0"),
        (["nowhere.yaml"], "the YAML file 'nowhere.yaml' cannot be read"),
        (["--size", "2", "b.yaml"], "unknown option b.yaml"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(options, message):
    with pytest.raises(InputError) as error:
        OptionParser([Arguments]).parse(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_lists_sams_options_first_and_those_of_the_trainer_last():
    text = OptionParser([Arguments, SAMTrainingArguments], "First").format_help()
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[1:4] == ["SAM: method:", "SAM: radius:", "SAM: cost:"]
    assert headings[-1] == "training (transformers.TrainingArguments):"
    of_sam = text[text.index("\nSAM:") : text.index("\ntraining (")]
    assert set(re.findall(r"^  --(\w+)", of_sam, re.M)) >= {f.name for f in fields(SAMConfig)}
    assert text.index("--sam_rho ") < text.index("--sam_interval ") < text.index("--seed ")
    assert "--num-train-epochs" not in text  # a second spelling, which is taken too


def test_help_shows_every_option_with_its_default_and_keeps_the_lines_of_the_description():
    text = OptionParser([Arguments, SAMTrainingArguments], "First\n    second").format_help()
    assert "First\n    second" in text
    assert "A number, 100 % of it. (default: 1)" in text
    assert "(default: None)" not in text


READERS = logging.getLogger("datasets.packaged_modules")


@pytest.fixture
def script_surroundings(monkeypatch):
    """What `run_script` sets for the whole process is put back."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("common.cli.logging.disable_progress_bar", lambda: None)
    level, has_bars = READERS.level, not datasets.utils.are_progress_bars_disabled()
    yield
    READERS.setLevel(level)
    if has_bars:
        datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("exception", "code", "line"),
    [
        (InputError("no such\nfile"), 2, "error: no such file"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_bad_input_and_ctrl_c_end_in_one_line_and_their_exit_code(
    script_surroundings, capsys, exception, code, line
):
    def main(argv):
        raise exception

    with pytest.raises(SystemExit) as end:
        run_script(main, [])
    assert end.value.code == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.strip().endswith(line)
    assert len(output.err.strip().splitlines()) == 1


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError(1, "a bug")])
def test_a_bug_keeps_its_traceback(script_surroundings, bug):
    def main(argv):
        raise bug

    with pytest.raises(type(bug), match="a bug"):
        run_script(main, [])


def test_reading_files_shows_no_bars_and_reports_each_error_once(script_surroundings, caplog):
    datasets.enable_progress_bars()
    run_script(lambda argv: logging.getLogger(f"{READERS.name}.csv.csv").error("bad file"), [])
    assert not caplog.records
    assert datasets.utils.are_progress_bars_disabled()


ON_TEST_DATA = "would select the model on the test data"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_predict": True}, "--do_predict has no effect"),
        ({"prediction_loss_only": True}, "--prediction_loss_only has no effect"),
        ({"batch_eval_metrics": True}, "--batch_eval_metrics has no effect"),
        ({"label_names": ["foo"]}, "--label_names has no effect"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            f"--lr_scheduler_type reduce_lr_on_plateau {ON_TEST_DATA}",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            f"--load_best_model_at_end True {ON_TEST_DATA}",
        ),
        ({"save_strategy": "best"}, f"--save_strategy best {ON_TEST_DATA}"),
        ({"metric_for_best_model": "loss"}, "--metric_for_best_model has no effect"),
        ({"num_train_epochs": 0}, "--num_train_epochs must be above 0, got 0"),
        ({"num_train_epochs": math.nan}, "--num_train_epochs must be above 0, got nan"),
        ({"max_steps": 0, "num_train_epochs": 0}, "--num_train_epochs must be above 0, got 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be 1 .* got 0"),
        ({"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size must be 1 .* got -1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be 1 .* got 0"),
        ({"fp16": True}, "--fp16 has no effect without a GPU: choose --bf16"),
    ],
)
def test_training_options_that_cannot_do_what_they_say_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 1, "num_train_epochs": 0},
        {"learning_rate": 0.0},
        {"max_grad_norm": math.inf},
        *({"lr_scheduler_type": kind} for kind in ("linear", "cosine", "polynomial", "constant")),
    ],
)
def test_training_options_that_make_sense_are_accepted(tmp_path, options):
    assert prepare(TrainArguments(str(tmp_path), use_cpu=True, **options), DataArguments()) is None


def test_the_number_of_threads_is_that_of_the_option(tmp_path):
    before = torch.get_num_threads()
    try:
        prepare(TrainArguments(str(tmp_path), torch_num_threads=2), DataArguments())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give --use_cpu"):
        TrainArguments(str(tmp_path))

"""Options from YAML and command line, and errors in one line."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from script_utils import (
    InputError,
    OptionParser,
    check_training_arguments,
    checkpoint_to_resume,
    run_script,
)

from sam_hf import SAMTrainingArguments


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
        ("sise: 2", "unknown key 'sise' (did you mean size?)"),
        ("7: 2", "unknown key 7"),
        ("size: 2.5", "invalid int value: '2.5'"),
        ("size: true", "size takes no boolean"),
        ("size: two", "invalid int value: 'two'"),
        ("size: [1, 2]", "size takes one value, got [1, 2]"),
        ("size: {a: 1}", "size takes one value, got {'a': 1}"),
        ("size:", "size has no value; the default is 1"),
        ("noise: high", "invalid float value: 'high'"),
        ("column: no", "put such a word in quotes"),
        ("column: 1.10", "column takes text, got 1.1: put it in quotes"),
        ("column: 2024-01-01", "column takes text"),
        ("deep: 2", "expected"),
        ("deep: [true, false]", "deep takes one value"),
        ("files: [1]", "files takes text"),
        ("files: []", "expected at least one argument"),
        ("size: 1\nsize: 2", "'size' stands there twice"),
        ("- size", "must hold `option: value` lines"),
        ("size: [", "not valid YAML"),
    ],
)
def test_a_bad_yaml_is_refused_by_file_and_key_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        parse(tmp_path, text)
    assert message in str(error.value)
    assert "config.yaml" in str(error.value)
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
    ],
)
def test_the_trainers_own_options_can_come_from_yaml(tmp_path, text, name, value):
    args = parse(tmp_path, text, "--output_dir", str(tmp_path), dataclass=SAMTrainingArguments)
    assert getattr(args, name) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sise", "2"], "unknown option --sise (did you mean --size?)"),
        (["--siz", "2"], "unknown option --siz (did you mean --size?)"),  # no abbreviations
        (["--size=x"], "invalid int value: 'x'"),
        (["--noise", "2"], "--noise must be at most 1, got 2.0"),
        (["nowhere.yaml"], "cannot read the YAML file 'nowhere.yaml'"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(options, message):
    with pytest.raises(InputError) as error:
        OptionParser([Arguments]).parse(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_shows_every_option_with_its_default_and_keeps_the_lines_of_the_description():
    text = OptionParser([Arguments, SAMTrainingArguments], "First\n    second").format_help()
    assert "First\n    second" in text
    assert "A number, 100 % of it. (default: 1)" in text
    assert "--sam_rho" in text
    assert "(default: None)" not in text


@pytest.fixture
def script_surroundings(monkeypatch):
    """What `run_script` sets for the whole process is put back."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("script_utils.logging.disable_progress_bar", lambda: None)


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


def test_a_mistake_in_the_code_keeps_its_traceback(script_surroundings):
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main, [])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_predict": True}, "--do_predict"),
        ({"prediction_loss_only": True}, "--prediction_loss_only"),
        ({"batch_eval_metrics": True}, "--batch_eval_metrics"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "--lr_scheduler_type reduce_lr_on_plateau",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "--load_best_model_at_end",
        ),
    ],
)
def test_options_that_do_nothing_or_choose_on_the_test_data_are_refused(tmp_path, options, named):
    check_training_arguments(TrainingArguments(str(tmp_path)))
    with pytest.raises(InputError, match=named):
        check_training_arguments(TrainingArguments(str(tmp_path), **options))


def resume(folder: Path, asked: str | None) -> str | None:
    return checkpoint_to_resume(
        SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=asked)
    )


def test_last_is_the_newest_checkpoint_and_a_fresh_run_does_not_mix_with_it(tmp_path):
    assert resume(tmp_path, None) is None
    with pytest.raises(InputError, match="no checkpoint in"):
        resume(tmp_path, "last")
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert resume(tmp_path, "last") == str(tmp_path / "checkpoint-10")
    assert resume(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="holds checkpoint-10 of an earlier run"):
        resume(tmp_path, None)
    with pytest.raises(InputError, match="is neither a checkpoint nor 'last'"):
        resume(tmp_path, str(tmp_path))


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output_dir .* cannot be used"):
        resume(tmp_path / "file" / "folder", None)

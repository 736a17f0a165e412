"""Options from YAML and command line, and errors in one line."""

from __future__ import annotations

import errno
import logging
import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import pytest
from common.script_utils import (
    SAM_HEADINGS,
    InputError,
    OptionParser,
    check_training_arguments,
    require_writable,
    run_script,
)
from safetensors import SafetensorError

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
        *(
            (f"sam_method: {method}\nsam_method_args: {written}", "sam_method_args", value)
            for method, written, value in (
                ("looksam", "{k: 3, alpha: 5e-1}", {"k": 3, "alpha": 0.5}),
                ("looksam", """{k: "3"}""", {"k": 3}),
                ("looksam", "k=3,alpha=5e-1", {"k": 3, "alpha": 0.5}),
                ("looksam", """'{"k": 3, "alpha": 5e-1}'""", {"k": 3, "alpha": 0.5}),
                ("wsam", "{decoupled: false}", {"decoupled": False}),
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
        ("{k: 3, k: 4}", "'k' stands there twice"),
        ("[k, 3]", "takes one value, got ['k', 3]"),
        ("3", "takes text, got 3: put it in quotes"),
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
        (["--size=x"], "invalid int value: 'x'"),
        (["--noise", "2"], "--noise must be at most 1, got 2.0"),
        (["nowhere.yaml"], "the YAML file 'nowhere.yaml' cannot be read"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
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
    assert headings[2:6] == [f"{title}:" for title in SAM_HEADINGS]
    assert headings[-1] == "training (transformers.TrainingArguments):"
    options = {f.name for f in fields(SAMConfig)}
    assert options == {name for names in SAM_HEADINGS.values() for name in names}
    assert text.index("--sam_rho ") < text.index("--sam_interval ") < text.index("--seed ")
    assert "--num-train-epochs" not in text  # a second spelling, which is taken too


def test_help_shows_every_option_with_its_default_and_keeps_the_lines_of_the_description():
    text = OptionParser([Arguments, SAMTrainingArguments], "First\n    second").format_help()
    assert "First\n    second" in text
    assert "A number, 100 % of it. (default: 1)" in text
    assert "--sam_rho" in text
    assert "(default: None)" not in text


DISK_IS_FULL = "written: the disk is full; the checkpoints that were saved before are intact"
TORCH_ON_A_FULL_DISK = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
READERS = logging.getLogger("datasets.packaged_modules")


@pytest.fixture
def script_surroundings(monkeypatch):
    """What `run_script` sets for the whole process is put back."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("common.script_utils.logging.disable_progress_bar", lambda: None)
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
        (OSError(errno.ENOSPC, "x", "a/b.json"), 1, f"error: a/b.json cannot be {DISK_IS_FULL}"),
        (RuntimeError(TORCH_ON_A_FULL_DISK), 1, f"error: the output cannot be {DISK_IS_FULL}"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            1,
            f"error: the output cannot be {DISK_IS_FULL}",
        ),
    ],
)
def test_bad_input_ctrl_c_and_a_full_disk_end_in_one_line_and_their_exit_code(
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


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError(errno.EPERM, "a bug")])
def test_a_mistake_in_the_code_keeps_its_traceback(script_surroundings, bug):
    def main(argv):
        raise bug

    with pytest.raises(type(bug), match="a bug"):
        run_script(main, [])


def test_reading_files_shows_no_bars_and_reports_each_error_once(script_surroundings, caplog):
    datasets.enable_progress_bars()
    run_script(lambda argv: logging.getLogger(f"{READERS.name}.csv.csv").error("bad file"), [])
    assert not caplog.records
    assert datasets.utils.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_predict": True}, "--do_predict"),
        ({"do_eval": True}, "--do_eval has no effect alone"),
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
        ({"save_strategy": "best"}, "--save_strategy best would choose"),
        ({"metric_for_best_model": "loss"}, "--metric_for_best_model would choose"),
        ({"num_train_epochs": 0}, "--num_train_epochs must be above 0, got 0"),
        ({"num_train_epochs": math.nan}, "--num_train_epochs must be above 0, got nan"),
        ({"max_steps": 0}, "--max_steps must be 1 or more, .* got 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be 1 .* got 0"),
        ({"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size must be 1 .* got -1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be 1 .* got 0"),
        ({"seed": -1}, "--seed must be 0 or more, got -1"),
        ({"learning_rate": -0.1}, "--learning_rate must be 0 or more, got -0.1"),
        ({"learning_rate": math.nan}, "--learning_rate must be 0 or more, got nan"),
        ({"learning_rate": math.inf}, "--learning_rate must be 0 or more, got inf"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be 0 or more, got -1"),
        ({"eval_accumulation_steps": 0}, "--eval_accumulation_steps must be 1 or more, got 0"),
        ({"weight_decay": -0.1}, "--weight_decay must be 0 or more, got -0.1"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm must be 0 or more, got -1.0"),
        ({"adam_beta1": 1.0}, "--adam_beta1 must be from 0 to below 1, got 1.0"),
        ({"adam_epsilon": -1e-8}, "--adam_epsilon must be 0 or more, got -1e-08"),
        ({"save_strategy": "steps", "save_steps": 0}, "--save_steps must be above 0, got 0"),
        ({"eval_strategy": "steps", "eval_steps": -2}, "--eval_steps must be above 0, got -2"),
        (
            {"label_names": ["foo"]},
            "--label_names .'foo'.: the script gives",
        ),
        ({"fp16": True, "use_cpu": True}, "--fp16 has no effect without a GPU: choose --bf16"),
        ({"sam_start_ratio": 1.0}, "--sam_start_ratio 1.0: SAM would never begin"),
        ({"optim_args": "foo"}, "--optim_args must be name=value,name=value, got 'foo'"),
        ({"lr_scheduler_kwargs": "foo"}, "--lr_scheduler_kwargs 'foo': "),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "--lr_scheduler_type warmup_stable_decay with --lr_scheduler_kwargs .*num_decay_steps",
        ),
    ],
)
def test_training_options_that_cannot_do_what_they_say_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        check_training_arguments(SAMTrainingArguments(str(tmp_path), **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 1, "num_train_epochs": 0},
        {"learning_rate": 0.0},
        {"max_grad_norm": math.inf},
        {"optim_args": "betas=(0.9), eps=1e-8"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
        *({"lr_scheduler_type": kind} for kind in ("linear", "cosine", "polynomial", "constant")),
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    ],
)
def test_training_options_that_make_sense_are_taken(tmp_path, options):
    check_training_arguments(SAMTrainingArguments(str(tmp_path), **options))


def test_an_empty_output_dir_is_refused():
    with pytest.raises(InputError, match="--output_dir '' is not the name of a folder"):
        require_writable("")


def test_an_output_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    # Not even root can write to the second.
    for folder in (tmp_path / "file" / "folder", Path("/proc/self")):
        with pytest.raises(InputError, match=r"--output_dir .* cannot be used"):
            require_writable(str(folder))
    require_writable(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()

"""The options: checked when built, from Python, the command line and YAML."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass, fields

import pytest
from tiny import Classifier, arguments, examples, sam_trainer
from transformers import HfArgumentParser, TrainingArguments

from sam_hf import SAMConfig, SAMTrainer, SAMTrainingArguments


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("sam_rho", -0.1, "a finite number from 0 up"),
        ("sam_rho", float("nan"), "a finite number from 0 up"),
        ("sam_rho", float("inf"), "a finite number from 0 up"),
        ("sam_rho", "0.05", "a finite number from 0 up"),
        ("sam_rho", True, "a finite number from 0 up"),
        ("sam_rho", None, "a finite number from 0 up"),
        ("sam_method", "sma", "one of 'sam', 'asam'"),
        ("sam_method", ["sam"], "one of 'sam', 'asam'"),
        ("sam_eta", -1.0, "a finite number from 0 up"),
        ("sam_adaptive_scope", "weight", "one of 'all', 'weights'"),
        ("sam_scope", "micro", "one of 'batch', 'micro_batch'"),
        ("sam_params", "", "a regular expression"),
        ("sam_params", "layer[", "does not compile"),
        ("sam_params", None, "a regular expression"),
        ("sam_replay_rng", 1, "True or False"),
        ("sam_freeze_norm_stats", "yes", "True or False"),
        ("sam_interval", 0, "a whole number from 1 up"),
        ("sam_interval", 2.0, "a whole number from 1 up"),
        ("sam_interval", True, "a whole number from 1 up"),
        ("sam_start_ratio", 1.1, "a number from 0 to 1"),
        ("sam_ascent_fraction", 0.5, "only 1.0"),
    ],
)
def test_a_bad_value_raises_with_the_field_the_value_and_what_is_allowed(field, value, allowed):
    for build in (SAMConfig, lambda **kw: SAMTrainingArguments(output_dir="unused", **kw)):
        with pytest.raises(ValueError) as caught:
            build(**{field: value})
        message = str(caught.value)
        assert message.startswith(f"{field}={value!r} is not allowed.")
        assert allowed in message


def test_a_misspelt_choice_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 'micro_batch'"):
        SAMConfig(sam_scope="micro-batch")


def test_an_option_of_another_method_warns_that_it_has_no_effect():
    with pytest.warns(UserWarning, match="sam_eta=0.5 has no effect with sam_method='sam'"):
        SAMConfig(sam_eta=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMConfig(sam_method="asam", sam_eta=0.5)
        SAMConfig()


def test_every_field_is_prefixed_and_explained():
    for field in fields(SAMConfig):
        assert field.name.startswith("sam_")
        assert len(field.metadata["help"]) > 20


def test_the_command_line_fills_sam_config_beside_other_arguments_and_inside_one_object(tmp_path):
    line = ["--output_dir", str(tmp_path), "--sam_rho", "0.2", "--sam_scope", "micro_batch"]
    config, args = HfArgumentParser((SAMConfig, TrainingArguments)).parse_args_into_dataclasses(
        line
    )
    (one,) = HfArgumentParser(SAMTrainingArguments).parse_args_into_dataclasses(line)
    for source in (config, one):
        assert (source.sam_rho, source.sam_scope, source.sam_method) == (0.2, "micro_batch", "sam")
    assert args.output_dir == one.output_dir == str(tmp_path)
    line += ["--sam_replay_rng", "false", "--sam_interval", "3"]
    (one,) = HfArgumentParser(SAMTrainingArguments).parse_args_into_dataclasses(line)
    assert (one.sam_replay_rng, one.sam_interval) == (False, 3)


def test_help_prints():
    code = (
        "from transformers import HfArgumentParser; from sam_hf import SAMConfig;"
        "HfArgumentParser(SAMConfig).parse_args(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--{field.name}" in done.stdout for field in fields(SAMConfig))


def test_a_yaml_file_fills_one_object(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}\nsam_rho: 0.3\nsam_method: asam\nsam_eta: 0.0\n")
    (args,) = HfArgumentParser(SAMTrainingArguments).parse_yaml_file(str(path))
    assert (args.sam_rho, args.sam_method, args.sam_eta) == (0.3, "asam", 0.0)
    assert SAMTrainingArguments(**args.to_dict()).sam_rho == 0.3


def test_sam_config_stands_before_any_arguments_class():
    @dataclass
    class Mine(SAMConfig, TrainingArguments):
        mine: int = 3

    args = arguments(Mine, sam_rho=0.4)
    assert args.sam_rho == 0.4 and args.device.type == "cpu"  # both post-inits have run
    with pytest.raises(ValueError, match="sam_rho=-1"):
        arguments(Mine, sam_rho=-1)


def test_the_trainer_reads_its_options_from_sam_config_or_from_its_arguments_but_not_from_both():
    model, data = Classifier(), examples(4)
    assert SAMTrainer(model=model, args=arguments(), train_dataset=data).sam_config == SAMConfig()
    config = SAMConfig(sam_rho=0.2)
    assert sam_trainer(model, data, sam=config).sam_config is config
    args = arguments(SAMTrainingArguments, sam_rho=0.3)
    assert SAMTrainer(model=model, args=args, train_dataset=data).sam_config is args
    with pytest.raises(ValueError, match="Both sam_config and args"):
        SAMTrainer(model=model, args=args, sam_config=config)
    with pytest.raises(TypeError, match=r"sam_config=0\.05"):
        SAMTrainer(model=model, args=arguments(), sam_config=0.05)


def test_options_changed_between_runs_hold_in_the_next_one_and_are_checked_again():
    args = arguments(SAMTrainingArguments, sam_rho=0.1, max_steps=1)
    trainer = SAMTrainer(model=Classifier(), args=args, train_dataset=examples(4))
    for rho in (0.1, 0.4):
        args.sam_rho = rho
        trainer.train()
        (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert log["sam_perturbation_norm"] == pytest.approx(rho)
    args.sam_rho = -1
    with pytest.raises(ValueError, match="sam_rho=-1"):
        trainer.train()

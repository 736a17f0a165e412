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
from sam_hf.methods import METHODS


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
        ("sam_ascent_fraction", 0.0, "a number above 0 to 1"),
        ("sam_ascent_fraction", 1.5, "a number above 0 to 1"),
        ("sam_alpha", -0.1, "a finite number from 0 up"),
        ("sam_k", 0, "a whole number from 1 up"),
        ("sam_gamma", 1.0, "a number from 0 below 1"),
        ("sam_decoupled", 0, "True or False"),
        ("sam_sigma", -1.0, "a finite number from 0 up"),
        ("sam_ema_decay", 1.0, "a number from 0 below 1"),
        ("sam_theta", 0.0, "a number above 0 to 1"),
        ("sam_beta", 1.1, "a number above 0 to 1"),
        ("sam_rank", 1.0, "a whole number from 1 up"),
        ("sam_balance", "gradient", "one of 'gradients', 'weights'"),
        ("sam_trigger", "norm", "one of 'always', 'gradient_norm'"),
        ("sam_trigger_start", float("inf"), "a finite number"),
        ("sam_trigger_end", float("nan"), "a finite number"),
        ("sam_rho_schedule", "lr", "one of 'constant', 'linear', 'cosine', 'learning_rate'"),
        ("sam_rho_warmup_ratio", -0.1, "a number from 0 to 1"),
        ("sam_rho_min", 0.1, "a number from 0 to 0.05"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam_start_ratio": 1.0}, "sam_start_ratio=1.0 leaves no update"),
        (
            {"sam_method": "msam", "sam_replay_rng": False},
            "sam_replay_rng=False has no effect with sam_method='msam'",
        ),
        ({"sam_trigger_start": 2.0}, "sam_trigger_start=2.0 has no effect with sam_trigger="),
        ({"sam_trigger_end": -2.0}, "sam_trigger_end=-2.0 has no effect with sam_trigger="),
        ({"sam_rho_min": 0.01}, "sam_rho_min=0.01 has no effect with sam_rho_schedule="),
        (
            {"sam_rho_schedule": "learning_rate", "sam_rho_warmup_ratio": 0.1},
            "sam_rho_warmup_ratio=0.1 has no effect with sam_rho_schedule=",
        ),
    ],
)
def test_an_option_that_another_one_lets_do_nothing_warns(options, message):
    with pytest.warns(UserWarning, match=message):
        SAMConfig(**options)


# Options that exclude each other: the one that is named, and for which methods.
EXCLUDED = [
    ({"sam_scope": "micro_batch"}, lambda m: m.keeps_gradient() or m.has_one_pass()),
    (
        {"sam_trigger": "gradient_norm"},
        lambda m: m.has_one_pass() or m.has_plain_updates(),
    ),
    ({"sam_scope": "micro_batch", "sam_trigger": "gradient_norm"}, lambda m: True),
    ({"sam_ascent_fraction": 0.5}, lambda m: m.keeps_gradient() or m.has_one_pass()),
    ({"sam_ascent_fraction": 0.5, "sam_trigger": "gradient_norm"}, lambda m: True),
    ({"sam_params": "norms"}, lambda m: not m.perturbs),
    ({"sam_interval": 2}, lambda m: m.has_plain_updates() or m.needs_auxiliary),
    ({"sam_start_ratio": 0.5}, lambda m: m.needs_auxiliary),
    ({"sam_rho_warmup_ratio": 0.5}, lambda m: m.needs_auxiliary),
    ({"sam_rho_schedule": "learning_rate"}, lambda m: m.needs_auxiliary),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("options", "is_excluded"), EXCLUDED)
def test_options_that_exclude_each_other_are_refused_in_one_line_and_no_others(
    options, is_excluded, method
):
    if is_excluded(METHODS[method]):
        with pytest.raises(ValueError) as caught:
            SAMConfig(sam_method=method, **options)
        message = str(caught.value)
        name = message.split("=")[0]
        assert message.startswith(f"{name}={options[name]!r} is not allowed. Allowed: ")
        assert f"sam_method={method!r}" in message or "sam_trigger" in message
    else:
        SAMConfig(sam_method=method, **options)


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

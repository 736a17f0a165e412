"""The options: checked when built, from Python, the command line and YAML."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields

import pytest
from combinations import has_two_passes
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
        ("sam_rho", "small", "a finite number from 0 up, or 'auto' (None)"),
        ("sam_rho", True, "a finite number from 0 up"),
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
        ("sam_trigger", "norm", "one of 'always', 'gradient_norm'"),
        ("sam_trigger_start", float("inf"), "a finite number"),
        ("sam_trigger_end", float("nan"), "a finite number"),
        ("sam_rho_schedule", "lr", "one of 'constant', 'linear', 'cosine', 'learning_rate'"),
        ("sam_rho_warmup_ratio", -0.1, "a number from 0 to 1"),
        ("sam_rho_min", -0.1, "a finite number from 0 up"),
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
            {"sam_method": "msam", "sam_rho": 0.1, "sam_replay_rng": False},
            "sam_replay_rng=False has no effect with sam_method='msam'",
        ),
        ({"sam_trigger_start": 2.0}, "sam_trigger_start=2.0 has no effect with sam_trigger="),
        ({"sam_trigger_end": -2.0}, "sam_trigger_end=-2.0 has no effect with sam_trigger="),
        ({"sam_rho_min": 0.01}, "sam_rho_min=0.01 has no effect with sam_rho_schedule="),
        (
            {"sam_rho": 0.1, "sam_rho_schedule": "learning_rate", "sam_rho_warmup_ratio": 0.1},
            "sam_rho_warmup_ratio=0.1 has no effect with sam_rho_schedule=",
        ),
    ],
)
def test_an_option_that_another_one_lets_do_nothing_warns(options, message):
    with pytest.warns(UserWarning, match=message):
        SAMConfig(**options)


# ---- Options of one method ----------------------------------------------------------------------

# As a dictionary, and as it may stand on the command line.
METHOD_ARGS = [
    ("gsam", {"alpha": 0.4}, "alpha=0.4"),
    ("gsam", {"alpha": 1}, "alpha=1"),
    ("looksam", {"k": 3, "alpha": 0.5}, "k=3,alpha=0.5"),
    ("looksam", {"alpha": 0.001}, "alpha=1e-3"),
    ("wsam", {"gamma": 0.5, "decoupled": False}, "gamma=0.5, decoupled=false"),
    ("wsam", {"decoupled": True}, "decoupled=True"),
    ("friendly_sam", {"sigma": 0.0, "ema_decay": 0.6}, "sigma=0.0,ema_decay=0.6"),
    ("vasso", {"theta": 1.0}, "theta=1.0"),
    ("esam", {"beta": 0.3}, "beta=0.3"),
    ("bilora", {"rank": 4}, "rank=4"),
    ("bar", {"balance": "weights"}, "balance=weights"),
]
METHOD_DEFAULTS = {
    "gsam": {"alpha": 0.6},
    "looksam": {"k": 5, "alpha": 0.7},
    "wsam": {"gamma": 0.9, "decoupled": True},
    "friendly_sam": {"sigma": 1.0, "ema_decay": 0.9},
    "vasso": {"theta": 0.9},
    "esam": {"beta": 0.6},
    "bilora": {"rank": 8},
    "bar": {"balance": "gradients"},
}


@pytest.mark.parametrize(("method", "args", "text"), METHOD_ARGS)
def test_options_of_a_method_are_a_dictionary_json_or_pairs_and_mean_the_same(method, args, text):
    given = dict(args)
    for written in (given, json.dumps(args), text):
        config = SAMConfig(sam_rho=0.1, sam_method=method, sam_method_args=written)
        assert config.sam_method_args == args
        built = config.build_method()
        for name, value in (METHOD_DEFAULTS[method] | args).items():
            assert getattr(built, name) == value
            assert isinstance(getattr(built, name), bool) == isinstance(value, bool)
    assert given == args


@pytest.mark.parametrize(("method", "defaults"), METHOD_DEFAULTS.items())
def test_options_of_a_method_that_are_not_given_have_its_defaults(method, defaults):
    for written in ({}, None):
        built = SAMConfig(sam_rho=0.1, sam_method=method, sam_method_args=written).build_method()
        assert {name: getattr(built, name) for name in defaults} == defaults


def refused(**options) -> str:
    """The error's message, the same of both classes of options."""
    messages = []
    for build in (SAMConfig, lambda **kw: SAMTrainingArguments(output_dir="unused", **kw)):
        with pytest.raises(ValueError) as caught:
            build(**options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert "sam_method_args" in messages[0]
    return messages[0]


@pytest.mark.parametrize(
    ("method", "args", "unknown"),
    [
        ("gsam", {"alhpa": 0.4}, "alhpa"),
        ("gsam", "alhpa=0.4", "alhpa"),
        ("gsam", '{"alhpa": 0.4}', "alhpa"),
        ("looksam", {"k": 3, "gamma": 0.5}, "gamma"),
        ("looksam", {"sam_k": 3}, "sam_k"),
        ("asam", {"adaptive": 0.1}, "adaptive"),
        ("sam", {"alpha": 0.4}, "alpha"),
        ("msam", {"alpha": 0.4}, "alpha"),
        ("sam", "alpha=0.4", "alpha"),
    ],
)
def test_an_option_that_the_method_does_not_have_is_refused_with_those_that_it_has(
    method, args, unknown
):
    message = refused(sam_method=method, sam_method_args=args)
    assert repr(unknown) in message and repr(method) in message
    rest = message.replace(repr(unknown), "")
    assert all(f"'{name}'" in rest for name in METHOD_DEFAULTS.get(method, ()))


@pytest.mark.parametrize(
    ("method", "name", "value", "allowed"),
    [
        ("gsam", "alpha", -0.1, "a finite number from 0 up"),
        ("gsam", "alpha", float("nan"), "a finite number from 0 up"),
        ("gsam", "alpha", "0.4", "a finite number from 0 up"),
        ("gsam", "alpha", True, "a finite number from 0 up"),
        ("gsam", "alpha", [0.4], "a finite number from 0 up"),
        ("looksam", "k", 0, "a whole number from 1 up"),
        ("looksam", "k", 2.0, "a whole number from 1 up"),
        ("looksam", "k", "2", "a whole number from 1 up"),
        ("looksam", "k", True, "a whole number from 1 up"),
        ("looksam", "alpha", -0.1, "a finite number from 0 up"),
        ("wsam", "gamma", 1.0, "a number from 0 below 1"),
        ("wsam", "decoupled", 0, "True or False"),
        ("wsam", "decoupled", "false", "True or False"),
        ("friendly_sam", "sigma", -1.0, "a finite number from 0 up"),
        ("friendly_sam", "ema_decay", 1.0, "a number from 0 below 1"),
        ("vasso", "theta", 0.0, "a number above 0 to 1"),
        ("esam", "beta", 1.1, "a number above 0 to 1"),
        ("bilora", "rank", 1.0, "a whole number from 1 up"),
        ("bar", "balance", "gradient", "one of 'gradients', 'weights'"),
        ("bar", "balance", 1, "one of 'gradients', 'weights'"),
    ],
)
def test_a_bad_value_of_an_option_of_a_method_is_refused_with_what_is_allowed(
    method, name, value, allowed
):
    message = refused(sam_method=method, sam_method_args={name: value})
    assert name in message and repr(value) in message and allowed in message


@pytest.mark.parametrize(
    ("method", "written"),
    [
        ("looksam", "k"),
        ("looksam", "k=3,alpha"),
        ("looksam", "k=2.5"),
        ("looksam", "k=three"),
        ("looksam", '{"k": 3'),
        ("looksam", "{k: 3}"),
        ("looksam", '["k"]'),
        ("looksam", ["k"]),
        ("looksam", 3),
        ("wsam", "decoupled=maybe"),
        ("gsam", "alpha=high"),
    ],
)
def test_what_is_no_dictionary_and_no_text_of_one_is_refused(method, written):
    refused(sam_method=method, sam_method_args=written)


@pytest.mark.parametrize("name", sorted({n for names in METHOD_DEFAULTS.values() for n in names}))
def test_an_option_of_one_method_is_no_field(name):
    for build in (SAMConfig, lambda **kw: SAMTrainingArguments(output_dir="unused", **kw)):
        with pytest.raises(TypeError, match=rf"sam_{name}.*sam_method_args"):
            build(**{f"sam_{name}": 1})


@pytest.mark.parametrize(("method", "args", "text"), METHOD_ARGS)
def test_options_of_a_method_on_the_command_line(method, args, text, tmp_path):
    line = ["--output_dir", str(tmp_path), "--sam_rho", "0.1", "--sam_method", method]
    line.append("--sam_method_args")
    for written in (text, json.dumps(args)):
        parser = HfArgumentParser((SAMConfig, TrainingArguments))
        config, _ = parser.parse_args_into_dataclasses([*line, written])
        (one,) = HfArgumentParser(SAMTrainingArguments).parse_args_into_dataclasses(
            [*line, written]
        )
        assert config.sam_method_args == one.sam_method_args == args


@pytest.mark.parametrize(
    "written", ["alpha: 0.4", "'alpha=0.4'", "'{\"alpha\": 0.4}'"], ids=["mapping", "text", "json"]
)
def test_options_of_a_method_in_a_yaml_file(written, tmp_path):
    path = tmp_path / "run.yaml"
    lines = [f"output_dir: {tmp_path}", "sam_method: gsam", f"sam_method_args:\n  {written}"]
    path.write_text("\n".join(lines))
    (args,) = HfArgumentParser(SAMTrainingArguments).parse_yaml_file(str(path))
    assert args.sam_method_args == {"alpha": 0.4}
    again = SAMTrainingArguments(**args.to_dict())
    assert again.sam_method_args == {"alpha": 0.4}


@pytest.mark.parametrize("written", [{"k": 3, "alpha": 0.5}, "k=3,alpha=0.5"])
def test_options_of_a_method_are_saved_as_a_json_object_and_read_again(written, tmp_path):
    config = SAMConfig(sam_method="looksam", sam_method_args=written)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "sam_config.json").read_text())
    assert saved["sam_method_args"] == {"k": 3, "alpha": 0.5}
    assert SAMConfig.from_pretrained(tmp_path) == config
    other = SAMConfig.from_pretrained(tmp_path, sam_method_args={"k": 2})
    assert other.sam_method_args == {"k": 2}


def test_options_of_a_method_that_are_changed_before_a_run_are_checked_again():
    config = SAMConfig(sam_method="looksam", sam_method_args={"k": 3})
    trainer = sam_trainer(Classifier(), examples(4), sam=config, max_steps=1)
    config.sam_method_args = {"k": 0}
    with pytest.raises(ValueError, match=r"sam_method_args.*a whole number from 1 up"):
        trainer.train()


# ---- Options together ---------------------------------------------------------------------------

# Options that exclude each other: the one that is named, and for which methods.
EXCLUDED = [
    ({"sam_scope": "micro_batch"}, lambda m: m.combines or not has_two_passes(m)),
    (
        {"sam_trigger": "gradient_norm"},
        lambda m: not has_two_passes(m) or m.reuses,
    ),
    ({"sam_scope": "micro_batch", "sam_trigger": "gradient_norm"}, lambda m: True),
    ({"sam_ascent_fraction": 0.5}, lambda m: m.combines or not has_two_passes(m)),
    ({"sam_ascent_fraction": 0.5, "sam_trigger": "gradient_norm"}, lambda m: True),
    ({"sam_params": "norms"}, lambda m: not m.perturbs),
    ({"sam_interval": 2}, lambda m: m.reuses or m.needs_auxiliary),
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
            SAMConfig(sam_rho=0.1, sam_method=method, **options)
        message = str(caught.value)
        name = message.split("=")[0]
        assert message.startswith(f"{name}={options[name]!r} is not allowed. Allowed: ")
        assert f"sam_method={method!r}" in message or "sam_trigger" in message
    else:
        SAMConfig(sam_rho=0.1, sam_method=method, **options)


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


def test_help_prints(capsys):
    with pytest.raises(SystemExit) as end:
        HfArgumentParser(SAMConfig).parse_args(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{field.name}" in printed for field in fields(SAMConfig))


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


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "{existing}/nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sam_hf.config.file.cached_file", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        SAMConfig.from_pretrained(name.format(existing=tmp_path))


@pytest.mark.parametrize("name", ["bert-base-uncased", "org/model"])
def test_a_name_that_may_be_one_on_the_hub_is_looked_for_there(name, monkeypatch):
    def ask(name: str, *_: object, **__: object) -> None:
        raise OSError(f"asked for {name}")

    monkeypatch.setattr("sam_hf.config.file.cached_file", ask)
    with pytest.raises(FileNotFoundError, match=f"asked for {name}"):
        SAMConfig.from_pretrained(name)

"""The image classification script, from the command line to the saved files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from common import experiment, runs
from common.cli import InputError, OptionParser, run_script
from common.experiment import method_name
from PIL import Image
from train_image_classification import (
    DataArguments,
    ModelArguments,
    TrainArguments,
    load_data,
    main,
)
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, pipeline

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_image_classification.py"
TINY = "--use_cpu --config_overrides num_hidden_layers=1,num_attention_heads=2,hidden_size={}"
SHORT = f"{TINY.format(8)} --per_device_train_batch_size 16 --per_device_eval_batch_size 512"
DIGITS = f"{SHORT} --max_train_samples 64 --max_eval_samples 90 --save_strategy no"
DIGITS += " --eval_strategy epoch"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(folder: Path, options: str):
    return main([*options.split(), "--output_dir", str(folder)])


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_digits_job_saves_model_processor_metrics_and_picture(tmp_path, capsys):
    runs = run(
        tmp_path,
        f"{DIGITS} --label_noise 0.5 --sam_rho 0.1 --num_train_epochs 2 --compare_with_plain",
    )
    for name in (
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "all_results.json",
        "trainer_state.json",
        "README.md",
    ):
        assert (tmp_path / name).is_file(), name
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600
    results = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert results["runs"][0]["accuracy"] == saved["eval_accuracy"] == runs[0].score
    assert results["data_arguments"]["label_noise"] == 0.5
    assert results["training_arguments"]["sam_rho"] == 0.1
    output = capsys.readouterr().out
    assert "digits, 50% label noise: 64 training and 90 test images" in output
    for r in runs:
        assert f"{r.score:.4f}\n" in output
    assert [r.name for r in runs] == ["SAM (rho 0.1)", "AdamW"]


def test_the_plain_run_has_the_same_initial_weights_and_exactly_the_same_compute(tmp_path):
    sam, plain = run(
        tmp_path, f"{DIGITS} --num_train_epochs 3 --logging_steps 1 --compare_with_plain"
    )
    assert (sam.epochs, plain.epochs) == (3.0, 6.0)
    assert sam.passes == plain.passes == 6.0
    assert sam.curve[-1][0] == plain.curve[-1][0] == 6.0
    # The logged loss is that at the weights, before the perturbation; the first batch is the same.
    first, plain_first = history(tmp_path)[0], history(tmp_path / "plain")[0]
    assert first["loss"] == plain_first["loss"]
    assert history(tmp_path)[1]["loss"] != history(tmp_path / "plain")[1]["loss"]


def test_equal_compute_takes_into_account_that_sam_may_be_off_in_some_updates(tmp_path):
    sam, plain = run(
        tmp_path, f"{DIGITS} --num_train_epochs 2 --sam_interval 2 --compare_with_plain"
    )
    assert (sam.epochs, plain.epochs) == (2.0, 3.0)
    assert sam.passes == plain.passes == 3.0


def test_the_plain_run_is_the_one_that_the_script_makes_with_rho_0(tmp_path):
    _, compared = run(tmp_path / "a", f"{DIGITS} --num_train_epochs 1 --compare_with_plain")
    (alone,) = run(tmp_path / "b", f"{DIGITS} --num_train_epochs 2 --sam_rho 0")
    assert alone.name == compared.name == "AdamW"
    assert alone.curve == compared.curve
    losses = [
        [entry["eval_loss"] for entry in history(folder) if "eval_loss" in entry]
        for folder in (tmp_path / "a" / "plain", tmp_path / "b")
    ]
    assert losses[0] == losses[1]


def test_the_saved_model_and_processor_give_the_reported_accuracy_and_serve_a_pipeline(tmp_path):
    (result,) = run(
        tmp_path,
        f"{DIGITS} {TINY.format(32)},intermediate_size=64 --max_steps 40 --learning_rate 1e-2",
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    _, _, test, _ = load_data(DataArguments(max_eval_samples=90))
    images = [row["image"] for row in test]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    assert (logits.argmax(-1).numpy() == np.array(test["labels"])).mean() == result.score
    assert len(logits.argmax(-1).unique()) > 2  # a constant prediction would prove little
    label = pipeline("image-classification", model=str(tmp_path))(images[0], top_k=1)[0]["label"]
    assert label == str(logits[0].argmax().item())


def test_a_run_is_repeated_exactly_by_its_seed(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, f"{DIGITS} --max_steps 3 --seed {seed} --augment")
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_what_is_finished_is_kept_when_the_plain_half_is_interrupted(tmp_path, monkeypatch):
    def train(trainer, name, *args, **kwargs):
        if name == "AdamW":
            raise KeyboardInterrupt
        return runs.train(trainer, name, *args, **kwargs)

    monkeypatch.setattr(experiment, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"{DIGITS} --num_train_epochs 1 --sam_rho 0.1 --compare_with_plain")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["name"] for each in results["runs"]] == ["SAM (rho 0.1)"]
    assert "64 training and 90 test images" in results["data"]


def test_a_run_that_is_resumed_ends_where_it_would_have_ended(tmp_path, capsys):
    options = DIGITS.replace("--save_strategy no", "--save_strategy epoch --num_train_epochs 2")
    run(tmp_path / "a", options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-4").rename(tmp_path / "b" / "checkpoint-4")
    run(tmp_path / "b", f"{options} --resume_from_checkpoint last")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert saved[0] == saved[1]
    assert "keys in the checkpoint" not in capsys.readouterr().err
    with pytest.raises(InputError, match="holds checkpoint-8 of an earlier run"):
        run(tmp_path / "a", options)


def write_folder(folder: Path, classes: tuple[str, ...], size: tuple[int, int] = (12, 12)) -> Path:
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(80 * number, 80 * number + 80, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_an_image_folder_trains_and_a_pretrained_model_continues_from_its_weights(tmp_path):
    folder = write_folder(tmp_path / "data", ("cat", "dog"))
    first, held_out = tmp_path / "first", "--eval_fraction 0.34"
    (result,) = run(first, f"{SHORT} --dataset_name {folder} {held_out} --augment --max_steps 2")
    model = AutoModelForImageClassification.from_pretrained(first)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.image_size == 12  # that of the first image
    assert 0 <= result.score <= 1

    options = f"--model_name_or_path {first} --use_cpu --learning_rate 0 --max_steps 1 {held_out}"
    (again,) = run(tmp_path / "again", f"{options} --dataset_name {folder}")
    assert again.score == result.score  # learning rate 0: the pretrained weights were used

    three = write_folder(tmp_path / "three", ("cat", "dog", "cow"))
    with pytest.raises(InputError, match="You set `ignore_mismatched_sizes` to `False`"):
        run(tmp_path / "x", f"{options} --dataset_name {three}")
    run(tmp_path / "x", f"{options} --dataset_name {three} --ignore_mismatched_sizes")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "x").config.num_labels == 3


def test_weights_are_loaded_in_fp32_whatever_the_checkpoint_is_stored_in(tmp_path):
    folder = write_folder(tmp_path / "data", ("cat", "dog"))
    options = f"--dataset_name {folder} --eval_fraction 0.34 --max_steps 1"
    run(tmp_path / "a", f"{SHORT} {options}")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    run(tmp_path / "b", f"--use_cpu --model_name_or_path {tmp_path / 'a'} {options}")
    stored = AutoModelForImageClassification.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in stored.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model_name_or_path {tmp}/nowhere", "--model_name_or_path: there is no folder"),
        (
            "--model_name_or_path x --config_overrides hidden_size=8",
            "--config_overrides has no effect with --model_name_or_path",
        ),
        ("--ignore_mismatched_sizes", "--ignore_mismatched_sizes has no effect without --model"),
        ("--config_overrides patch_size=3", "patch_size=3 must divide image_size=8"),
        (
            "--config_overrides hidden_size=9,num_attention_heads=2",
            "--config_overrides: num_attention_heads=2 must divide hidden_size=9",
        ),
        ("--config_overrides depth=10", "--config_overrides 'depth=10': key depth isn't in"),
        ("--config_overrides hidden_size", "--config_overrides 'hidden_size': "),
        (
            "--model_type wide_resnet --config_overrides hidden_size=8",
            "--config_overrides 'hidden_size=8': key hidden_size isn't in",
        ),
        ("--model_type wide_resnet --config_overrides depth=12", "depth=12 is not allowed. Allow"),
        ("--model_type wide_resnet --config_overrides dropout=1", "dropout=1.0 is not allowed"),
        ("--model_type resnet", "--model_type.*: invalid choice: .resnet."),
        ("--model_name_or_path x --model_type vit", "--model_type has no effect with --model_name"),
        (
            "--max_train_samples 64 --dataloader_drop_last true --per_device_train_batch_size 99",
            "--dataloader_drop_last: no batch in 64 examples",
        ),
        ("--sam_rho 0 --compare_with_plain", "--compare_with_plain has no effect with --sam_rho 0"),
        ("--torch_num_threads 0", "--torch_num_threads must be 1 or more, got 0"),
        ("--sam_rho -1", "sam_rho=-1.0 is not allowed"),
        ("--report_to wandb", "wandb"),
        (
            "--dataset_name {tmp}/wide --eval_fraction 0.34",
            "--config_overrides image_size=... is needed: 9 x 5 images",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_training(tmp_path, options, message):
    write_folder(tmp_path / "wide", ("cat", "dog"), size=(5, 9))
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", f"{options} --max_steps 1".format(tmp=tmp_path))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_input_from_the_command_line_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("common.cli.logging.disable_progress_bar", lambda: None)
    folder = write_folder(tmp_path / "data", ("cat", "dog"))
    (tmp_path / "key.yaml").write_text("sam_roh: 1")
    for options in (
        ["nowhere.yaml"],
        [str(tmp_path / "key.yaml")],
        ["--train_file", "nowhere.parquet"],
        ["--dataset_name", str(folder), "--eval_fraction", "0.3", "--label_column", "breed"],
        ["--dataset_name", str(folder / "cat"), "--eval_fraction", "0.3"],
        ["--label_noise", "2"],
    ):
        with pytest.raises(SystemExit) as end:
            run_script(main, [*options, "--output_dir", str(tmp_path / "out")])
        assert end.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if line and "Generating" not in line]
        assert len(lines) == 1, lines
        assert "error: " in lines[0]


@pytest.mark.slow
def test_the_script_runs_as_a_program_from_any_folder_and_leaves_with_its_exit_code(tmp_path):
    (tmp_path / "key.yaml").write_text("sam_roh: 1")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "key.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    # Above it stands what bitsandbytes, where it is installed, prints when it is imported.
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(
        "train_image_classification.py: error: key.yaml: unknown key 'sam_roh' "
        "(did you mean sam_rho?)\n"
    )


def test_the_model_is_pushed_with_its_card_only_if_asked(tmp_path, monkeypatch):
    pushed, repositories = [], []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: repositories.append(1))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **card: pushed.append((self, card)))
    run(tmp_path / "a", f"{DIGITS} --max_steps 1")
    assert pushed == repositories == []
    card = (tmp_path / "a" / "README.md").read_text()
    assert "trained from scratch on the digits dataset" in card
    assert "- image-classification" in card
    run(tmp_path / "b", f"{DIGITS} --max_steps 1 --push_to_hub --compare_with_plain")
    trainer, card = pushed[-1]  # `save_model` pushes too, before the metrics are there
    assert len(repositories) == 1  # none for the plain run
    assert trainer.args.sam_rho != 0
    assert card["tasks"] == "image-classification"
    assert card["dataset"] == "digits"


@pytest.mark.parametrize(
    "file",
    ["digits_asam", "vit_cifar10", "vit_cifar10_small", "wrn_cifar10", "wrn_cifar10_small"],
)
def test_the_configs_are_valid(file):
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments))
    data_args, model_args, training_args = parser.parse([str(ROOT / "configs" / f"{file}.yaml")])
    assert training_args.sam_rho != 0
    assert training_args.output_dir == f"outputs/{file}"
    assert (data_args.dataset_name is not None) == (model_args.model_name_or_path is not None)
    assert (model_args.model_type == "wide_resnet") == file.startswith("wrn")


def test_the_configs_of_the_wide_resnet_differ_in_size_alone():
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments))
    read = [parser.parse([f"{ROOT}/configs/wrn_cifar10{end}.yaml"]) for end in ("", "_small")]
    sizes = [m.config_overrides for _, m, _ in read]
    assert sizes == ["depth=16,width=8,dropout=0.0", "depth=10,width=1"]
    for data_args, _, args in read:
        assert data_args.augment
        assert (args.optim, args.optim_args) == ("sgd", "momentum=0.9")
        assert (args.learning_rate, args.weight_decay) == (0.1, 5e-4)
        assert (args.label_smoothing_factor, args.sam_rho) == (0.1, 0.05)
        assert args.sam_adaptive_scope == "all"  # what ASAM's rho of 2 is for


def test_the_plain_run_is_named_after_its_optimizer(tmp_path):
    def name(**options):
        return method_name(TrainArguments(str(tmp_path), use_cpu=True, **options))

    assert name(sam_method="asam", sam_rho=0.5) == "ASAM (rho 0.5)"
    assert name(sam_rho=0.0) == "AdamW"
    assert name(sam_rho=0.0, optim="sgd") == "SGD"
    assert name(sam_rho=0.0, optim="adafactor") == "adafactor"

"""The metric, the count of compute and the picture that the training scripts share."""

from __future__ import annotations

import os
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from common.training_utils import Run, format_runs, load_metric, plot_curves, train
from PIL import Image
from sklearn.metrics import accuracy_score
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from sam_hf import SAMConfig, SAMTrainer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


def test_the_metric_agrees_with_scikit_learn_and_writes_no_data_file(tmp_path):
    random = np.random.default_rng(0)
    predictions, references = random.integers(0, 5, (2, 101))
    metric = load_metric("classification", "single_label_classification")
    for _ in range(2):  # it may be used again
        result = metric.compute(predictions=predictions, references=references)
        assert result["accuracy"] == accuracy_score(references, predictions)
    # Files would be locked: two runs at once would wait for each other.
    assert not [file for file in (tmp_path / "metrics").rglob("*") if file.is_file()]


def test_the_metric_needs_no_cache_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "file" / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "file" / "metrics")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metric = load_metric("classification", "single_label_classification")
    assert metric.compute(predictions=[1, 0], references=[1, 1])["accuracy"] == 0.5


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 4, 4, generator=generator), "labels": index % 2}


def tiny_trainer(folder: Path, sam: dict | None = None, **options) -> SAMTrainer:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=4,
        patch_size=2,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": False,  # its default depends on how much transformers logs
        **options,
    }
    return SAMTrainer(
        model=ViTForImageClassification(config),
        args=TrainingArguments(**args),
        train_dataset=Images(),
        eval_dataset=Images(),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        sam_config=SAMConfig(**(sam or {})),
    )


@pytest.mark.parametrize(
    ("sam", "options", "passes"),
    [
        ({"sam_rho": 0.0}, {}, 2.0),
        ({}, {}, 4.0),
        ({"sam_scope": "micro_batch"}, {"gradient_accumulation_steps": 3}, 4.0),
        ({}, {"gradient_accumulation_steps": 3}, 4.0),
        ({"sam_interval": 2}, {}, 3.0),
        ({"sam_start_ratio": 0.5}, {}, 3.0),
        ({}, {"label_smoothing_factor": 0.1}, 4.0),  # the Trainer keeps the labels from the model
    ],
)
def test_each_forward_backward_pass_over_the_training_data_is_counted_once(
    tmp_path, sam, options, passes
):
    run = train(tiny_trainer(tmp_path, sam, **options), "x")
    assert run.epochs == 2.0
    assert run.passes == passes
    assert run.curve[-1] == (passes, run.score)
    assert len(run.curve) == 2  # one point per evaluation, the last one once


def test_the_model_card_shows_results_of_the_evaluation_alone(tmp_path):
    trainer = tiny_trainer(tmp_path)
    train(trainer, "x")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| Accuracy |" in card and "xamples" not in card.split("hyperparameters")[0]
    assert not any("examples" in key for entry in trainer.state.log_history for key in entry)


def test_the_first_metric_is_the_one_that_counts(tmp_path):
    run = train(tiny_trainer(tmp_path), "x", metrics=("loss", "accuracy"))
    assert list(run.scores) == ["loss", "accuracy"]
    assert run.scores["loss"] != run.scores["accuracy"]
    assert (run.metric, run.score) == ("loss", run.scores["loss"])
    assert run.curve[-1] == (4.0, run.score)


def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(tmp_path):
    options = {"save_strategy": "epoch", "sam": {"sam_start_ratio": 0.5}}
    whole = train(tiny_trainer(tmp_path / "a", **options), "x")
    resumed = train(
        tiny_trainer(tmp_path / "b", **options), "x", str(tmp_path / "a" / "checkpoint-3")
    )
    assert (resumed.epochs, resumed.passes) == (whole.epochs, whole.passes) == (2.0, 3.0)
    assert resumed.curve == whole.curve
    assert resumed.score == whole.score


def test_metrics_and_state_are_saved_and_the_bar_replaces_the_lines(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, logging_steps=1)
    run = train(trainer, "SAM (rho 0.05)")
    for name in ("all_results.json", "train_results.json", "eval_results.json"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "trainer_state.json").is_file()
    output = capsys.readouterr()
    assert output.out == ""
    assert "SAM: 100%" in output.err
    assert f"test accuracy {run.score:.3f}" in output.err


RUNS = [
    Run("ASAM (rho 2)", 2.0, 4.0, {"f1": 0.9, "accuracy": 0.7}, 1.5, [(2.0, 0.5), (4.0, 0.9)]),
    Run("AdamW", 4.0, 4.0, {"f1": 0.8, "accuracy": 0.6}, 1.5, [(1.0, 0.4), (4.0, 0.8)]),
]


def test_the_table_has_a_line_per_run_with_its_scores_and_compute():
    header, first, second = format_runs(RUNS).splitlines()
    assert header.split() == ["epochs", "passes", "seconds", "test", "f1", "test", "accuracy"]
    assert first.split() == ["ASAM", "(rho", "2)", "2", "4", "2", "0.9000", "0.7000"]
    assert second.split() == ["AdamW", "4", "4", "2", "0.8000", "0.6000"]
    assert len(header) == len(first) == len(second)


def test_the_picture_is_drawn_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delitem(os.environ, "DISPLAY", raising=False)
    plot_curves(RUNS, "digits", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10

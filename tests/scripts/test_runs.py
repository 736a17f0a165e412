"""Training runs: count of compute, scores, progress bar, table and picture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from common.runs import Run, format_runs, plot_curves, train
from PIL import Image
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from sam_hf import SAMConfig, SAMTrainer


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
        ({}, {"label_smoothing_factor": 0.1}, 4.0),  # the model gets no labels
    ],
)
def test_each_forward_backward_pass_over_the_training_data_is_counted_once(
    tmp_path, sam, options, passes
):
    run = train(tiny_trainer(tmp_path, sam, **options), "x", ["accuracy"])
    assert run.epochs == 2.0
    assert run.passes == passes
    assert run.curve[-1] == (passes, run.score)
    assert len(run.curve) == 2  # one point per evaluation, the last one once


def test_the_model_card_shows_results_of_the_evaluation_alone(tmp_path):
    trainer = tiny_trainer(tmp_path)
    train(trainer, "x", ["accuracy"])
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| Accuracy |" in card and "xamples" not in card.split("hyperparameters")[0]
    assert not any("examples" in key for entry in trainer.state.log_history for key in entry)


def test_the_first_metric_is_the_one_that_counts(tmp_path):
    run = train(tiny_trainer(tmp_path), "x", ["loss", "accuracy"])
    assert list(run.scores) == ["loss", "accuracy"]
    assert run.scores["loss"] != run.scores["accuracy"]
    assert run.score == run.scores["loss"]
    assert run.curve[-1] == (4.0, run.score)


def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(tmp_path):
    options = {"save_strategy": "epoch", "sam": {"sam_start_ratio": 0.5}}
    whole = train(tiny_trainer(tmp_path / "a", **options), "x", ["accuracy"])
    resumed = train(
        tiny_trainer(tmp_path / "b", **options),
        "x",
        ["accuracy"],
        str(tmp_path / "a" / "checkpoint-3"),
    )
    assert (resumed.epochs, resumed.passes) == (whole.epochs, whole.passes) == (2.0, 3.0)
    assert resumed.curve == whole.curve
    assert resumed.score == whole.score


def test_the_test_data_are_scored_at_the_end_alone_if_the_curve_is_that_of_validation_data(
    tmp_path,
):
    trainer, test = tiny_trainer(tmp_path), torch.utils.data.Subset(Images(), [0, 1, 2])
    run = train(trainer, "x", ["accuracy"], test_dataset=test)
    logged = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert run.curve == [(2.0, logged[0]), (4.0, logged[1])] and run.curve_data == "validation"
    assert run.score == logged[2] == trainer.evaluate(test)["eval_accuracy"]


def test_a_final_loss_that_is_not_finite_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="x: the final loss is nan: lower --learning_rate"):
        train(tiny_trainer(tmp_path, {"sam_rho": 0.0}, learning_rate=1e30), "x", ["accuracy"])


def test_metrics_and_state_are_saved_and_the_bar_replaces_the_lines(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, logging_steps=1)
    run = train(trainer, "SAM (rho 0.05)", ["accuracy"])
    for name in ("all_results.json", "train_results.json", "eval_results.json"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "trainer_state.json").is_file()
    output = capsys.readouterr()
    assert output.out == ""
    assert "SAM: 100%" in output.err
    assert f"eval_accuracy={run.score:.3f}" in output.err


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

"""`report_to`: the options are among the hyperparameters, the readings among the metrics."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch
from tiny import Classifier, arguments, examples
from transformers import TrainerCallback, TrainingArguments

from sam_hf import SAMConfig, SAMTrainer, SAMTrainingArguments

OPTIONS = {"sam_method": "asam", "sam_rho": 0.5}


def reporting_trainer(way, **args):
    """`way`: the options stand beside plain arguments, or in them."""
    beside = way == "beside"
    args_class = TrainingArguments if beside else SAMTrainingArguments
    return SAMTrainer(
        model=Classifier(),
        args=arguments(args_class, **args, **({} if beside else OPTIONS)),
        train_dataset=examples(12),
        eval_dataset=examples(4),
        sam_config=SAMConfig(**OPTIONS) if beside else None,
    )


def readings(trainer):
    """Step -> the readings in the trainer's own history."""
    return {
        entry["step"]: {name: x for name, x in entry.items() if name.startswith("sam_")}
        for entry in trainer.state.log_history
        if "loss" in entry
    }


@pytest.mark.parametrize("way", ["beside", "inside"])
def test_tensorboard_shows_options_and_curves(tmp_path, monkeypatch, way):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    trainer = reporting_trainer(way, report_to="tensorboard")
    trainer.train()

    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    (said,) = events.Tensors("args/text_summary")[0].tensor_proto.string_val
    hyperparameters = json.loads(said)
    assert hyperparameters["learning_rate"] == 0.1
    assert SAMConfig(**OPTIONS).to_sam_dict().items() <= hyperparameters.items()

    expected = readings(trainer)
    assert "sam_sharpness" in expected[1] and "sam_share_norms" in expected[1]
    for name in expected[1]:
        curve = {point.step: point.value for point in events.Scalars(f"train/{name}")}
        assert curve == pytest.approx({step: values[name] for step, values in expected.items()})


def test_trackio_shows_options_and_curves(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    trainer = reporting_trainer("beside", report_to="trackio", project="sam", run_name="one")
    trainer.evaluate()  # starts the report
    trainer.train()

    (run,) = trackio.Api().runs("sam")
    assert SAMConfig(**OPTIONS).to_sam_dict().items() <= run.config.items()
    logged = trackio.SQLiteStorage.get_logs("sam", "one")
    curve = [entry["train/sam_sharpness"] for entry in logged if "train/sam_sharpness" in entry]
    assert curve == [values["sam_sharpness"] for values in readings(trainer).values()]
    assert len(curve) == 3 and any(tmp_path.iterdir())


class Fails(TrainerCallback):
    def on_train_begin(self, args, *rest, **kwargs):
        assert pickle.loads(pickle.dumps(args)).to_dict()["sam_rho"] == 0.5
        raise RuntimeError("no connection")


@pytest.mark.parametrize("fails", [False, True])
def test_the_arguments_of_the_user_stay_as_they_were(fails):
    trainer = reporting_trainer("beside", save_strategy="steps", save_steps=3)
    before, handler = dict(vars(trainer.args)), dict(vars(trainer.callback_handler))
    if fails:
        trainer.add_callback(Fails)
        with pytest.raises(RuntimeError, match="no connection"):
            trainer.train()
    else:
        trainer.train()
        saved = f"{trainer.args.output_dir}/checkpoint-3/training_args.bin"
        assert "sam_rho" not in torch.load(saved, weights_only=False).to_dict()
    assert vars(trainer.args) == before and vars(trainer.callback_handler).keys() == handler.keys()
    assert "sam_rho" not in trainer.args.to_dict()

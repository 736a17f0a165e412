"""Updates that pass SAM by, and searches that would leave its options out, are stopped."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from tiny import Classifier, arguments, assert_same_bits, examples, sam_trainer, weights
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from sam_hf import SAMConfig, SAMTrainer, SAMTrainingArguments, with_sam


class OwnLoop(Trainer):
    """A trainer with a loop of its own, as PPO's: which events it reports is up to it."""

    reports: tuple[str, ...] = ()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.create_optimizer()
        report = self.callback_handler
        self.control = report.on_train_begin(self.args, self.state, self.control)
        for row in self.train_dataset.rows[:2]:
            self.model(**default_collate([row]))["loss"].backward()
            if "on_pre_optimizer_step" in self.reports:
                report.on_pre_optimizer_step(self.args, self.state, self.control)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            if "on_step_end" in self.reports:
                report.on_step_end(self.args, self.state, self.control)
        report.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_end", "on_train_end"])
def test_a_training_loop_without_the_training_step_raises(event):
    class Loop(OwnLoop):
        reports = (event,)

    model = Classifier()
    before = weights(model)
    trainer = sam_trainer(model, examples(8), with_sam(Loop))
    with pytest.raises(RuntimeError, match="SAMLoop updates the weights without the training_step"):
        trainer.train()
    assert trainer.state.global_step == {"on_pre_optimizer_step": 0, "on_step_end": 1}.get(event, 2)
    if event == "on_pre_optimizer_step":
        assert_same_bits(model, before)


def test_a_training_loop_of_its_own_is_free_to_train_with_rho_0():
    trainer = sam_trainer(Classifier(), examples(8), with_sam(OwnLoop), sam={"sam_rho": 0.0})
    assert trainer.train().global_step == 2


def test_a_run_with_nothing_left_to_do_ends_in_peace(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    sam_trainer(Classifier(), examples(8), max_steps=2, **options).train()
    trainer = sam_trainer(Classifier(), examples(8), max_steps=2, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 2


def test_a_run_that_fails_keeps_no_inputs_of_the_update_that_it_left():
    class Fails(Trainer):
        inputs: ClassVar[list[weakref.ref]] = []

        def compute_loss(self, model, inputs, **kwargs):
            self.inputs.append(weakref.ref(inputs["x"]))
            if len(self.inputs) == 2:
                raise KeyboardInterrupt
            return super().compute_loss(model, inputs, **kwargs)

    trainer = sam_trainer(
        Classifier(), examples(24), with_sam(Fails), gradient_accumulation_steps=4
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._sam_training is None
    gc.collect()
    assert len(Fails.inputs) == 2 and not any(ref() is not None for ref in Fails.inputs)


def search(trainer: Any, name: str) -> None:
    trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_float(name, 0.01, 0.1)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=1,
        backend="optuna",
    )


@pytest.mark.parametrize(
    ("args_class", "name"), [(TrainingArguments, "sam_rho"), (SAMTrainingArguments, "sam_roh")]
)
def test_a_search_over_an_option_that_is_not_there_raises(args_class, name):
    pytest.importorskip("optuna")
    sam = {"sam_config": SAMConfig()} if args_class is TrainingArguments else {}
    trainer = SAMTrainer(
        model_init=lambda: Classifier(),
        args=arguments(args_class),
        train_dataset=examples(8),
        eval_dataset=examples(4),
        **sam,
    )
    with pytest.raises(ValueError, match=rf"{name}=.*which {args_class.__name__} does not have"):
        search(trainer, name)


def test_the_ascent_records_the_outermost_call_of_compute_loss_alone():
    class Nested(Trainer):
        """Computes its loss from a call of itself, as some do to get at the outputs."""

        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            Nested.calls += 1
            if return_outputs:
                return super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, **kwargs)
            return loss + 0.1 * outputs["logits"].square().mean()

    class Flat(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return loss + 0.1 * outputs["logits"].square().mean()

    models = []
    for trainer_class in (Nested, Flat):
        torch.manual_seed(0)
        trainer = sam_trainer(
            Classifier(), examples(24), with_sam(trainer_class), gradient_accumulation_steps=2
        )
        trainer.train()
        models.append(trainer.model)
    assert_same_bits(models[0], weights(models[1]))
    assert Nested.calls == 2 * 2 * 2 * 3  # nested, passes, micro-batches, updates

"""Making trainers: the order of the bases, with_sam, and subclasses of every kind."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights
from transformers import Seq2SeqTrainer, Trainer

from sam_hf import SAMTrainer, SAMTrainerMixin, with_sam


class Mine(Trainer):
    pass


def test_the_mixin_behind_the_trainer_raises_when_the_class_is_made():
    with pytest.raises(
        TypeError, match=r"class Wrong\(Mine, SAMTrainerMixin\).*before the trainer"
    ):

        class Wrong(Mine, SAMTrainerMixin):
            pass

    with pytest.raises(TypeError):
        type("Wrong", (Trainer, SAMTrainerMixin), {})


def test_with_sam_makes_one_subclass_of_any_trainer():
    made = with_sam(Mine)
    assert made.__name__ == "SAMMine" and issubclass(made, (SAMTrainerMixin, Mine))
    assert made.__mro__.index(SAMTrainerMixin) < made.__mro__.index(Mine)
    assert with_sam(Mine) is made
    assert with_sam(SAMTrainer) is SAMTrainer and with_sam(made) is made
    assert with_sam(Seq2SeqTrainer).__name__ == "SAMSeq2SeqTrainer"


@pytest.mark.parametrize("wrong", [5, "Trainer", dict, torch.nn.Module])
def test_with_sam_of_something_else_raises(wrong):
    with pytest.raises(TypeError, match=r"is not allowed\. Allowed: transformers\.Trainer"):
        with_sam(wrong)


def updated(trainer_class, **kwargs):
    torch.manual_seed(0)
    trainer = sam_trainer(Classifier(dropout=0.2), examples(16), trainer_class, **kwargs)
    trainer.train()
    return trainer


def pops_labels(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
    return (loss, outputs) if return_outputs else loss


class PopsAbove(SAMTrainer):
    """Overrides compute_loss on top of SAMTrainer, without calling super."""

    compute_loss = pops_labels


class PopsBelow(Trainer):
    compute_loss = pops_labels


class UsesOutputs(Trainer):
    """A training step of its own, which asks for the outputs too."""

    factor = 1.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss, _ = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        loss = self.factor * loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class Rescales(UsesOutputs):
    factor = 0.5


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("trainer_class", [PopsAbove, with_sam(PopsBelow), with_sam(UsesOutputs)])
def test_a_subclass_with_a_loss_or_step_of_its_own_trains_as_the_plain_class_does(
    trainer_class, scope
):
    options = {"sam": {"sam_scope": scope}, "gradient_accumulation_steps": 2}
    expected = updated(SAMTrainer, **options)
    actual = updated(trainer_class, **options)
    for name, value in weights(expected.model).items():
        torch.testing.assert_close(actual.model.state_dict()[name], value, rtol=0, atol=1e-14)


class Counts(SAMTrainer):
    """Keeps counters, metric lists and running tensors, as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.tokens = 0, torch.zeros(())
        self.metrics = {"train": {}}

    def compute_loss(self, model, inputs, **kwargs):
        self.calls += 1
        self.tokens += inputs["x"].numel()
        self.metrics["train"].setdefault("mean", []).append(inputs["x"].mean().item())
        self.state.num_input_tokens_seen += inputs["x"].numel()
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_counters_metric_lists_and_running_tensors_count_once(scope):
    trainer = updated(Counts, sam={"sam_scope": scope}, gradient_accumulation_steps=2, max_steps=2)
    assert trainer.calls == 4
    assert trainer.tokens == trainer.state.num_input_tokens_seen == 16 * 5
    assert len(trainer.metrics["train"]["mean"]) == 4


class Prepares(SAMTrainer):
    prepared = 0

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        return super()._prepare_inputs(inputs)


def test_inputs_are_prepared_once():
    assert updated(Prepares, max_steps=3).prepared == 3


class Measures(SAMTrainer):
    """Calls compute_loss without gradients in addition to the training pass."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        with torch.no_grad():
            self.compute_loss(model, dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_loss_that_is_only_measured_is_not_replayed():
    torch.manual_seed(0)
    expected = sam_trainer(Classifier(), examples(16))
    expected.train()
    torch.manual_seed(0)
    trainer = sam_trainer(Classifier(), examples(16), Measures)
    trainer.train()
    assert_same_bits(trainer.model, weights(expected.model))


class NeverComputes(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class Bypasses(SAMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (with_sam(NeverComputes), "SAMNeverComputes.training_step never called compute_loss"),
        (with_sam(Rescales), r"SAMRescales.training_step returned 0\.5 times what compute_loss"),
        (Bypasses, "Bypasses updates the weights without the training_step of SAMTrainerMixin"),
    ],
)
def test_a_training_step_that_sam_cannot_replay_raises_at_the_first_step(trainer_class, message):
    model = Classifier()
    before = weights(model)
    trainer = sam_trainer(model, examples(8), trainer_class)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert_same_bits(model, before)
    trainer = sam_trainer(model, examples(8), trainer_class, sam={"sam_rho": 0.0})
    trainer.train()  # plain training is their own affair


class OwnsAParameter(SAMTrainer):
    """A loss with a parameter of its own, which the model does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([*self.model.parameters(), self.scale], lr=0.0)
        return self.optimizer

    def compute_loss(self, model, inputs, **kwargs):
        return self.scale * super().compute_loss(model, inputs, **kwargs)


def test_a_parameter_outside_the_model_gets_the_gradient_of_the_second_pass_alone():
    seen = []

    class Watches(OwnsAParameter):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append((float(self.scale.grad), float(loss)))
            return loss

    trainer = sam_trainer(Classifier(), examples(4), Watches, sam={"sam_rho": 0.3}, max_steps=1)
    trainer.train()
    sharpness = trainer.state.log_history[0]["sam_sharpness"]
    (gradient, loss) = seen[0]
    assert gradient == pytest.approx(loss + sharpness, abs=1e-12)  # dL/dscale = L(w + e) at scale 1


def test_the_classes_can_be_pickled_by_name():
    assert pickle.loads(pickle.dumps(SAMTrainer)) is SAMTrainer


class RescalesInPlace(UsesOutputs):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss *= 0.1
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_loss_that_is_rescaled_in_place_is_refused_too():
    trainer = sam_trainer(Classifier(), examples(8), with_sam(RescalesInPlace))
    with pytest.raises(RuntimeError, match=r"returned 0\.1 times what compute_loss returned"):
        trainer.train()


class ComputesBefore(SAMTrainer):
    """Runs a part of the model before compute_loss."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return inputs | {"x": inputs["x"] * self.model.first.weight[0]}


def test_an_input_that_was_computed_with_gradients_is_refused():
    trainer = sam_trainer(Classifier(), examples(8), ComputesBefore)
    with pytest.raises(RuntimeError, match=r"shape \(4, 5\).*computed with gradients before"):
        trainer.train()

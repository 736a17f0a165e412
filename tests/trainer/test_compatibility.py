"""Batches, losses and steps of every kind, held to the float64 twin."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference_sam import sam_step
from tiny import (
    Classifier,
    LanguageModel,
    Rows,
    arguments,
    assert_same_bits,
    examples,
    sam_trainer,
    sentences,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import IterableDataset, default_collate
from transformers import Trainer
from twin_runs import RHO, assert_same_run, assert_weights, by_the_twin, losses, means, share

from sam_hf import SAMConfig, SAMTrainer, with_sam


class Configured(Classifier):
    """Label smoothing reads the model's config."""

    config = transformers.PretrainedConfig()


# --- The batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_short_last_window_is_the_twins_update_over_the_micro_batches_it_has(scope):
    model, data = Classifier(), examples(10)
    rows = list(data)
    windows = [[rows[0:2], rows[2:4], rows[4:6]], [rows[6:8], rows[8:10]]]
    expected = by_the_twin(model, means(model, windows), scope=scope)
    sam_trainer(
        model,
        data,
        sam={"sam_rho": RHO, "sam_scope": scope},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=-1,
        num_train_epochs=1,
    ).train()
    assert_weights(model, expected)


class Stream(IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_an_iterable_dataset_gives_the_update_of_a_map_style_one():
    def run(data: Any) -> nn.Module:
        torch.manual_seed(0)
        model = Classifier(dropout=0.3)
        sam_trainer(model, data, sam={"sam_rho": RHO}, gradient_accumulation_steps=2).train()
        return model

    rows = list(examples(24))
    assert_same_bits(run(Stream(rows)), weights(run(Rows(rows))))


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_what_an_iterable_dataset_leaves_over_is_replayed_with_the_next_epochs_first_window(scope):
    # The Trainer steps after every second micro-batch of an epoch. Of five, it keeps the gradient
    # of the last one, divided by the one micro-batch that its window had, for the next epoch.
    model, rows = Classifier(), list(examples(10))
    one, two, three, four, five = (rows[i : i + 2] for i in range(0, 10, 2))
    by_two = means(model, [[one, two], [three, four], [one, two]])
    by_two[2] += means(model, [[five]])[0]
    expected = by_the_twin(model, by_two, scope=scope)
    sam_trainer(
        model,
        Stream(rows),
        sam={"sam_rho": RHO, "sam_scope": scope},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    ).train()
    assert_weights(model, expected)


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_num_items_in_batch_divides_both_passes_by_the_tokens_of_the_whole_update(scope):
    model, data = LanguageModel(), sentences(8)
    loss, rows = share(model), list(data)
    updates = []
    for window in (rows[:4], rows[4:]):
        n = sum((row["labels"] != -100).sum() for row in window)
        micro = [default_collate(window[:2]), default_collate(window[2:])]
        updates.append([lambda w, b=b, n=n: loss(w, b, num_items_in_batch=n) for b in micro])
    expected = by_the_twin(model, updates, scope=scope)
    sam_trainer(
        model,
        data,
        sam={"sam_rho": RHO, "sam_scope": scope},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
    ).train()
    assert_weights(model, expected)


# --- The loss -------------------------------------------------------------------------------------


class PopsLabels(SAMTrainer):
    """Spoils its inputs, and computes the loss of the model all the same."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, x = inputs.pop("labels"), inputs.pop("x")
        outputs = model(x=x.clone())
        loss = cross_entropy(outputs["logits"], labels.clone())
        labels.zero_()
        x.zero_()
        return (loss, outputs) if return_outputs else loss


def run_with_loss(trainer_class: type = SAMTrainer, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    args = {"label_smoothing_factor": kwargs.pop("label_smoothing_factor", 0.0)}
    trainer = sam_trainer(
        Configured(dropout=0.3),
        examples(24),
        trainer_class,
        sam={"sam_rho": RHO},
        trainer_kwargs=kwargs,
        gradient_accumulation_steps=2,
        **args,
    )
    trainer.train()
    return trainer


def test_a_subclass_that_pops_and_overwrites_its_inputs_trains_as_one_that_does_not():
    assert_same_run(run_with_loss(PopsLabels), run_with_loss())


def test_compute_loss_func_and_label_smoothing_see_the_labels_in_both_passes():
    smoothing, counts = 0.2, []

    def smooth(outputs, labels, num_items_in_batch=None):
        counts.append((len(labels), int(num_items_in_batch)))
        loss = cross_entropy(outputs["logits"], labels, reduction="sum", label_smoothing=smoothing)
        return loss / num_items_in_batch

    by_func = run_with_loss(compute_loss_func=smooth)
    by_argument = run_with_loss(label_smoothing_factor=smoothing)
    assert counts == [(4, 8)] * 12  # 3 updates, 2 micro-batches, 2 passes
    # The Trainer's label smoother adds up in float32, whatever the model is in.
    assert_close(weights(by_func.model), weights(by_argument.model), rtol=1e-6, atol=1e-8)
    assert losses(by_func) == pytest.approx(losses(by_argument), rel=1e-6)
    assert not torch.allclose(by_func.model.first.weight, run_with_loss().model.first.weight)


def test_parameters_of_the_loss_that_are_not_the_models_take_the_gradient_of_the_second_pass():
    class Scaled(SAMTrainer):
        scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) * self.scale.exp()

        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD([*self.model.parameters(), self.scale], lr=0.1)
            return self.optimizer

    class Both(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(Scaled.scale.detach().clone())

        def forward(self, **inputs: Any) -> dict[str, Tensor]:
            return {"loss": self.inner(**inputs)["loss"] * self.scale.exp()}

    model, rows = Classifier(), list(examples(4))
    both = Both(model)
    perturbed = [name != "scale" for name, _ in both.named_parameters()]
    expected = by_the_twin(both, means(both, [[rows]]), perturbed=perturbed)
    sam_trainer(model, Rows(rows), Scaled, sam={"sam_rho": RHO}, max_steps=1).train()
    assert_close(Scaled.scale.detach(), expected.pop("scale"), rtol=1e-12, atol=0)
    assert_weights(model, {name.removeprefix("inner."): w for name, w in expected.items()})


class DrawsAfterwards(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        torch.rand(3), np.random.rand(), random.random()
        return loss


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_an_update_leaves_the_random_state_that_the_first_pass_leaves(scope):
    def run(trainer_class: type) -> tuple[Any, ...]:
        transformers.set_seed(0)
        sam_trainer(
            Classifier(dropout=0.3),
            examples(24),
            trainer_class,
            sam={"sam_rho": RHO, "sam_scope": scope},
            gradient_accumulation_steps=2,
        ).train()
        return torch.get_rng_state().tolist(), np.random.rand(), random.random()

    assert run(with_sam(DrawsAfterwards)) == run(DrawsAfterwards)


def test_every_generator_gives_the_second_pass_what_it_gave_the_first():
    model, draws = Classifier(), []
    model.register_forward_pre_hook(
        lambda *_: draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
    )
    sam_trainer(model, examples(24), gradient_accumulation_steps=2).train()
    for i in range(0, 12, 4):
        assert draws[i : i + 2] == draws[i + 2 : i + 4]
    assert len(set(draws)) == 6


# --- The step -------------------------------------------------------------------------------------


def test_max_grad_norm_clips_the_gradient_at_the_perturbed_weights():
    model, data = Classifier(), examples(12)
    rows = list(data)
    updates = means(model, [[rows[0:4]], [rows[4:8]], [rows[8:12]]])
    expected = by_the_twin(model, updates, clip=0.05)
    trainer = sam_trainer(model, data, sam={"sam_rho": RHO}, max_grad_norm=0.05)
    trainer.train()
    assert_weights(model, expected)
    assert all(log["grad_norm"] > 0.05 for log in trainer.state.log_history if "loss" in log)


def test_a_custom_optimizer_and_schedule_are_used_as_they_are():
    model, data = Classifier(), examples(12)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.05, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    twin = Classifier()
    twin.load_state_dict(model.state_dict())
    by_hand = torch.optim.RMSprop(twin.parameters(), lr=0.05, momentum=0.5)
    for i, lr in enumerate([0.05, 0.025, 0.0125]):
        [shares] = means(twin, [[data.rows[4 * i : 4 * i + 4]]])
        names = [name for name, _ in twin.named_parameters()]
        w = [p.detach() for p in twin.parameters()]
        g_s, _ = sam_step(w, [lambda w: shares[0](dict(zip(names, w, strict=True)))], RHO)  # noqa: B023
        for p, g in zip(twin.parameters(), g_s, strict=True):
            p.grad = g
        by_hand.param_groups[0]["lr"] = lr
        by_hand.step()

    kwargs = {"optimizers": (optimizer, schedule)}
    trainer = sam_trainer(model, data, sam={"sam_rho": RHO}, trainer_kwargs=kwargs)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert type(optimizer) is torch.optim.RMSprop
    assert_weights(model, dict(twin.named_parameters()))


def test_model_init_gives_every_run_of_train_a_model_of_its_own():
    data = examples(12)

    def model_init() -> nn.Module:
        return Classifier(dropout=0.3)

    args = arguments(seed=5)
    trainer = SAMTrainer(
        model_init=model_init, args=args, train_dataset=data, sam_config=SAMConfig(sam_rho=RHO)
    )
    trainer.train()
    first, after_first = trainer.model, weights(trainer.model)
    trainer.train()
    assert trainer.model is not first
    assert_same_bits(trainer.model, after_first)
    assert_same_bits(first, after_first)
    transformers.set_seed(5)
    model, random_state = model_init(), torch.get_rng_state()
    given = sam_trainer(model, data, sam={"sam_rho": RHO}, seed=5)
    torch.set_rng_state(random_state)
    given.train()
    assert_same_bits(trainer.model, weights(given.model))

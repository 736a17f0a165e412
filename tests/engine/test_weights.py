"""Weights and buffers of every kind, in tiny models that have one property each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_asam import asam_step
from reference_sam import sam_perturbation
from tiny import (
    CLASSES,
    FEATURES,
    VOCABULARY,
    Classifier,
    Rows,
    assert_same_bits,
    examples,
    sam_trainer,
    sentences,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback
from twin_runs import RHO, assert_weights, by_the_twin, means

from sam_hf import SAMTrainer

SCOPES = pytest.mark.parametrize("scope", ["batch", "micro_batch"])


def train(
    model: nn.Module, rows: list[Any], scope: str, trainer_class: type = SAMTrainer, **sam: Any
) -> None:
    """Two updates of two micro-batches of two rows."""
    sam_trainer(
        model,
        Rows(rows),
        trainer_class,
        sam={"sam_rho": RHO, "sam_scope": scope, **sam},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
    ).train()


def windows(rows: list[Any]) -> list[list[list[Any]]]:
    return [[rows[0:2], rows[2:4]], [rows[4:6], rows[6:8]]]


class Tokens(nn.Module):
    """An embedding and a head over all positions; the loss is a mean over tokens."""

    def __init__(self, tied: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, sparse=sparse, dtype=torch.float64)
        self.head = nn.Linear(6, VOCABULARY, dtype=torch.float64)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        return {"loss": cross_entropy(logits.flatten(0, 1), input_ids.flatten()), "logits": logits}


@SCOPES
def test_a_tied_weight_is_perturbed_once_by_its_whole_gradient(scope):
    model, rows = Tokens(tied=True), list(sentences(8))
    expected = by_the_twin(model, means(model, windows(rows)), scope=scope)
    train(model, rows, scope)
    assert expected.keys() == {"embedding.weight", "head.bias"}
    assert_weights(model, expected)
    assert model.head.weight is model.embedding.weight


@SCOPES
def test_frozen_weights_keep_their_bits_in_both_passes_and_the_others_take_the_twins_update(scope):
    model, rows = Classifier(), list(examples(8))
    frozen = [model.first.weight.requires_grad_(False), model.second.bias.requires_grad_(False)]
    before = [p.clone() for p in frozen]
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append([p.clone() for p in frozen]))
    expected = by_the_twin(model, means(model, windows(rows)), scope=scope)
    del seen[:]
    train(model, rows, scope)
    assert len(seen) == 8
    for values in [*seen, frozen]:
        assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    assert all(p.grad is None for p in frozen)
    assert_weights(model, expected)


class Branches(nn.Module):
    """Which of two layers is used hangs on the sign of a weight that the perturbation turns."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(1e-4 * sign, dtype=torch.float64))
        self.above = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        self.below = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        self.unused = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        layer = self.above if self.gate > 0 else self.below
        # The loss falls towards zero from either side, so that the ascent crosses it.
        loss = cross_entropy(layer(x), labels) - self.gate * self.gate.detach().sign()
        return {"loss": loss}


@SCOPES
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parameters_without_gradient_in_one_pass_take_the_gradient_of_the_second_alone(scope, sign):
    model, rows = Branches(sign), list(examples(8))
    used = {1.0: ("above", "below"), -1.0: ("below", "above")}[sign]
    before = weights(model)
    expected = by_the_twin(model, means(model, [[rows[:4]]]), scope=scope)
    without_gradient = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            without_gradient.extend(n for n, p in model.named_parameters() if p.grad is None)

    sam_trainer(
        model,
        Rows(rows),
        sam={"sam_rho": RHO, "sam_scope": scope},
        trainer_kwargs={"callbacks": [Look()]},
        max_steps=1,
    ).train()
    # Not zero: a decay of the weights, or a momentum, would move them.
    assert without_gradient == [
        f"{name}.{p}" for name in sorted((used[0], "unused")) for p in ("weight", "bias")
    ]
    assert_weights(model, expected)
    first, second = (f"{name}.weight" for name in used)
    after = weights(model)
    assert torch.equal(after[first], before[first])  # a gradient at w only
    assert not torch.equal(after[second], before[second])  # a gradient at w + e only
    assert torch.equal(after["unused.weight"], before["unused.weight"])


@SCOPES
def test_a_sparse_embedding_that_is_not_perturbed_trains_as_a_dense_one(scope):
    model, rows = Tokens(sparse=True), list(sentences(8))
    dense = Tokens()
    dense.load_state_dict(model.state_dict())
    expected = by_the_twin(
        dense, means(dense, windows(rows)), scope=scope, perturbed=[False, True, True]
    )

    class WithoutNorm(SAMTrainer):
        """The Trainer's own norm of the gradient does not know sparse ones."""

        def _get_grad_norm(self, model, grad_norm=None):
            return None

    train(model, rows, scope, WithoutNorm, sam_params="head")
    assert model.embedding.sparse
    assert_weights(model, expected)


class Normalised(nn.Module):
    """BatchNorm, with a cumulative average in one layer and a momentum in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)
        self.second = nn.Linear(6, CLASSES, dtype=torch.float64)
        self.last = nn.BatchNorm1d(CLASSES, momentum=None, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.second(torch.relu(self.norm(self.first(x)))))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "sam", [{"sam_scope": "batch"}, {"sam_scope": "micro_batch"}, {"sam_freeze_norm_stats": False}]
)
def test_running_statistics_see_each_batch_once_at_the_unperturbed_weights(sam, compiled):
    def run(trainer_class: type) -> nn.Module:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Normalised()
        args = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        sam_trainer(
            model,
            examples(24),
            trainer_class,
            sam={"sam_rho": RHO, **sam},
            gradient_accumulation_steps=2,
            learning_rate=0.0,  # both see the same weights in every update
            **args,
        ).train()
        return model

    plain, ours = run(Trainer), run(SAMTrainer)
    if "sam_freeze_norm_stats" in sam:
        assert ours.norm.num_batches_tracked == 2 * plain.norm.num_batches_tracked == 12
    else:
        assert_same_bits(ours, weights(plain))


@SCOPES
def test_a_batchnorm_model_takes_the_twins_update(scope):
    model, rows = Normalised(), list(examples(8))
    model.norm.track_running_stats = model.last.track_running_stats = False
    expected = by_the_twin(model, means(model, windows(rows)), scope=scope)
    model.norm.track_running_stats = model.last.track_running_stats = True
    train(model, rows, scope)
    assert_weights(model, expected)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.head = nn.Linear(4, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.conv(x)).mean(dim=(2, 3)))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


@SCOPES
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_whose_channels_come_last_in_memory_take_the_twins_update(scope, adaptive):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64)
    rows = [{"x": image, "labels": i % CLASSES} for i, image in enumerate(images)]
    model = Convolution().to(memory_format=torch.channels_last)
    step = {"step": asam_step, "eta": 0.01} if adaptive else {}
    expected = by_the_twin(model, means(model, windows(rows)), scope=scope, **step)
    train(model, rows, scope, **({"sam_method": "asam", "sam_eta": 0.01} if adaptive else {}))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_weights(model, expected)


# --- Weights stored in half precision: one warning ------------------------------------------------


class HalfStored(nn.Module):
    """A layer in half precision and one in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.narrow = nn.Linear(5, 64, dtype=dtype)
        self.wide = nn.Linear(64, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.narrow(x.to(self.narrow.weight.dtype)).float()
        return {"loss": cross_entropy(self.wide(hidden), labels)}


def caught(train: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        train()
    return [str(m.message) for m in messages if "half precision" in str(m.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_half_precision_weights_warn_once_with_the_share_of_them_that_did_not_move(scope, dtype):
    model, rho, data = HalfStored(dtype), 0.01, examples(16, dtype=torch.float32)
    loss = model(**default_collate(data.rows[:4]))["loss"]
    g = torch.autograd.grad(loss, list(model.parameters()))
    e = sam_perturbation([g_i.double() for g_i in g], rho)
    stuck = total = 0
    for p, e_i in zip(model.narrow.parameters(), e[:2], strict=True):
        stuck += int(((p.double() + e_i).to(dtype) == p).sum())
        total += p.numel()
    assert 0.02 < stuck / total < 0.98

    trainer = sam_trainer(
        model,
        data,
        sam={"sam_rho": rho, "sam_scope": scope},
        gradient_accumulation_steps=2 if scope == "micro_batch" else 1,
    )
    [message] = caught(trainer.train)
    shares = re.findall(r"(\d+\.\d)%", message)
    assert [float(share) for share in shares] == pytest.approx([100 * stuck / total], abs=1.0)
    assert "float32" in message and "bf16=True" in message


def test_an_update_that_perturbs_nothing_is_not_the_one_whose_share_is_told():
    class Overflows(SAMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.inf if self.state.global_step == 0 else loss

    trainer = sam_trainer(
        HalfStored(torch.bfloat16),
        examples(8, dtype=torch.float32),
        Overflows,
        sam={"sam_rho": 0.05},
        learning_rate=0.0,
    )
    messages = caught(trainer.train)
    assert len(messages) <= 1 and not any("100.0%" in message for message in messages)


def test_float32_weights_computed_in_half_precision_do_not_warn():
    model = Classifier(dtype=torch.float32)
    trainer = sam_trainer(model, examples(8, dtype=torch.float32), bf16=True)
    assert caught(trainer.train) == []


def test_half_precision_weights_that_are_not_perturbed_do_not_warn():
    model, data = HalfStored(torch.bfloat16), examples(8, dtype=torch.float32)
    trainer = sam_trainer(model, Rows(data.rows), sam={"sam_params": "wide"})
    assert caught(trainer.train) == []
    assert len(caught(sam_trainer(model, data, sam={"sam_params": "narrow"}).train)) == 1


class SparseByCall(nn.Module):
    """A table whose sparse gradient shows in no module, only when it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        rows = torch.nn.functional.embedding(labels, self.table, sparse=True)
        return {"loss": rows.square().mean()}


def test_a_sparse_gradient_that_no_module_announces_raises_with_the_parameters_name():
    trainer = sam_trainer(SparseByCall(), examples(4))
    with pytest.raises(RuntimeError, match=r"table: the gradient is sparse.*sparse=False"):
        trainer.train()


class TwoTasks(nn.Module):
    """Each example has a branch of its own: the other one has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(2, 1, dtype=torch.float64)
        self.right = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        branch = self.left if labels[0] == 0 else self.right
        return {"loss": branch(x).square().mean()}


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_micro_batch_that_touches_nothing_perturbed_gives_its_plain_gradient(scope):
    rows = [
        {"x": torch.ones(2, dtype=torch.float64) * (i + 1), "labels": torch.tensor(i % 2)}
        for i in range(4)
    ]
    results = []
    for sam in ({"sam_params": "left", "sam_scope": scope, "sam_rho": 0.3}, {"sam_rho": 0.0}):
        torch.manual_seed(0)
        model = TwoTasks()
        trainer = sam_trainer(
            model, Rows(rows), sam=sam, per_device_train_batch_size=1, max_steps=4
        )
        trainer.train()
        results.append(weights(model))
        if sam["sam_rho"]:
            readings = [e for e in trainer.state.log_history if "loss" in e]
            assert ["sam_sharpness" in e for e in readings] == [True, False, True, False]
    perturbed, plain = results
    for name in plain:
        assert torch.equal(perturbed[name], plain[name]) == name.startswith("right")

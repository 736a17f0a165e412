"""Models of transformers, held to two passes written by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from real_models import (
    REAL,
    audio,
    bart,
    gpt2,
    language,
    llama,
    pictures,
    resnet,
    sequence_to_sequence,
    spectra,
    wav2vec2,
    whisper,
)
from tiny import (
    CHECKPOINTING,
    Rows,
    sam_trainer,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother
from twin_runs import RHO

# --- Two passes by hand ---------------------------------------------------------------------------


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def by_hand(
    model: nn.Module,
    batches: list[Any],
    rho: float,
    *,
    lr: float = 0.1,
    replay_rng: bool = True,
    context: Callable[[], Any] = nullcontext,
    loss_of: Callable[..., Tensor] = lambda model, batch: model(**batch)["loss"],
) -> None:
    """SGD with SAM, one batch to an update, in the plainest way. Changes the model."""
    model.train()
    parameters = list(model.parameters())

    def gradient(batch: Any) -> list[Tensor | None]:
        model.zero_grad()
        with context():
            loss = loss_of(model, batch())
        loss.backward()
        return [p.grad for p in parameters]

    for batch in batches:
        start = random_state()
        g = gradient(batch)
        norm = torch.cat([x.flatten() for x in g if x is not None]).norm()
        w = [p.detach().clone() for p in parameters]
        buffers, after = copy.deepcopy(dict(model.named_buffers())), random_state()
        if replay_rng:
            set_random_state(start)
        with torch.no_grad():
            for p, x in zip(parameters, g, strict=True):
                if x is not None:
                    p.add_(x, alpha=rho / norm.item())
        g_s = gradient(batch)
        if replay_rng:
            set_random_state(after)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for p, w_i, x in zip(parameters, w, g_s, strict=True):
                p.copy_(w_i if x is None else w_i - lr * x)


class Start(TrainerCallback):
    """The model and the random state at the beginning of the first update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.model, self.random_state = copy.deepcopy(model), random_state()


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return sum(((x.double() - y.double()) ** 2).sum().item() for x, y in pairs) ** 0.5


def assert_as_by_hand(
    model: nn.Module,
    rows: list[Any],
    tolerance: float = 1e-6,
    rho: float = RHO,
    sam: dict[str, Any] | None = None,
    by_hand_options: dict[str, Any] | None = None,
    **args: Any,
) -> nn.Module:
    """Three updates of the trainer leave the weights and buffers that three by hand leave.

    The error is measured against what SAM changes, so that plain training is a clear failure.
    """
    start, sam = Start(), sam or {}
    trainer = sam_trainer(
        model,
        Rows(rows),
        sam={"sam_rho": rho, **sam},
        trainer_kwargs={"callbacks": [start]},
        per_device_train_batch_size=len(rows) // 3,
        **args,
    )
    trainer.train()
    size = len(rows) // 3
    batches = [
        lambda i=i: copy.deepcopy(default_collate(rows[i : i + size]))
        for i in range(0, len(rows), size)
    ]
    ends = []
    for its_rho in (rho, 0.0):
        model_by_hand = copy.deepcopy(start.model)
        set_random_state(start.random_state)
        replay_rng = sam.get("sam_replay_rng", True)
        by_hand(model_by_hand, batches, its_rho, replay_rng=replay_rng, **(by_hand_options or {}))
        ends.append(model_by_hand)
    effect = distance(ends[0], ends[1])
    assert effect > 1e-4
    assert distance(trainer.model, ends[0]) < tolerance * effect
    return trainer.model


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "rows"), REAL, ids=[model.__name__ for model, _ in REAL])
def test_a_transformers_model_trains_as_by_hand_with_the_same_randomness_in_both_passes(
    model, rows
):
    assert_as_by_hand(model(), rows())


@pytest.mark.parametrize(
    ("model", "rows"), [(wav2vec2, audio), (whisper, spectra), (gpt2, language)]
)
def test_without_replay_the_second_pass_draws_its_own_masks_on_unspoiled_inputs(model, rows):
    assert_as_by_hand(model(), rows(), sam={"sam_replay_rng": False})


# --- What the Trainer does to a model -------------------------------------------------------------


def test_neftune_adds_the_same_noise_in_both_passes():
    def train(**args: Any) -> nn.Module:
        hf.set_seed(0)
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return assert_as_by_hand(gpt2(**still), language(), **args)

    noisy = train(neftune_noise_alpha=5.0)  # the copy that is trained by hand has the hook too
    assert not noisy.get_input_embeddings()._forward_hooks
    assert distance(noisy, train()) > 1e-3


@pytest.mark.parametrize("model", [gpt2, resnet])
def test_bf16_autocast_holds_in_both_passes_and_the_weights_stay_float32(model):
    rows = (
        language()
        if model is gpt2
        else [
            {"pixel_values": row["pixel_values"].float(), "labels": row["labels"]}
            for row in pictures()
        ]
    )
    trained = assert_as_by_hand(
        model().float(),
        rows,
        tolerance=0.02,
        by_hand_options={"context": lambda: torch.autocast("cpu", torch.bfloat16)},
        bf16=True,
    )
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


@pytest.mark.parametrize("model", [gpt2, bart])
def test_label_smoothing_finds_the_labels_in_both_passes(model):
    rows = language() if model is gpt2 else sequence_to_sequence()
    if model is bart:  # without labels, the model cannot make its decoder inputs
        for row in rows:
            row["decoder_input_ids"] = row["labels"].clamp(min=0).roll(1)
    smoother = LabelSmoother(0.3)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return smoother(model(**batch), labels, shift_labels=model.config.model_type == "gpt2")

    assert_as_by_hand(
        model(), rows, by_hand_options={"loss_of": loss_of}, label_smoothing_factor=0.3
    )


@pytest.mark.parametrize("model", [gpt2, llama])
def test_the_split_of_an_update_into_micro_batches_does_not_matter(model):
    rows = language(12)
    for i, row in enumerate(rows):
        row["labels"][2 + i % 5 :] = -100  # a mean over each micro-batch would be another loss

    def run(size: int) -> nn.Module:
        hf.set_seed(0)
        trained = model()
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            module.attention_dropout = 0.0
        sam_trainer(
            trained,
            Rows(rows),
            sam={"sam_rho": RHO},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        ).train()
        return trained

    whole = weights(run(4))
    torch.testing.assert_close(weights(run(1)), whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights(run(2)), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_activation_checkpointing_changes_nothing(scope, reentrant):
    rows = language()

    def run(**args: Any) -> nn.Module:
        hf.set_seed(0)
        model = gpt2()
        sam_trainer(
            model,
            Rows(rows),
            sam={"sam_rho": RHO, "sam_scope": scope},
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **args,
        ).train()
        return model

    checkpointed = run(
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    )
    torch.testing.assert_close(weights(checkpointed), weights(run()), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet"])
def test_a_compiled_transformers_model_trains_as_by_hand(name):
    """Its running statistics too: `assert_as_by_hand` looks at the buffers."""
    [(model, rows)] = [(model, rows) for model, rows in REAL if model.__name__ == name]
    torch._dynamo.reset()
    assert_as_by_hand(model(), rows(), torch_compile=True, torch_compile_backend="aot_eager")

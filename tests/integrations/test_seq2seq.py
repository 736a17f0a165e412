"""`SAMSeq2SeqTrainer`: an encoder-decoder that generates while it is evaluated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference_sam import sam_step
from tiny import Rows, arguments, assert_same_bits, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import default_collate
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from sam_hf import SAMConfig, SAMSeq2SeqTrainer, SAMTrainerMixin, with_sam

RHO = 0.3


def encoder_decoder(dropout: float = 0.0) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=24,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        dropout=dropout,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    return BartForConditionalGeneration(config)


def pairs(n: int = 16) -> Rows:
    g = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(n):
        labels = torch.randint(3, 24, (6,), generator=g)
        labels[int(torch.randint(2, 6, (), generator=g)) :] = -100
        inputs = {"input_ids": torch.randint(3, 24, (7,), generator=g), "labels": labels}
        # As `DataCollatorForSeq2Seq` does: label smoothing hides the labels from the model.
        start = torch.ones(1, dtype=torch.long)
        inputs["decoder_input_ids"] = torch.cat([start, labels[:-1].clamp(min=0)])
        rows.append(inputs)
    return Rows(rows)


def build(
    trainer_class: type, model: nn.Module, sam: dict[str, Any] | None = None, **args: Any
) -> Any:
    options = {"predict_with_generate": True, "generation_max_length": 5, "eval_strategy": "steps"}
    return trainer_class(
        model=model,
        args=arguments(Seq2SeqTrainingArguments, **options | {"eval_steps": 1} | args),
        train_dataset=pairs(),
        eval_dataset=pairs(5),
        compute_metrics=lambda p: {"tokens": int((p.predictions * (p.predictions > 0)).sum())},
        **({} if sam is None else {"sam_config": SAMConfig(**sam)}),
    )


def run(trainer: Any) -> Any:
    torch.manual_seed(0)
    trainer.train()
    return trainer


def logs(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "eval_loss", "eval_tokens", "epoch", "step")
    return [{k: v for k, v in e.items() if k in names} for e in trainer.state.log_history[:-1]]


def test_it_is_what_with_sam_gives():
    assert with_sam(Seq2SeqTrainer) is SAMSeq2SeqTrainer
    assert SAMSeq2SeqTrainer.__mro__[1:3] == (SAMTrainerMixin, *SAMTrainerMixin.__mro__[1:2])


def test_rho_0_is_the_plain_trainer_to_the_last_bit():
    plain = run(build(Seq2SeqTrainer, encoder_decoder(0.1)))
    off = run(build(SAMSeq2SeqTrainer, encoder_decoder(0.1), {"sam_rho": 0.0}))
    assert_same_bits(off.model, weights(plain.model))
    assert logs(off) == logs(plain)


def test_losses_and_generated_tokens_are_those_of_the_plain_trainer():
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    plain = run(build(Seq2SeqTrainer, encoder_decoder(0.1), **options))
    sam = run(build(SAMSeq2SeqTrainer, encoder_decoder(0.1), {"sam_rho": RHO}, **options))
    assert logs(sam) == logs(plain) and len(logs(sam)) == 6
    assert all(entry["eval_tokens"] > 0 for entry in logs(sam) if "eval_loss" in entry)
    assert "sam_sharpness" in sam.state.log_history[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_updates_are_those_of_the_twin(smoothing):
    """Cross-entropy over the tokens of the update; Szegedy et al., arXiv 1512.00567, section 7."""
    model, data = encoder_decoder(), pairs()
    twin = copy.deepcopy(model).double()
    names = [name for name, _ in twin.named_parameters()]
    w = [p.detach().clone() for p in twin.parameters()]

    def share(w: list[Tensor], x: dict[str, Tensor]) -> Tensor:
        named = dict(zip(names, w, strict=True))
        inputs = {key: x[key] for key in ("input_ids", "decoder_input_ids")}
        logits = functional_call(twin, named, kwargs=inputs).logits
        return cross_entropy(logits.flatten(0, 1), x["labels"].flatten(), label_smoothing=smoothing)

    before = w
    for i in range(2):
        batch = default_collate(data.rows[4 * i : 4 * i + 4])
        g_s, _ = sam_step(w, [lambda w, x=batch: share(w, x)], RHO)
        w = [w_i - 0.1 * g for w_i, g in zip(w, g_s, strict=True)]

    run(
        build(
            SAMSeq2SeqTrainer,
            model,
            {"sam_rho": RHO},
            max_steps=2,
            label_smoothing_factor=smoothing,
            eval_strategy="no",
        )
    )
    actual = dict(model.named_parameters())
    expected = dict(zip(names, w, strict=True))
    wrong = sum((actual[n].double() - expected[n]).norm() ** 2 for n in names) ** 0.5
    moved = sum((x - y).norm() ** 2 for x, y in zip(before, w, strict=True)) ** 0.5
    assert wrong < 1e-4 * moved
    assert_close(dict(actual), {n: v.float() for n, v in expected.items()}, rtol=1e-3, atol=1e-4)

"""TRL's trainers with SAM, next to the plain trainer: nothing is counted or adapted twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from inspection import changes_in_second_passes, snapshot
from text_trainers import (
    TRL,
    Row,
    build,
    digits,
    language_model,
    prompts,
    run,
    sentences,
    tokenizer,
)
from tiny import arguments, assert_same_bits, weights
from torch.testing import assert_close
from trl import GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from sam_hf import SAMConfig, SAMTrainerMixin, SAMTrainingArguments, with_sam

RHO = 0.3
ROWS = pytest.mark.parametrize("row", TRL.values(), ids=TRL)


def logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without what SAM adds or changes, and without the clock."""
    return [
        {k: v for k, v in entry.items() if not k.startswith("sam_") and k not in _OTHER}
        for entry in trainer.state.log_history
    ]


_CLOCK = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
_OTHER = _CLOCK | {"grad_norm", "total_flos"}  # the gradient that steps is that at w + e


@pytest.mark.parametrize(
    "row", [row for name, row in TRL.items() if "grpo" in name or "rloo" in name]
)
def test_a_policy_gradient_needs_a_number(row):
    with pytest.raises(ValueError, match=r"sam_rho=None \(auto\) is not allowed with"):
        build(row, {}, max_steps=1).train()


@ROWS
def test_rho_0_is_the_plain_trainer_to_the_last_bit(row):
    plain, off = build(row), build(row, {"sam_rho": 0.0})
    run(plain)
    run(off)
    assert_same_bits(off.model, weights(plain.model))
    assert logs(off) == logs(plain) and len(logs(off)) == 4


@ROWS
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_counts_metrics_coefficients_and_samples_are_those_of_the_plain_trainer(row, scope):
    # With a learning rate of 0 both stay at the same w, so that all that they log is the same.
    plain = build(row, learning_rate=0.0)
    sam = build(row, {"sam_rho": RHO, "sam_scope": scope}, learning_rate=0.0)
    run(plain)
    run(sam)
    assert logs(sam) == logs(plain)
    assert any("sam_sharpness" in entry for entry in sam.state.log_history)
    kept = {k: v for k, v in snapshot(plain).items() if not _is_of_the_method(k)}
    assert kept and {k: v for k, v in snapshot(sam).items() if k in kept} == kept


def _is_of_the_method(path: str) -> bool:
    return any(
        name in path for name in (*_OTHER, "sam_", "flos", "_time", "_dir", "history", "callback")
    )


@ROWS
def test_the_second_pass_leaves_the_trainer_as_it_found_it(row, monkeypatch):
    trainer = build(row, {"sam_rho": RHO})
    changes = changes_in_second_passes(trainer, monkeypatch)
    trainer.train()
    assert len(changes) == trainer.state.global_step > 0
    assert not any(changes), changes


# ---- Ways to write it --------------------------------------------------------------------------


@dataclass
class SAMSFTConfig(SAMConfig, SFTConfig):
    """What users write who want one object."""


class SAMSFTTrainer(SAMTrainerMixin, SFTTrainer):
    """What users write who want a class of their own."""


def test_the_mixin_and_one_object_of_options_do_the_same_as_with_sam():
    row = TRL["sft"]
    expected = build(row, {"sam_rho": RHO})
    args = arguments(
        SAMSFTConfig,
        sam_rho=RHO,
        bf16=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=True,
    )
    actual = SAMSFTTrainer(
        model=language_model(), args=args, train_dataset=sentences(), processing_class=tokenizer()
    )
    assert actual.sam_config is actual.args and actual.args.to_dict()["sam_rho"] == RHO
    run(expected)
    run(actual)
    assert_same_bits(actual.model, weights(expected.model))


def test_arguments_that_trl_would_take_apart_are_refused_in_one_line():
    with pytest.raises(
        TypeError, match=r"sam_config=SAMConfig\(\.\.\.\) in addition, or a class that is"
    ):
        with_sam(SFTTrainer)(
            model=language_model(),
            args=arguments(SAMTrainingArguments, sam_rho=RHO),
            train_dataset=sentences(),
            processing_class=tokenizer(),
        )


# ---- What both passes compute is one function --------------------------------------------------


def assert_no_e_is_the_plain_update(row: Row, scope: str = "batch", **args: Any) -> None:
    """With an e of almost nothing, the second pass must give the gradient of the first."""
    plain, sam = (
        build(row, options, language_model(row.model, dropout=0.1), max_steps=2, **args)
        for options in (None, {"sam_rho": 1e-9, "sam_scope": scope})
    )
    run(plain)
    run(sam)
    for name, p in plain.model.named_parameters():
        assert_close(sam.model.get_parameter(name), p, rtol=1e-4, atol=1e-5)


@ROWS
def test_without_an_e_the_update_is_the_plain_one_dropout_and_coefficients_included(row):
    assert_no_e_is_the_plain_update(row)


def test_coefficients_that_adapt_are_those_of_the_first_pass_in_each_micro_batch():
    assert_no_e_is_the_plain_update(TRL["grpo_adaptive"], scope="micro_batch")


def test_activations_may_be_checkpointed():
    assert_no_e_is_the_plain_update(TRL["sft"], gradient_checkpointing=True)


def test_a_frozen_model_that_is_scored_first_is_not_taken_for_the_policy():
    class Regularised(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            names = ("prompt", "completion")
            ids, mask = (
                torch.cat([inputs[f"{name}_{part}"] for name in names], 1)
                for part in ("ids", "mask")
            )
            length = inputs["completion_ids"].shape[1]
            self._get_per_token_logps_and_entropies(self.frozen, ids, mask, length)
            return super()._compute_loss(model, inputs)

    row, actual = TRL["grpo"], []
    for trainer_class in (GRPOTrainer, Regularised):
        trainer = build(replace(row, trainer=trainer_class), {"sam_rho": RHO}, max_steps=1)
        other = build(row, model=language_model(seed=1)).model
        trainer.frozen = other.requires_grad_(False)
        run(trainer)
        actual.append(weights(trainer.model))
    assert_close(actual[1], actual[0], rtol=0, atol=0)


def test_both_passes_run_in_the_context_that_offloads_activations():
    class Context:
        depth, passes = 0, 0

        def __enter__(self):
            Context.depth += 1

        def __exit__(self, *_):
            Context.depth -= 1

    class Watched(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            Context.passes += Context.depth
            return super().compute_loss(*args, **kwargs)

    trainer = build(replace(TRL["sft"], trainer=Watched), {"sam_rho": RHO}, max_steps=1)
    trainer.maybe_activation_offload_context = Context()
    run(trainer)
    assert Context.passes == 2 * 2 and Context.depth == 0


# ---- Refused -----------------------------------------------------------------------------------


def test_online_dpo_raises_at_the_first_step():
    args = arguments(
        OnlineDPOConfig,
        bf16=False,
        max_new_tokens=4,
        max_length=32,
        missing_eos_penalty=None,
        gradient_checkpointing=False,
    )
    trainer = with_sam(OnlineDPOTrainer)(
        model=language_model(),
        ref_model=language_model(seed=1),
        reward_funcs=digits,
        args=args,
        train_dataset=prompts(),
        processing_class=tokenizer(),
        sam_config=SAMConfig(),
    )
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match=r"SAMOnlineDPOTrainer\.training_step never called"):
        trainer.train()
    assert_same_bits(trainer.model, before)

"""Tiny language models, a tokenizer of characters, and one trainer of each kind for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import trl
from datasets import Dataset, disable_progress_bars
from tiny import arguments
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from sam_hf import SAMConfig, with_sam

disable_progress_bars()

CHARACTERS = "abcdefghij 0123456789"
TEXTS = ["abc 123", "abcdefg 4567", "hij 00", "a 1", "bb 22 cc", "ddd 333", "ee 5", "fgh 67 hi"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    tokens = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def language_model(kind: type = GPT2LMHeadModel, dropout: float = 0.0, seed: int = 0) -> Any:
    """Two layers, 24 tokens, float32. Its weights are large enough for a loss that is not flat."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(CHARACTERS) + 3,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        num_labels=1,
    )
    return kind(config)


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward: how many characters are digits."""
    return [float(sum(character.isdigit() for character in text)) for text in completions]


def sentences() -> Dataset:
    return Dataset.from_dict({"text": TEXTS * 2})


def preferences() -> Dataset:
    columns: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for text in TEXTS * 2:
        columns["prompt"].append(text[:2])
        columns["chosen"].append(text[2:] + " 1")
        columns["rejected"].append(text[2:] + "abc")
    return Dataset.from_dict(columns)


def judged() -> Dataset:
    rows = [(t[:2], t[2:] + " 1", i % 3 != 0) for i, t in enumerate(TEXTS * 2)]
    prompt, completion, label = (list(column) for column in zip(*rows, strict=True))
    return Dataset.from_dict({"prompt": prompt, "completion": completion, "label": label})


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [text[:3] for text in TEXTS * 2]})


@dataclass(frozen=True)
class Row:
    """A trainer of TRL with what it needs."""

    trainer: type
    args: type
    data: Callable[[], Dataset]
    model: type = GPT2LMHeadModel
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: Callable[[], dict[str, Any]] = dict


def _reference() -> dict[str, Any]:
    return {"ref_model": language_model(seed=1)}


def _reward() -> dict[str, Any]:
    return {"reward_funcs": digits}


_SAMPLES = {"num_generations": 2, "max_completion_length": 6}
_ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef": 0.01}

TRL = {
    "sft": Row(trl.SFTTrainer, trl.SFTConfig, sentences),
    "sft_packed": Row(
        trl.SFTTrainer,
        trl.SFTConfig,
        sentences,
        options={"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    ),
    "dpo": Row(trl.DPOTrainer, trl.DPOConfig, preferences, kwargs=_reference),
    "reward": Row(
        trl.RewardTrainer, trl.RewardConfig, preferences, model=GPT2ForSequenceClassification
    ),
    "kto": Row(trl.KTOTrainer, trl.KTOConfig, judged, kwargs=_reference),
    "rloo": Row(
        trl.RLOOTrainer, trl.RLOOConfig, prompts, options={**_SAMPLES, "beta": 0.0}, kwargs=_reward
    ),
    "grpo": Row(trl.GRPOTrainer, trl.GRPOConfig, prompts, options=_SAMPLES, kwargs=_reward),
    "grpo_adaptive": Row(
        trl.GRPOTrainer, trl.GRPOConfig, prompts, options=_SAMPLES | _ADAPTIVE, kwargs=_reward
    ),
    "distillation": Row(
        trl.DistillationTrainer,
        trl.DistillationConfig,
        prompts,
        options={"max_completion_length": 6},
        kwargs=lambda: {"teacher_model": language_model(seed=1)},
    ),
    "cpo": Row(CPOTrainer, CPOConfig, preferences, options={"remove_unused_columns": False}),
    "orpo": Row(ORPOTrainer, ORPOConfig, preferences, options={"remove_unused_columns": False}),
    # The samples of a generation serve several updates: TRL keeps the policy that drew them.
    "grpo_off_policy": Row(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        prompts,
        options={**_SAMPLES, "num_iterations": 2, "loss_type": "grpo"},
        kwargs=_reward,
    ),
}


def build(row: Row, sam: dict[str, Any] | None = None, model: nn.Module | None = None, **args: Any):
    """The trainer of a row: plain if `sam` is None, else with these options of SAM."""
    defaults = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": True,
    }
    kwargs = row.kwargs()
    if sam is not None:
        kwargs["sam_config"] = SAMConfig(**sam)
    return (row.trainer if sam is None else with_sam(row.trainer))(
        model=language_model(row.model) if model is None else model,
        args=arguments(row.args, **(defaults | row.options | args)),
        train_dataset=row.data(),
        processing_class=tokenizer(),
        **kwargs,
    )


def run(trainer: Any) -> None:
    torch.manual_seed(0)  # samples are drawn
    trainer.train()

"""Attention kernels and activation checkpointing: the update is theirs to speed up, not to change.

What the models themselves compute is in `test_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from real_models import gpt2, language, llama
from tiny import Rows, assert_same_bits, sam_trainer, weights
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, set_seed

from sam_hf import SAMTrainer

RHO = 0.3

all_models = pytest.mark.parametrize("make", [gpt2, llama])


def trained(
    make: Callable[[], nn.Module],
    attention: str,
    trainer_class: type = SAMTrainer,
    dropout: bool = False,
    scope: str = "batch",
    **args: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """A float32 model after three updates of two micro-batches, and the logs of them."""
    set_seed(0)
    model = make().float()
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    for module in model.modules() if not dropout else ():
        module.attention_dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer = sam_trainer(
        model,
        Rows(language(12)),
        trainer_class,
        sam={"sam_rho": RHO, "sam_scope": scope},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **args,
    )
    trainer.train()
    return model, [entry for entry in trainer.state.log_history if "loss" in entry]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[n].double() - w.double()).square().sum().item() for n, w in b.items()) ** 0.5


@all_models
@pytest.mark.parametrize("kernel", [None, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_sdpa_and_eager_attention_take_the_same_update(make, kernel):
    plain, _ = trained(make, "eager", Trainer)
    eager, expected = trained(make, "eager")
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        model, logs = trained(make, "sdpa")
    # The error is measured against what SAM changes.
    sam = distance(weights(plain), weights(eager))
    assert sam > 0.1
    assert distance(weights(model), weights(eager)) < 1e-5 * sam
    for ours, theirs in zip(logs, expected, strict=True):
        for name in ("loss", "sam_sharpness", "sam_ascent_grad_norm", "sam_grad_cosine"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)


@all_models
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_recomputes_the_same_bits_in_both_passes(make, attention, reentrant, bf16):
    """With dropout, so the masks too."""
    kept, expected = trained(make, attention, dropout=True, bf16=bf16)
    recomputed, logs = trained(
        make,
        attention,
        dropout=True,
        bf16=bf16,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_same_bits(recomputed, weights(kept))
    assert [e["sam_sharpness"] for e in logs] == [e["sam_sharpness"] for e in expected]

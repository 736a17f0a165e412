"""TRL's trainers with SAM: the plain trainer beside them, float64 twins, and nothing counted twice.

The twins are written from the papers that the trainers implement, on the inputs that the plain
trainer computed its first loss from.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from inspection import snapshot
from reference_sam import sam_step
from text_trainers import TRL, build, digits, language_model, prompts, sentences, tokenizer
from tiny import arguments, assert_same_bits, weights
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from trl import SFTConfig, SFTTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from sam_hf import SAMConfig, SAMTrainerMixin, SAMTrainingArguments, with_sam

RHO = 0.3
ROWS = pytest.mark.parametrize("row", TRL.values(), ids=TRL)


def run(trainer: Any) -> None:
    torch.manual_seed(0)  # samples are drawn
    trainer.train()


def logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without what SAM adds or changes, and without the clock."""
    return [
        {k: v for k, v in entry.items() if not k.startswith("sam_") and k not in _OTHER}
        for entry in trainer.state.log_history
    ]


_CLOCK = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
_OTHER = _CLOCK | {"grad_norm", "total_flos"}  # the gradient that steps is that at w + e


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
    descent, compared = trainer._sam_descent, []

    def watched(*args: Any) -> None:
        before = snapshot(trainer)
        descent(*args)
        after = snapshot(trainer)
        compared.append({k for k in before.keys() | after if before.get(k) != after.get(k)})

    monkeypatch.setattr(trainer, "_sam_descent", watched)
    trainer.train()
    assert compared and all(
        path.startswith("._sam_") or path == ".current_flos" for paths in compared for path in paths
    ), compared


# ---- One update, from the papers ---------------------------------------------------------------


@dataclass
class Twin:
    """A float64 copy of the model, and the reference where there is one."""

    model: Any
    names: list[str]
    reference: Any = None

    def logits(self, w: list[Tensor], **inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, w, strict=True))
        return functional_call(self.model, named, kwargs=inputs).logits

    def logps(self, w: list[Tensor] | None, ids: Tensor, mask: Tensor) -> Tensor:
        """log pi(token | those before it), from the second token on; of the reference for None."""
        inputs = {"input_ids": ids, "attention_mask": mask}
        logits = self.reference(**inputs).logits if w is None else self.logits(w, **inputs)
        return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def sft(twin, w, x, n):
    """Cross-entropy, a mean over the tokens of the update."""
    counted = x["labels"][:, 1:] != -100
    return -(twin.logps(w, x["input_ids"], x["attention_mask"]) * counted).sum() / n


def dpo(twin, w, x, n, beta=0.1):
    """Rafailov et al., arXiv 2305.18290, eq. 7."""
    count = x["completion_mask"][:, 1:]
    ratios = [
        (twin.logps(p, x["input_ids"], x["attention_mask"]) * count).sum(-1) for p in (w, None)
    ]
    chosen, rejected = (ratios[0] - ratios[1]).chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


def reward(twin, w, x, n):
    """Bradley and Terry: -log sigmoid(r_chosen - r_rejected)."""
    scores = twin.logits(w, input_ids=x["input_ids"], attention_mask=x["attention_mask"])
    chosen, rejected = scores[:, 0].chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def kto(twin, w, x, n, beta=0.1):
    """Ethayarajh et al., arXiv 2402.01306, eq. 8; the reference point has no gradient."""

    def ratio(part):
        ids, mask = x[f"{part}input_ids"], x[f"{part}attention_mask"]
        count = x[f"{part}completion_mask"][:, 1:]
        ours, theirs = (twin.logps(p, ids, mask) for p in (w, None))
        return ((ours - theirs) * count).sum(-1)

    z = ratio("KL_").mean().clamp(min=0).detach()
    sign = torch.where(torch.as_tensor(x["label"]), 1.0, -1.0).double()
    return (1 - torch.sigmoid(beta * sign * (ratio("") - z))).mean()


def completion_logps(twin, w, x):
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    mask = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    return twin.logps(w, ids, mask)[:, -x["completion_ids"].shape[1] :]


def clipped(ratio, advantages, epsilon=0.2):
    return torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def rloo(twin, w, x, n):
    """Ahmadian et al., arXiv 2402.14740, with PPO's clipped ratio of whole completions."""
    logp = (completion_logps(twin, w, x) * x["completion_mask"]).sum(-1)
    return -clipped((logp - x["old_logps"]).exp(), x["advantages"]).mean()


def grpo(twin, w, x, n, per_sequence=False):
    """Shao et al., arXiv 2402.03300, eq. 3 without the KL term; DAPO divides by the tokens.

    The policy in the denominator drew the samples: that of TRL's rollout, or of w0.
    """
    mask = x["completion_mask"]
    old = x.get("old_per_token_logps")
    if old is None:
        w0 = [twin.model.get_parameter(name) for name in twin.names]
        old = completion_logps(twin, w0, x).detach()
    ratio = (completion_logps(twin, w, x) - old).exp()
    gain = clipped(ratio, x["advantages"][:, None]) * mask
    if per_sequence:
        return -(gain.sum(-1) / mask.sum(-1)).mean() / 2
    return -gain.sum() / x["num_items_in_batch"]


def grpo_per_sequence(twin, w, x, n):
    return grpo(twin, w, x, n, per_sequence=True)


# Each loss, and what Trainer divides it by: 1 where it is normalised over the update already.
TWINS = {
    "sft": (sft, 1),
    "sft_packed": (sft, 1),
    "dpo": (dpo, 2),
    "reward": (reward, 2),
    "kto": (kto, 2),
    "rloo": (rloo, 2),
    "grpo": (grpo, 1),
    "grpo_off_policy": (grpo_per_sequence, 1),
}


def double(x: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in x.items()
    }


@pytest.mark.parametrize("name", TWINS)
def test_one_update_is_that_of_the_twin(name):
    row, (loss, divisor) = TRL[name], TWINS[name]
    calls: list[tuple[dict[str, Any], Any]] = []

    plain = build(row, max_steps=1)
    compute = plain.compute_loss

    def recorded(model, inputs, *args, num_items_in_batch=None, **kwargs):
        calls.append((double(copy.deepcopy(inputs)), num_items_in_batch))
        return compute(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    plain.compute_loss = recorded
    run(plain)

    model = language_model(row.model).double()
    reference = row.kwargs().get("ref_model")
    twin = Twin(model, [n for n, _ in model.named_parameters()], reference and reference.double())
    w = [p.detach().clone() for p in model.parameters()]
    shares = [
        lambda w, x=x, n=n: loss(twin, w, x, None if n is None else n.double()) / divisor
        for x, n in calls
    ]
    g_s, [readings] = sam_step(w, shares, RHO)
    plain_loss = plain.state.log_history[0]["loss"]
    assert math.isclose(readings.loss, plain_loss, rel_tol=1e-5, abs_tol=1e-6)

    sam = build(row, {"sam_rho": RHO}, max_steps=1)
    run(sam)
    first = sam.state.log_history[0]
    # TRL's trainers may leave out a token of padding or two in float32: the update is the measure.
    expected = {n: w_i - 0.1 * g for n, w_i, g in zip(twin.names, w, g_s, strict=True)}
    step = torch.cat([(expected[n] - w_i).flatten() for n, w_i in zip(twin.names, w, strict=True)])
    actual = {n: p.detach().double() for n, p in sam.model.named_parameters()}
    wrong = torch.cat([(actual[n] - expected[n]).flatten() for n in twin.names])
    plain_w = {n: p.detach().double() for n, p in plain.model.named_parameters()}
    without = torch.cat([(plain_w[n] - expected[n]).flatten() for n in twin.names])
    assert wrong.norm() < 1e-4 * step.norm()
    assert without.norm() > 1e-2 * step.norm()  # the plain update is another one
    assert_close(first["sam_sharpness"], readings.sharpness, rtol=1e-3, atol=1e-6)
    assert abs(readings.sharpness) > 1e-4
    assert_close(first["sam_grad_cosine"], readings.cosine, rtol=1e-3, atol=0)


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
        TypeError, match=r"sam_config=SAMConfig\(\.\.\.\) beside it, or one that is"
    ):
        with_sam(SFTTrainer)(
            model=language_model(),
            args=arguments(SAMTrainingArguments, sam_rho=RHO),
            train_dataset=sentences(),
            processing_class=tokenizer(),
        )


def test_the_same_dropout_masks_and_checkpointed_activations_in_both_passes():
    row, options = TRL["sft"], {"sam_rho": 1e-12}  # e of 0, all but
    updates = []
    for checkpointing in (False, True):
        plain, sam = (
            build(
                row,
                sam,
                language_model(dropout=0.3),
                gradient_checkpointing=checkpointing,
                max_steps=2,
            )
            for sam in (None, options)
        )
        for trainer in (plain, sam):
            run(trainer)
        assert_close(dict(sam.model.named_parameters()), dict(plain.model.named_parameters()))
        updates.append(weights(sam.model))
    assert_close(updates[0], updates[1])


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

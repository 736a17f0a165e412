"""One update of TRL's trainers with SAM, from the papers that the trainers implement.

The float64 twins compute it on the inputs that the plain trainer computed its first loss from.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from reference_sam import sam_step
from text_trainers import TRL, build, language_model, run
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

RHO = 0.3


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
    # transformers 4.57 rounds what it logs to four digits.
    assert math.isclose(readings.loss, plain_loss, rel_tol=1e-5, abs_tol=6e-5)

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

"""Gradient cosine and sharpness against rho: the twin's values, and the suggested radius."""

from __future__ import annotations

import math

import pytest
import torch
from curved import batches
from mlp import MLP
from reference_asam import asam_step
from reference_sam import norm, sam_step
from tiny import Classifier, assert_same_bits, examples, weights
from torch import nn
from torch.func import functional_call

from sam_hf import SAMConfig
from sam_hf.diagnostics import Objective, plot_radius_curve, radius_curve
from sam_hf.diagnostics import radius as radius_module

AUTO = {"sam_rho": None}
ASAM = {**AUTO, "sam_method": "asam"}


@pytest.mark.parametrize("method", ["sam", "asam"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_the_means_over_the_batches_are_those_of_the_twin(method, dtype, tolerance):
    torch.manual_seed(0)
    model, data, radii, eta = MLP(), batches(examples(8), 4), [0.3, 0.02, 3.0], 0.05
    config = SAMConfig(**AUTO) if method == "sam" else SAMConfig(sam_eta=eta, **ASAM)
    step, options = (sam_step, ()) if method == "sam" else (asam_step, (eta,))
    names = [name for name, _ in model.named_parameters()]
    w = [p.detach().clone() for p in model.parameters()]

    def twin(batch, rho):
        def loss(values):
            named = dict(zip(names, values, strict=True))
            return functional_call(reference, named, (), batch)["loss"]

        g_s, (r,) = step(w, [loss], rho, *options)
        return r.cosine, r.sharpness, norm(g_s) / r.g_norm, r.loss

    reference = MLP()
    cast = [{k: x.to(dtype) if x.is_floating_point() else x for k, x in b.items()} for b in data]
    curve = radius_curve(Objective(model.to(dtype), cast), config, radii)
    assert [r.rho for r in curve.readings] == sorted(radii)
    for r in curve.readings:
        rows = [twin(batch, r.rho) for batch in data]
        cosine, sharpness, growth, loss = (sum(x) / len(rows) for x in zip(*rows, strict=True))
        found = [r.cosine, r.sharpness, r.growth, curve.loss]
        assert found == pytest.approx([cosine, sharpness, growth, loss], rel=tolerance)
        assert rows[0] != pytest.approx(rows[1], rel=1e-2)  # the batches differ


class Saddle(nn.Module):
    """L(w) = (w1² - w2²) / 2 + s (w1 + w2) / √2 with w = 0 and slope s of the batch.

    g = s (1, 1) / √2 and g_s - g = rho (1, -1) / √2: at right angles, so that tan θ = rho / s.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, slope):
        a, b = self.w
        return {"loss": (a * a - b * b) / 2 + slope.mean() * (a + b) / math.sqrt(2)}


def saddle(*slopes):
    return Objective(Saddle(), [{"slope": torch.full((2,), s).double()} for s in slopes])


@pytest.mark.parametrize("target", [0.7, 0.9])
@pytest.mark.parametrize("radii", [None, [0.1, 1.0, 10.0]])
def test_the_suggested_radius_of_a_quadratic_is_where_the_cosine_is_the_target(target, radii):
    config = SAMConfig(sam_target_cosine=target, **AUTO)
    curve = radius_curve(saddle(2.0), config, radii)
    assert curve.suggestion == pytest.approx(2 * math.tan(math.acos(target)), rel=1e-9)
    assert curve.reason == "" and len(curve.readings) == len(radii or range(9))
    if radii is None:  # a grid around the suggestion, by factors of 2
        ends = [curve.readings[i].rho / curve.suggestion for i in (0, -1)]
        assert ends == pytest.approx([1 / 16, 16], rel=0.3)
    curve = radius_curve(saddle(2.0, 0.5), config)  # the mean of the logarithms
    assert curve.suggestion == pytest.approx(math.tan(math.acos(target)), rel=1e-9)
    curve = radius_curve(saddle(2.0, 0.0), config)  # a batch without a gradient does not count
    assert curve.suggestion == pytest.approx(2 * math.tan(math.acos(target)), rel=1e-9)
    eta = 0.1  # T = eta at w = 0
    curve = radius_curve(saddle(2.0), SAMConfig(sam_target_cosine=target, sam_eta=eta, **ASAM))
    assert curve.suggestion == pytest.approx(2 * math.tan(math.acos(target)) / eta, rel=1e-9)


class Function(nn.Module):
    """A loss of one pair of weights."""

    def __init__(self, function, start=1.0) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.full((2,), start).double()), function

    def forward(self, x):
        return {"loss": self.function(self.w)}


def function(*args):
    return Objective(Function(*args), [{"x": torch.zeros(2)}])


@pytest.mark.parametrize(
    ("objective", "radii", "reason"),
    [
        (lambda: function(lambda w: 0 * w.sum()), None, "the gradient is zero"),
        (lambda: function(lambda w: (w - 1).abs().sqrt().sum()), None, "no reading is finite"),
        (lambda: function(lambda w: w.sum()), None, "the rule would exceed the largest rho, 1"),
        (lambda: saddle(2.0), [0.01, 0.02], "the rule would exceed the largest rho, 0.02"),
        (lambda: saddle(2.0), [10.0, 20.0], "the rule would fall below the smallest rho, 10"),
    ],
)
def test_where_the_rule_does_not_settle_there_is_a_reason_and_a_plot(
    objective, radii, reason, tmp_path, recwarn
):
    curve = radius_curve(objective(), None, radii)
    assert curve.suggestion is None and curve.reason.startswith(reason)
    assert len(plot_radius_curve(curve, tmp_path / "rho")) == 2
    assert not [str(w.message) for w in recwarn]


def test_a_radius_that_overflows_is_passed_over():
    """L = exp(100 w1) + exp(100 w2): e hardly turns g, so that the rule holds its growth."""
    objective = function(lambda w: (100 * w).exp().sum())
    curve = radius_curve(objective, None, [1e-3, 9e-3, 1.1e-2, 10.0])
    assert not math.isfinite(curve.readings[-1].sharpness)
    growth = 2.0
    assert curve.suggestion == pytest.approx(math.log(growth) * math.sqrt(2) / 100, rel=0.02)


def test_the_radius_is_measured_without_a_trace(monkeypatch):
    torch.manual_seed(0)
    model = Classifier(dropout=0.5)
    model.norm = nn.BatchNorm1d(5, dtype=torch.float64)
    forward = model.forward
    model.forward = lambda x, labels=None: forward(model.norm(x), labels)
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = weights(model), torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    objective, count = Objective(model, batches(examples(8), 4)), [0]
    objective.on_batch = lambda work: count.__setitem__(0, count[0] + 1)
    curve = radius_curve(objective)
    assert curve == radius_curve(objective)  # no dropout
    assert count[0] / 2 <= radius_module.count_passes(2)
    count[0] = 0
    radius_curve(objective, SAMConfig(**ASAM), [0.1, 0.2])
    assert count[0] == radius_module.count_passes(2, [0.1, 0.2]) == 6

    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(radius_module, "cosine_similarity", fails)
    with pytest.raises(KeyboardInterrupt):
        radius_curve(objective)
    assert_same_bits(model, before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert all((p.grad == 1).all() for p in model.parameters())
    assert model.training and all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: radius_curve(saddle(1.0), None, [0.1, -1.0]), "rho=-1.0 is not allowed"),
        (lambda: radius_curve(saddle(1.0), None, [math.inf]), "rho=inf is not allowed"),
        (
            lambda: radius_curve(saddle(1.0), SAMConfig(sam_method="gsam")),
            "sam_method='gsam' is not allowed. Allowed: one of 'sam', 'asam'",
        ),
        (
            lambda: radius_curve(function(lambda w: w.sum() * math.nan)),
            "the loss at the weights is nan: no radius can be measured",
        ),
    ],
)
def test_a_radius_that_cannot_be_measured_is_refused(action, said):
    with pytest.raises(ValueError, match=said):
        action()

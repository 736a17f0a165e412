"""Gradient cosine and sharpness against rho: the twin's values, and the suggested radius."""

from __future__ import annotations

import math

import pytest
import torch
from curved import batches
from mlp import MLP
from reference_asam import asam_step
from reference_sam import sam_step
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

        _, (r,) = step(w, [loss], rho, *options)
        return r.cosine, r.sharpness, r.loss

    reference = MLP()
    cast = [{k: x.to(dtype) if x.is_floating_point() else x for k, x in b.items()} for b in data]
    curve = radius_curve(Objective(model.to(dtype), cast), config, radii)
    assert [r.rho for r in curve.readings] == sorted(radii)
    for r in curve.readings:
        rows = [twin(batch, r.rho) for batch in data]
        cosine, sharpness, loss = (sum(x) / len(rows) for x in zip(*rows, strict=True))
        found = [r.cosine, r.sharpness, curve.loss]
        assert found == pytest.approx([cosine, sharpness, loss], rel=tolerance)
        assert rows[0] != pytest.approx(rows[1], rel=1e-2)  # the batches differ


class Function(nn.Module):
    """A loss of one pair of weights."""

    def __init__(self, function, start=1.0) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.full((2,), start).double()), function

    def forward(self, x):
        return {"loss": self.function(self.w)}


def function(*args):
    return Objective(Function(*args), [{"x": torch.zeros(2)}])


def linear(slope, offset=2.0):
    """L(w) = slope (w1 + w2) / √2 + offset, so that the sharpness is slope times rho."""
    return Objective(
        Function(lambda w: slope * w.sum() / math.sqrt(2) + offset, 0.0), [{"x": torch.zeros(2)}]
    )


@pytest.mark.parametrize("target", [0.25, 0.5])
@pytest.mark.parametrize("radii", [None, [1e-3, 0.1, 10.0]])
@pytest.mark.parametrize(
    ("initial", "share"),  # of the loss of 2
    [(None, 0.02), (2.0, 0.02), (1.0, 0.01), (2.5, 0.5), (9.0, 2.0)],
)
def test_the_suggested_radius_is_where_the_sharpness_reaches_the_goal(
    target, radii, initial, share
):
    config = SAMConfig(sam_target_sharpness=target, **AUTO)
    curve = radius_curve(linear(0.5), config, radii, initial)
    assert curve.goal == pytest.approx(target * share, rel=1e-12)
    assert curve.suggestion == pytest.approx(target * share / 0.5, rel=1e-9)
    assert curve.reason == "" and len(curve.readings) == len(radii or range(9))
    if radii is None:  # a grid around the suggestion, by factors of 2
        ends = [curve.readings[i].rho / curve.suggestion for i in (0, -1)]
        assert ends == pytest.approx([1 / 16, 16], rel=0.3)


@pytest.mark.parametrize(
    ("objective", "radii", "reason"),
    [
        (lambda: function(lambda w: 0 * w.sum()), None, "the gradient is zero"),
        (
            lambda: function(lambda w: (w - 1).abs().sqrt().sum()),
            None,
            "the gradient is not finite",
        ),
        (lambda: function(lambda w: (100 * w).exp().sum(), 0.0), [20.0], "no sharpness is finite"),
        (lambda: function(lambda w: 1 + 1e-9 * w.sum()), None, "the largest rho, "),
        (lambda: linear(0.5), [0.001, 0.002], "the largest rho, 0.002, gives less"),
        (lambda: linear(0.5), [10.0, 20.0], "the smallest rho, 10, gives more"),
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
    """L = exp(100 w1) + exp(100 w2) at w = 0, with e along (1, 1)."""
    objective = function(lambda w: (100 * w).exp().sum(), 0.0)
    curve = radius_curve(objective, None, [1e-5, 7.05e-5, 1e-3, 20.0])
    assert not math.isfinite(curve.readings[-1].sharpness)
    exact = math.log(1.005) * math.sqrt(2) / 100
    assert curve.suggestion == pytest.approx(exact, rel=1e-3)


def test_a_descent_in_between_is_passed_over():
    """L(w) - L(0) is -1 up to |w| = 1 and 2 beyond: the radius that reaches the goal counts."""
    objective = function(lambda w: 1 + w.sum() - 2 * (w.sum() > 0) + 3 * (w.norm() > 1), 0.0)
    assert radius_curve(objective, None, [0.5, 2.0]).suggestion == 2.0


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

    monkeypatch.setattr(radius_module, "_dot", fails)
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
        (lambda: radius_curve(linear(1.0), None, [0.1, -1.0]), "rho=-1.0 is not allowed"),
        (lambda: radius_curve(linear(1.0), None, [math.inf]), "rho=inf is not allowed"),
        (
            lambda: radius_curve(linear(1.0), initial_loss=math.nan),
            "initial_loss=nan is not allowed. Allowed: a finite number",
        ),
        (
            lambda: radius_curve(linear(1.0), SAMConfig(sam_method="gsam")),
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

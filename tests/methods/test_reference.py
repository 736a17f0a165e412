"""The oracles themselves, held to numbers worked out by hand and to torch.optim."""

# ruff: noqa: N802, N803 - the names are the papers' symbols

from __future__ import annotations

import math

import pytest
import torch
from reference_asam import asam_step
from reference_optimizers import adamw_step, clip_by_global_norm, sgd_step
from reference_sam import sam_step
from torch import Tensor
from torch.testing import assert_close

INF = float("inf")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadratic(A: list[list[float]]):
    """L(w) = 1/2 w^T A w over parameters that are each one number."""
    matrix = torch.tensor(A, dtype=torch.float64)

    def L(w: list[Tensor]) -> Tensor:
        return torch.cat(w) @ matrix @ torch.cat(w) / 2

    return L


def two_layer_net(seed: int = 0):
    """w1, w2 and the squared error of x -> w2 w1 x: rescaling w1 against w2 leaves it alone."""
    draw = torch.Generator().manual_seed(seed)
    w1, w2, x, y = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in [(4, 3), (2, 4), (3, 8), (2, 8)]
    )
    columns = [lambda w, i=i: ((w[1] @ w[0] @ x[:, i] - y[:, i]) ** 2).sum() / 8 for i in range(8)]
    return [w1, w2], columns


def total(losses, w) -> float:
    return sum(L(w).item() for L in losses)


# --- SAM ------------------------------------------------------------------------------------------


def test_sam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # g = A w = (3, 4), |g| = 5, e = 0.5 g / 5 = (0.3, 0.4), g_s = A (1.3, 1.4) = (4, 5.5).
    w = [t(1.0), t(1.0)]
    g_s, [readings] = sam_step(w, [quadratic([[2, 1], [1, 3]])], rho=0.5)

    assert_close(readings.e, [t(0.3), t(0.4)], rtol=0, atol=1e-15)
    assert_close(g_s, [t(4.0), t(5.5)], rtol=0, atol=1e-14)
    assert readings.loss == pytest.approx(3.5, abs=1e-14)
    assert readings.sharpness == pytest.approx(6.45 - 3.5, abs=1e-14)
    assert readings.e_norm == pytest.approx(0.5, abs=1e-15)
    assert readings.g_norm == pytest.approx(5.0, abs=1e-14)
    assert readings.cosine == pytest.approx((3 * 4 + 4 * 5.5) / (5 * math.sqrt(46.25)), abs=1e-14)


def test_sam_perturbs_only_the_flagged_parameters_and_normalises_over_them():
    # Only w_2 moves, by rho times the sign of its own gradient: e = (0, 0.5), g_s = A (1, 1.5).
    w = [t(1.0), t(1.0)]
    g_s, [readings] = sam_step(w, [quadratic([[2, 1], [1, 3]])], rho=0.5, perturbed=[False, True])

    assert_close(readings.e, [t(0.0), t(0.5)], rtol=0, atol=0)
    assert_close(g_s, [t(3.5), t(5.5)], rtol=0, atol=1e-14)
    assert readings.g_norm == pytest.approx(4.0, abs=1e-14)
    assert readings.cosine == pytest.approx(1.0, abs=1e-15)


def test_no_step_of_length_rho_raises_the_linearised_loss_more_than_sams():
    w, losses = two_layer_net()
    _, [readings] = sam_step(w, losses, rho=0.1)
    draw = torch.Generator().manual_seed(1)
    leaves = [w_i.clone().requires_grad_() for w_i in w]
    g = torch.autograd.grad(sum(L(leaves) for L in losses), leaves)
    g = torch.cat([g_i.flatten() for g_i in g])
    rise = torch.cat([e_i.flatten() for e_i in readings.e]) @ g
    for _ in range(100):
        d = torch.randn(g.shape, generator=draw, dtype=torch.float64)
        assert rise > 0.1 * d / d.norm() @ g


def test_batch_scope_has_one_e_and_micro_batch_scope_one_for_each_loss():
    # At w = 1 the gradients are 2 and -1. One e: +0.5, g_s = 2(1.5) + (1.5 - 2) = 2.5.
    # Two: +0.5 and -0.5, g_s = 2(1.5) + (0.5 - 2) = 1.5.
    losses = [lambda w: (w[0] ** 2).sum(), lambda w: ((w[0] - 2) ** 2).sum() / 2]

    g_s, readings = sam_step([t(1.0)], losses, rho=0.5)
    assert_close(g_s, [t(2.5)], rtol=0, atol=1e-15)
    assert [r.e[0].item() for r in readings] == [0.5]

    g_s, readings = sam_step([t(1.0)], losses, rho=0.5, scope="micro_batch")
    assert_close(g_s, [t(1.5)], rtol=0, atol=1e-15)
    assert [r.e[0].item() for r in readings] == [0.5, -0.5]


def test_batch_scope_does_not_depend_on_how_the_batch_is_split():
    w, losses = two_layer_net()
    whole, [one] = sam_step(w, [lambda w: sum(L(w) for L in losses)], rho=0.1)
    split, [eight] = sam_step(w, losses, rho=0.1)
    assert_close(split, whole, rtol=0, atol=1e-14)
    assert eight.sharpness == pytest.approx(one.sharpness, abs=1e-14)


@pytest.mark.parametrize("step", [sam_step, lambda *a: asam_step(*a, eta=0.1)])
def test_a_parameter_without_gradient_is_not_perturbed_and_keeps_none(step):
    w = [t(3.0), t(4.0), t(7.0)]
    g_s, [readings] = step(w, [lambda w: (w[0] ** 2 + w[1] ** 2).sum() / 2], 0.5)
    assert g_s[2] is None
    assert readings.e[2].item() == 0
    assert readings.e[0].item() > 0


@pytest.mark.parametrize("step", [sam_step, lambda *a: asam_step(*a, eta=0.1)])
@pytest.mark.parametrize("slope", [0.0, INF, float("nan")])
def test_a_zero_or_non_finite_gradient_perturbs_nothing(step, slope):
    g_s, [readings] = step([t(1.0), t(2.0)], [lambda w: (slope * w[0] + w[1] * 0).sum()], 0.5)
    assert [e_i.item() for e_i in readings.e] == [0.0, 0.0]
    assert_close(g_s[0], t(slope), rtol=0, atol=0, equal_nan=True)


def test_the_weights_given_are_left_as_they_were():
    w, losses = two_layer_net()
    before = [w_i.clone() for w_i in w]
    sam_step(w, losses, rho=0.1)
    asam_step(w, losses, rho=0.1, eta=0.01)
    assert_close(w, before, rtol=0, atol=0)


# --- ASAM -----------------------------------------------------------------------------------------


def test_asam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # g = A w = (4, -2), T = (2, 3), T g = (8, -6), |T g| = 10,
    # e = 0.5 (16, -18) / 10 = (0.8, -0.9), g_s = A (1.8, -2.9) = (7.9, -2.55).
    w = [t(1.0), t(-2.0)]
    g_s, [readings] = asam_step(w, [quadratic([[6, 1], [1, 1.5]])], rho=0.5, eta=1.0)

    assert_close(readings.e, [t(0.8), t(-0.9)], rtol=0, atol=1e-15)
    assert_close(g_s, [t(7.9), t(-2.55)], rtol=0, atol=1e-14)
    assert readings.loss == pytest.approx(4.0, abs=1e-14)
    assert readings.sharpness == pytest.approx((1.8 * 7.9 + 2.9 * 2.55) / 2 - 4, abs=1e-14)
    assert readings.e_norm == pytest.approx(math.sqrt(1.45), abs=1e-15)
    assert readings.g_norm == pytest.approx(math.sqrt(20), abs=1e-14)


def test_asam_normalises_with_one_where_a_parameter_is_not_adaptive():
    # T = (2, 1), T g = (8, -2).
    w = [t(1.0), t(-2.0)]
    loss = quadratic([[6, 1], [1, 1.5]])
    _, [readings] = asam_step(w, [loss], rho=0.5, eta=1.0, adaptive=[True, False])
    expected = [t(0.5 * 16 / math.sqrt(68)), t(-0.5 * 2 / math.sqrt(68))]
    assert_close(readings.e, expected, rtol=0, atol=1e-15)


def test_asam_with_no_adaptive_parameter_is_sam():
    w, losses = two_layer_net()
    asam, _ = asam_step(w, losses, rho=0.1, eta=0.01, adaptive=[False, False])
    sam, _ = sam_step(w, losses, rho=0.1)
    assert_close(asam, sam, rtol=0, atol=1e-15)


def test_asam_perturbed_loss_survives_a_rescaling_of_the_layers_and_sams_does_not():
    w, losses = two_layer_net()
    rescaled = [10 * w[0], w[1] / 10]
    assert total(losses, rescaled) == pytest.approx(total(losses, w), rel=1e-14)

    _, [here] = asam_step(w, losses, rho=0.5, eta=0.0)
    _, [there] = asam_step(rescaled, losses, rho=0.5, eta=0.0)
    assert here.sharpness > 0.01
    assert there.sharpness == pytest.approx(here.sharpness, rel=1e-12)

    _, [here] = sam_step(w, losses, rho=0.5)
    _, [there] = sam_step(rescaled, losses, rho=0.5)
    assert abs(there.sharpness - here.sharpness) > 0.1 * here.sharpness


def test_asam_without_eta_leaves_a_zero_weight_where_it_is():
    _, [readings] = asam_step([t(0.0), t(1.0)], [lambda w: (w[0] + w[1]).sum()], rho=0.5, eta=0.0)
    assert [e_i.item() for e_i in readings.e] == [0.0, 0.5]
    _, [readings] = asam_step([t(0.0)], [lambda w: w[0].sum()], rho=0.5, eta=0.0)
    assert [e_i.item() for e_i in readings.e] == [0.0]


# --- base optimizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("step", "torch_optimizer", "options"),
    [
        (sgd_step, torch.optim.SGD, {"mu": 0.0}),
        (sgd_step, torch.optim.SGD, {"mu": 0.9}),
        (adamw_step, torch.optim.AdamW, {}),
        (adamw_step, torch.optim.AdamW, {"betas": (0.8, 0.99), "eps": 1e-3}),
    ],
)
def test_five_steps_by_hand_are_torch_optims(step, torch_optimizer, options, weight_decay):
    w, losses = two_layer_net()
    w = [*w, t(1.0, 2.0)]  # the last one never has a gradient
    params = [w_i.clone().requires_grad_() for w_i in w]
    renamed = {{"mu": "momentum"}.get(name, name): value for name, value in options.items()}
    optimizer = torch_optimizer(params, lr=0.05, weight_decay=weight_decay, **renamed)
    state = {}
    for _ in range(5):
        optimizer.zero_grad()
        sum(L(params) for L in losses).backward()
        optimizer.step()
        leaves = [w_i.clone().requires_grad_() for w_i in w]
        loss = sum(L(leaves) for L in losses)
        g = torch.autograd.grad(loss, leaves, allow_unused=True)
        w, state = step(w, list(g), state, lr=0.05, weight_decay=weight_decay, **options)
        assert_close(w, [p.detach() for p in params], rtol=0, atol=1e-12)
    assert_close(w[2], t(1.0, 2.0), rtol=0, atol=0)
    assert not torch.allclose(w[0], two_layer_net()[0][0], atol=1e-3)


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 100.0])
def test_clipping_by_hand_is_torchs(max_norm):
    params = [t(0.0, 0.0).requires_grad_(), t(0.0).requires_grad_(), t(0.0).requires_grad_()]
    gradients = [t(3.0, 0.0), t(4.0), None]
    for p, g_i in zip(params, gradients, strict=True):
        p.grad = None if g_i is None else g_i.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, by_hand = clip_by_global_norm(gradients, max_norm)
    assert by_hand == norm.item() == 5.0
    assert clipped[2] is None
    assert_close(clipped[:2], [params[0].grad, params[1].grad], rtol=0, atol=1e-15)

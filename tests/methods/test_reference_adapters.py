"""The oracles of BAR and Bi-LoRA, held to numbers worked out by hand and to their limits."""

# ruff: noqa: N803, N806 - the names are the papers' symbols

from __future__ import annotations

import math

import pytest
import torch
from known_losses import EXACT, INF, grad, t, two_layer_net
from reference_bar import bar_alpha, nbar, obar
from reference_bilora import Layer, bilora_clip, bilora_gradients, bilora_step
from reference_gsam import dot
from reference_optimizers import adamw_step, sgd_step
from reference_sam import norm, sam_step, value_and_grad
from torch import Tensor
from torch.testing import assert_close

# --- BAR ------------------------------------------------------------------------------------------


def test_bar_by_hand():
    A, B = t(3.0, 4.0), t(1.0)
    # The gradient of B is the longer one: B grows by 1 + 0.5 * 0.1, A shrinks.
    assert_close(nbar(A, B, t(0.1, 0.0), t(2.0), 0.5, 0.1), (0.95 * A, 1.05 * B), **EXACT)
    assert_close(nbar(A, B, t(2.0, 0.0), t(2.0), 0.5, 0.1), (1.05 * A, 0.95 * B), **EXACT)
    # A is the longer factor, and shrinks.
    assert_close(obar(A, B, 0.5, 0.1), (0.95 * A, 1.05 * B), **EXACT)
    assert_close(obar(B, A, 0.5, 0.1), (1.05 * B, 0.95 * A), **EXACT)
    assert_close(obar(B, B, 0.5, 0.1), (0.95 * B, 1.05 * B), **EXACT)


def test_bar_changes_the_product_to_second_order_only():
    draw = torch.Generator().manual_seed(0)
    A, B = (torch.randn(s, generator=draw, dtype=torch.float64) for s in [(2, 5), (4, 2)])
    for A_new, B_new in (nbar(A, B, 2 * A, B, 0.5, 0.1), obar(A, B, 0.5, 0.1)):
        assert_close(B_new @ A_new, (1 - 0.05**2) * B @ A, rtol=0, atol=1e-13)


def test_nbar_leaves_the_factors_of_a_gradient_that_is_not_finite():
    A, B = t(3.0), t(1.0)
    for g_A, g_B in [(t(INF), t(1.0)), (t(1.0), t(math.nan))]:
        assert nbar(A, B, g_A, g_B, 0.5, 0.1) == (A, B)


def test_obar_balances_the_factors_and_sam_does_so_with_the_gradients_nbar_reads():
    A, B = t(3.0), t(1.0)
    for _ in range(200):
        A, B = obar(A, B, 0.5, 0.1)
    assert A.norm() / B.norm() == pytest.approx(1.0, abs=0.11)

    # For f(x y) on two numbers g_x = f' y and g_y = f' x: the longer gradient is the shorter
    # factor's, nBAR and oBAR agree, and a SAM step balances in the same direction.
    x, y, f = t(3.0), t(1.0), lambda w: (w[0] * w[1]).sum()
    g = grad([f], [x, y])
    assert_close(nbar(x, y, *g, 0.5, 0.1), obar(x, y, 0.5, 0.1), **EXACT)
    g_s, _ = sam_step([x, y], [f], rho=0.5)
    sam, _ = sgd_step([x, y], g_s, {}, 1e-3)
    plain, _ = sgd_step([x, y], g, {}, 1e-3)
    assert (sam[0] ** 2 - sam[1] ** 2).item() < (plain[0] ** 2 - plain[1] ** 2).item()


def test_bar_schedules():
    assert [bar_alpha(2.0, t, 4) for t in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert bar_alpha(2.0, 1, 3, "cosine") == pytest.approx(1.5)
    assert bar_alpha(2.0, 4, 4, "constant") == 2.0
    with pytest.raises(ValueError, match="schedule"):
        bar_alpha(2.0, 0, 4, "step")


# --- Bi-LoRA --------------------------------------------------------------------------------------


def number(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def scalar_layer(**options) -> Layer:
    """W = 1 + 2 * 3 + 0.5 * 0.4 = 7.2 of single numbers."""
    return Layer(number(1), number(2), number(3), number(0.5), number(0.4), **options)


def layers_and_losses(s1: float = 1.0, s2: float = 1.0):
    draw = torch.Generator().manual_seed(0)
    shapes = [[(4, 3), (4, 2), (2, 3), (4, 2), (2, 3)], [(2, 4), (2, 2), (2, 4), (2, 2), (2, 4)]]
    layers = [
        Layer(*(torch.randn(s, generator=draw, dtype=torch.float64) for s in layer), s1, s2)
        for layer in shapes
    ]
    return layers, two_layer_net()[1]


def test_bilora_by_hand():
    # L = W^2 / 2, so G = 7.2. B1 = 2 - 0.01 * 7.2 * 3, A1 = 3 - 0.01 * 7.2 * 2;
    # B2 = 0.5 + 0.1 * 7.2 * 0.4 = 0.788, A2 = 0.4 + 0.1 * 7.2 * 0.5 = 0.76: B2 A2 = 0.59888.
    half_square = [lambda W: (W[0] ** 2).sum() / 2]
    [free], _ = bilora_step([scalar_layer()], half_square, {}, rho=9.0, eta1=0.01, eta2=0.1)
    factors = [free.B1, free.A1, free.B2, free.A2]
    assert_close(factors, [number(1.784), number(2.856), number(0.788), number(0.76)], **EXACT)

    [clipped], _ = bilora_step([scalar_layer()], half_square, {}, rho=0.05, eta1=0.01, eta2=0.1)
    assert_close([clipped.B1, clipped.A1], factors[:2], **EXACT)
    scale = math.sqrt(0.05 / 0.59888)
    assert_close([clipped.B2, clipped.A2], [scale * x for x in factors[2:]], **EXACT)
    assert_close(clipped.perturbation(), number(0.05), **EXACT)


@pytest.mark.parametrize("s1, s2", [(1.0, 1.0), (2.0, 0.5)])
def test_bilora_gradients_are_those_of_the_factors(s1, s2):
    layers, losses = layers_and_losses(s1, s2)

    def of_the_factors(x):
        W = [
            layer.W0 + s1 * B1 @ A1 + s2 * B2 @ A2
            for layer, B1, A1, B2, A2 in zip(
                layers, x[:4:2], x[1:4:2], x[4::2], x[5::2], strict=True
            )
        ]
        return sum(L(W) for L in losses)

    primary = [x for layer in layers for x in (layer.B1, layer.A1)]
    auxiliary = [x for layer in layers for x in (layer.B2, layer.A2)]
    expected = value_and_grad(of_the_factors, primary + auxiliary)[1]
    by_hand = bilora_gradients(layers, losses)
    assert_close(by_hand[0] + by_hand[1], expected, rtol=0, atol=1e-12)


def test_bilora_clips_the_layers_jointly_and_only_above_rho():
    layers, _ = layers_and_losses(s2=2.0)
    sizes = [norm([layer.perturbation()]) for layer in layers]
    clipped = bilora_clip(layers, rho=0.3)
    after = [norm([layer.perturbation()]) for layer in clipped]
    assert math.hypot(*after) == pytest.approx(0.3, rel=1e-12)
    assert after[0] / after[1] == pytest.approx(sizes[0] / sizes[1], rel=1e-12)
    assert bilora_clip(clipped, rho=0.31) is clipped


def test_bilora_climbs_and_descends():
    layers, losses = layers_and_losses()

    def loss(layers, auxiliary):
        return sum(
            L([x.adapted() + y.perturbation() for x, y in zip(layers, auxiliary, strict=True)])
            for L in losses
        ).item()

    stepped, _ = bilora_step(layers, losses, {}, rho=INF, eta1=1e-5, eta2=1e-5)
    assert loss(stepped, layers) < loss(layers, layers) < loss(layers, stepped)
    # Proposition 2: the perturbation moves along the gradient of the weights.
    G = grad(losses, [layer.merged() for layer in layers])
    moved = [a.perturbation() - b.perturbation() for a, b in zip(stepped, layers, strict=True)]
    assert dot(G, moved) > 0


def test_bilora_with_an_auxiliary_pair_at_zero_starts_as_lora():
    layers, losses = layers_and_losses()
    for layer in layers:
        layer.B2 = torch.zeros_like(layer.B2)
    options = {"betas": (0.9, 0.99), "weight_decay": 0.1}
    stepped, state = bilora_step(layers, losses, {}, 0.05, 1e-3, 1e-3, adamw_step, **options)

    factors = [x for layer in layers for x in (layer.B1, layer.A1)]
    g, _ = bilora_gradients(layers, losses)
    lora, _ = adamw_step(factors, g, {}, 1e-3, **options)
    assert_close([x for layer in stepped for x in (layer.B1, layer.A1)], lora, **EXACT)
    # A2's gradient is zero, B2's is not: AdamW's first step is eta_2 times the sign, upwards.
    assert_close(stepped[0].B2.abs().max(), t(1e-3)[0], rtol=1e-5, atol=0)
    assert len(state["auxiliary"]["moments"]) == 4
    # rho = 0 holds the perturbation at zero.
    still, _ = bilora_step(layers, losses, {}, 0.0, 1e-3, 1e-3)
    assert norm([layer.perturbation() for layer in still]) == 0

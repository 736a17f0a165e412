"""The oracles of GSAM, LookSAM and WSAM, held to numbers by hand and to each other's limits."""

from __future__ import annotations

import math

import pytest
from known_losses import BOWL, EXACT, INF, ONES, grad, linear, t, two_layer_net
from reference_gsam import dot, gsam_gradient, gsam_rho, gsam_step
from reference_looksam import looksam_step, orthogonal_part
from reference_optimizers import adamw_step, sgd_step
from reference_sam import norm, sam_step
from reference_wsam import (
    wsam_coupled,
    wsam_decoupled_adamw_step,
    wsam_decoupled_sgd_step,
)
from torch.testing import assert_close

# --- GSAM -----------------------------------------------------------------------------------------


def test_gsam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # g . g_s = 34, |g_s|^2 = 46.25: g_perp = (3, 4) - 34/46.25 (4, 5.5) = (2.75, -2) / 46.25.
    update, [readings] = gsam_step(ONES, [BOWL], rho=0.5, alpha=0.4)

    assert_close(update, [t(4 - 0.4 * 2.75 / 46.25), t(5.5 + 0.4 * 2 / 46.25)], **EXACT)
    assert readings.e_norm == pytest.approx(0.5, abs=1e-15)


def test_gsam_moves_orthogonally_to_the_perturbed_gradient():
    w, losses = two_layer_net()
    g, (g_s, _) = grad(losses, w), sam_step(w, losses, rho=0.3)
    update, _ = gsam_step(w, losses, rho=0.3, alpha=0.7)
    moved = [a - b for a, b in zip(update, g_s, strict=True)]

    assert norm(moved) > 1e-3
    assert abs(dot(moved, g_s)) < 1e-12 * norm(moved) * norm(g_s)
    assert dot(update, g_s) == pytest.approx(dot(g_s, g_s), rel=1e-12)
    # What it adds is along -g_perp, so it raises the loss at w and narrows the gap.
    assert dot(moved, g) < 0


def test_gsam_is_global_not_per_tensor():
    update = gsam_gradient([t(1.0), t(0.0)], [t(1.0), t(1.0)], alpha=1.0)
    # g_perp = (1, 0) - 1/2 (1, 1); tensor by tensor every g_perp of a single number is zero.
    assert_close(update, [t(0.5), t(1.5)], **EXACT)


def test_gsam_with_alpha_zero_is_sam():
    w, losses = two_layer_net()
    assert_close(
        gsam_step(w, losses, 0.3, 0.0, perturbed=[True, False])[0],
        sam_step(w, losses, 0.3, perturbed=[True, False])[0],
        **EXACT,
    )


def test_gsam_leaves_what_has_no_pair_of_gradients():
    update = gsam_gradient([t(2.0), None, t(1.0)], [t(1.0), t(5.0), None], alpha=1.0)
    assert update[2] is None
    assert_close(update[:2], [t(1.0), t(5.0)], **EXACT)
    assert_close(gsam_gradient([t(2.0)], [t(0.0)], alpha=1.0), [t(0.0)], **EXACT)


def test_gsam_radius_follows_the_learning_rate():
    assert gsam_rho(0.6, 0.1, lr=1e-3, lr_max=1e-3) == pytest.approx(0.6)
    assert gsam_rho(0.6, 0.1, lr=0.0, lr_max=1e-3) == pytest.approx(0.1)
    assert gsam_rho(0.6, 0.1, lr=6e-4, lr_max=1e-3, lr_min=2e-4) == pytest.approx(0.35)
    assert gsam_rho(0.6, 0.1, lr=1e-3, lr_max=1e-3, lr_min=1e-3) == 0.6


# --- LookSAM --------------------------------------------------------------------------------------


def test_looksam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # SAM step: g_v = (4, 5.5) - 34/25 (3, 4) = (-0.08, 0.06), of length 0.1.
    update, state = looksam_step(ONES, [BOWL], rho=0.5, alpha=0.7, k=5, t=0, state={})
    assert_close(update, [t(4.0), t(5.5)], **EXACT)
    assert_close(state["g_v"], [t(-0.08), t(0.06)], **EXACT)

    # Reuse at w = (1, 0): g = (2, 1), and g_v comes in with the length 0.7 |g|.
    w = [t(1.0), t(0.0)]
    update, after = looksam_step(w, [BOWL], rho=0.5, alpha=0.7, k=5, t=1, state=state)
    length = 0.7 * math.sqrt(5)
    assert_close(update, [t(2 - 0.8 * length), t(1 + 0.6 * length)], rtol=0, atol=1e-13)
    assert after is state


def test_looksam_keeps_the_part_orthogonal_to_the_gradient_of_all_parameters():
    w, losses = two_layer_net()
    g = grad(losses, w)
    g_s, state = looksam_step(w, losses, rho=0.3, alpha=0.7, k=2, t=4, state={})
    g_v = state["g_v"]

    assert_close(g_s, sam_step(w, losses, 0.3)[0], **EXACT)
    assert norm(g_v) > 1e-3
    assert abs(dot(g_v, g)) < 1e-12 * norm(g_v) * norm(g)
    assert abs((g_v[0] * g[0]).sum().item()) > 1e-3  # not orthogonal tensor by tensor
    along_g = [a - b for a, b in zip(g_s, g_v, strict=True)]
    assert dot(along_g, g) == pytest.approx(norm(along_g) * norm(g), rel=1e-12)


def test_looksam_counts_gradients():
    w, losses = two_layer_net()
    calls = 0

    def counted(w):
        nonlocal calls
        calls += 1
        return sum(L(w) for L in losses)

    state, per_step = {}, []
    for step in range(1, 8):  # step 1 has nothing to reuse
        before = calls
        _, state = looksam_step(w, [counted], 0.3, 0.7, 3, step, state)
        per_step.append(calls - before)
    # The twin reads g and then calls the SAM twin, which reads g again: 3 evaluations for SAM.
    assert per_step == [3, 1, 3, 1, 1, 3, 1]


def test_looksam_limits():
    w, losses = two_layer_net()
    _, state = looksam_step(w, losses, 0.3, 0.7, 5, 0, {})
    assert_close(looksam_step(w, losses, 0.3, 0.0, 5, 1, state)[0], grad(losses, w), **EXACT)
    # k = 1: SAM in every step.
    assert_close(
        looksam_step(w, losses, 0.3, 0.7, 1, 1, state)[0], sam_step(w, losses, 0.3)[0], **EXACT
    )
    # A linear loss has g_s = g, hence no g_v, and the step is the plain one.
    _, flat = looksam_step(ONES, [linear(3, 4)], 0.3, 0.7, 5, 0, {})
    assert norm(flat["g_v"]) < 1e-14
    update, _ = looksam_step(ONES, [linear(3, 4)], 0.3, 0.7, 5, 1, {"g_v": [t(0.0), t(0.0)]})
    assert_close(update, [t(3.0), t(4.0)], **EXACT)


def test_looksam_blows_rounding_up_on_a_linear_loss():
    _, flat = looksam_step(ONES, [linear(3, 4)], 0.3, 0.7, 5, 0, {})
    update, _ = looksam_step(ONES, [linear(3, 4)], 0.3, 0.7, 5, 1, flat)
    off = norm([a - b for a, b in zip(update, [t(3.0), t(4.0)], strict=True)])
    assert off == pytest.approx(0.7 * 5 if norm(flat["g_v"]) else 0.0)


def test_looksam_keeps_its_state_past_a_gradient_that_is_not_finite():
    state = {"g_v": [t(1.0), t(0.0)]}
    update, after = looksam_step(ONES, [linear(INF, 1)], 0.3, 0.7, 5, 0, state)
    assert after is state and not math.isfinite(norm(update))
    assert looksam_step(ONES, [linear(INF, 1)], 0.3, 0.7, 5, 0, {})[1] == {}


def test_orthogonal_part_of_a_parameter_without_clean_gradient_is_all_of_it():
    g_v = orthogonal_part([t(1.0), t(1.0), t(7.0)], [t(1.0), t(0.0), None])
    assert_close(g_v, [t(0.0), t(1.0), t(7.0)], **EXACT)


# --- WSAM -----------------------------------------------------------------------------------------


def test_wsam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # gamma = 0.8: the weight is 4, and g + 4 (g_s - g) = (3, 4) + 4 (1, 1.5) = (7, 10).
    assert_close(wsam_coupled(ONES, [BOWL], rho=0.5, gamma=0.8), [t(7.0), t(10.0)], **EXACT)

    # Decoupled, with a buffer b = (1, 1): base step 0.1 (0.5 b + g) = 0.1 (3.5, 4.5), then
    # 0.1 * 4 * (1, 1.5). The buffer has g alone in it.
    w, state = wsam_decoupled_sgd_step(
        ONES, [BOWL], {"b": [t(1.0), t(1.0)]}, rho=0.5, gamma=0.8, lr=0.1, mu=0.5
    )
    assert_close(w, [t(1 - 0.35 - 0.4), t(1 - 0.45 - 0.6)], **EXACT)
    assert_close(state["b"], [t(3.5), t(4.5)], **EXACT)


def test_wsam_decoupled_on_adamw_by_hand():
    # The first AdamW step is lr sign(g) (eps = 0), the decay lr 0.1 w; then 0.1 * 4 * (1, 1.5).
    w, state = wsam_decoupled_adamw_step(
        ONES, [BOWL], {}, rho=0.5, gamma=0.8, lr=0.1, eps=0.0, weight_decay=0.1
    )
    assert_close(w, [t(1 - 0.1 - 0.01 - 0.4), t(1 - 0.1 - 0.01 - 0.6)], **EXACT)
    assert_close([m for _, m, _ in state["moments"]], [t(0.3), t(0.4)], **EXACT)


def test_wsam_limits():
    w, losses = two_layer_net()
    g, (g_s, _) = grad(losses, w), sam_step(w, losses, 0.3)
    assert_close(wsam_coupled(w, losses, 0.3, gamma=0.5), g_s, **EXACT)
    assert_close(wsam_coupled(w, losses, 0.3, gamma=0.0), g, **EXACT)
    for gamma, gradient in [(0.0, g), (0.5, g_s)]:
        # Without momentum the two forms are one; gamma = 1/2 is a SAM step.
        stepped, _ = wsam_decoupled_sgd_step(w, losses, {}, 0.3, gamma, lr=0.1)
        assert_close(stepped, sgd_step(w, gradient, {}, 0.1)[0], **EXACT)
    base, _ = adamw_step(w, g, {}, 0.1)
    assert_close(wsam_decoupled_adamw_step(w, losses, {}, 0.3, 0.0, lr=0.1)[0], base, **EXACT)


def test_wsam_weighs_the_sharpness_of_parameters_that_are_not_perturbed():
    # e = (0.5, 0), g_s - g = A e = (1, 0.5).
    update = wsam_coupled(ONES, [BOWL], rho=0.5, gamma=0.8, perturbed=[True, False])
    assert_close(update, [t(3 + 4 * 1.0), t(4 + 4 * 0.5)], **EXACT)

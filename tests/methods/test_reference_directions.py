"""The oracles of Friendly-SAM, VaSSO, MSAM, AE-SAM and ESAM, held to numbers by hand and limits."""

# ruff: noqa: N806 - the names are the papers' symbols

from __future__ import annotations

import math

import pytest
import torch
from known_losses import BOWL, EXACT, INF, ONES, grad, linear, t, two_layer_net
from reference_aesam import aesam_decides
from reference_esam import esam_perturbation
from reference_friendly_sam import friendly_sam_step, paper_step
from reference_msam import msam_adamw_run, msam_gradient, msam_sgd_run
from reference_optimizers import adamw_step, sgd_step
from reference_sam import norm, sam_perturbation, sam_step
from reference_vasso import vasso_step
from torch.testing import assert_close

# --- Friendly-SAM ---------------------------------------------------------------------------------


def friendly(w, losses, state, sigma=1.0, lam=0.9, rho=0.5, step=friendly_sam_step, **options):
    return step(w, losses, rho, sigma, lam, state, **options)


def test_friendly_sam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # First step: d = g, which is SAM, and m = g = (3, 4).
    g_s, state = friendly(ONES, [BOWL], {})
    assert_close(g_s, [t(4.0), t(5.5)], **EXACT)
    assert_close(state["m"], [t(3.0), t(4.0)], **EXACT)

    # At w = (1, 0), sigma = 0.5: d = (2, 1) - (1.5, 2) = (0.5, -1) and m = 0.9 (3, 4) + 0.1 (2, 1).
    g_s, state = friendly([t(1.0), t(0.0)], [BOWL], state, sigma=0.5)
    e = [0.5 * x / math.sqrt(1.25) for x in (0.5, -1.0)]
    assert_close(g_s, [t(2 + 2 * e[0] + e[1]), t(1 + e[0] + 3 * e[1])], **EXACT)
    assert_close(state["m"], [t(2.9), t(3.7)], **EXACT)


def test_friendly_sam_with_sigma_zero_is_sam():
    w, losses = two_layer_net()
    state = {"m": [torch.ones_like(w_i) for w_i in w]}
    assert_close(friendly(w, losses, state, sigma=0.0)[0], sam_step(w, losses, 0.5)[0], **EXACT)


def test_friendly_sam_of_the_paper_is_that_of_the_code_with_another_sigma():
    w, losses = two_layer_net()
    state = {"m": [torch.ones_like(w_i) for w_i in w]}
    for sigma, lam in [(1.0, 0.9), (1.0, 0.6), (0.5, 0.9), (0.3, 0.2)]:
        equivalent = sigma * lam / (1 - sigma * (1 - lam))
        paper, m_paper = friendly(w, losses, state, sigma, lam, step=paper_step)
        code, m_code = friendly(w, losses, state, equivalent, lam)
        assert_close(paper, code, rtol=0, atol=1e-12)
        assert_close(m_paper, m_code, **EXACT)
        assert sigma != 1 or equivalent == pytest.approx(1.0, abs=1e-15)


def test_friendly_sam_of_the_paper_differs_by_its_start_from_zero():
    w, losses = two_layer_net()
    runs = {}
    for step in (friendly_sam_step, paper_step):
        state = {}
        runs[step] = []
        for column in losses:  # the weights stay, the batches differ
            g_s, state = friendly(w, [column], state, lam=0.6, step=step)
            runs[step].append((g_s, state["m"]))
    code, paper = runs.values()
    g_0 = grad(losses[:1], w)
    for i, ((_, m_code), (_, m_paper)) in enumerate(zip(code, paper, strict=True)):
        rest = [a - b for a, b in zip(m_code, m_paper, strict=True)]
        assert_close(rest, [0.6 ** (i + 1) * a for a in g_0], rtol=0, atol=1e-12)
    assert_close(code[0][0], paper[0][0], rtol=0, atol=1e-12)  # SAM in both
    assert norm([a - b for a, b in zip(code[1][0], paper[1][0], strict=True)]) > 1e-3


@pytest.mark.parametrize("slopes", [(0.0, 0.0), (INF, 1.0), (math.nan, 1.0)])
def test_friendly_sam_and_vasso_pass_over_a_gradient_without_direction(slopes):
    state = {"m": [t(1.0), t(2.0)], "d": [t(1.0), t(2.0)]}
    for step in (
        lambda s: friendly_sam_step(ONES, [linear(*slopes)], 0.5, 1.0, 0.9, s),
        lambda s: vasso_step(ONES, [linear(*slopes)], 0.5, 0.9, s),
    ):
        g_s, after = step(state)
        assert after is state
        assert_close(torch.cat(g_s), t(*slopes), equal_nan=True, **EXACT)
        assert step({})[1] == {}


def test_friendly_sam_perturbs_nothing_where_the_gradient_is_the_average():
    g_s, state = friendly(ONES, [BOWL], {"m": [t(3.0), t(4.0)]})
    assert_close(g_s, [t(3.0), t(4.0)], **EXACT)
    assert_close(state["m"], [t(3.0), t(4.0)], **EXACT)


def test_averages_are_of_the_perturbed_parameters_that_have_a_gradient():
    def first_only(w):
        return w[0].sum() ** 2 / 2

    # The second has no gradient: its average stays, and neither moves nor lengthens e = 0.5.
    state = {"d": [t(1.0), t(5.0)], "m": [t(0.5), t(5.0)]}
    g_s, after = vasso_step(ONES, [first_only], 0.5, 0.2, state)
    assert g_s[1] is None
    assert_close(g_s[0], t(1.5), **EXACT)
    assert_close(after["d"], [t(1.0), t(5.0)], **EXACT)
    g_s, after = friendly(ONES, [first_only], state)
    assert_close(g_s[0], t(1.5), **EXACT)
    assert_close(after["m"], [t(0.9 * 0.5 + 0.1), t(5.0)], **EXACT)

    some = {"perturbed": [True, False]}
    sam, _ = sam_step(ONES, [BOWL], 0.5, **some)
    for (g_s, after), name in [
        (vasso_step(ONES, [BOWL], 0.5, 0.2, {}, **some), "d"),
        (friendly(ONES, [BOWL], {}, **some), "m"),
    ]:
        assert after[name][1] is None
        assert_close(g_s, sam, **EXACT)


def test_states_are_not_changed_in_place():
    state = {"m": [t(1.0), t(2.0)], "d": [t(1.0), t(2.0)]}
    friendly(ONES, [BOWL], state)
    vasso_step(ONES, [BOWL], 0.5, 0.4, state)
    assert_close(state["m"] + state["d"], [t(1.0), t(2.0)] * 2, **EXACT)


# --- VaSSO ----------------------------------------------------------------------------------------


def test_vasso_on_a_quadratic_gives_the_numbers_worked_by_hand():
    g_s, state = vasso_step(ONES, [BOWL], 0.5, 0.2, {})
    assert_close(g_s, [t(4.0), t(5.5)], **EXACT)
    assert_close(state["d"], [t(3.0), t(4.0)], **EXACT)

    # At w = (1, 0): g = (2, 1), d = 0.8 (3, 4) + 0.2 (2, 1) = (2.8, 3.4), g_s = g + A e.
    g_s, state = vasso_step([t(1.0), t(0.0)], [BOWL], 0.5, 0.2, state)
    assert_close(state["d"], [t(2.8), t(3.4)], **EXACT)
    e = [0.5 * x / math.hypot(2.8, 3.4) for x in (2.8, 3.4)]
    assert_close(g_s, [t(2 + 2 * e[0] + e[1]), t(1 + e[0] + 3 * e[1])], **EXACT)


def test_vasso_limits():
    w, losses = two_layer_net()
    state = {"d": [torch.ones_like(w_i) for w_i in w]}
    assert_close(vasso_step(w, losses, 0.3, 1.0, state)[0], sam_step(w, losses, 0.3)[0], **EXACT)
    assert_close(vasso_step(w, losses, 0.3, 0.0, state)[1]["d"], state["d"], **EXACT)


# --- MSAM -----------------------------------------------------------------------------------------


def test_msam_on_a_quadratic_gives_the_numbers_worked_by_hand():
    # v = (3, 4): the point is (1, 1) - 0.5 (0.6, 0.8) = (0.7, 0.6), and A times it is (2, 2.5).
    v = [t(3.0), t(4.0)]
    assert_close(msam_gradient(ONES, v, [BOWL], 0.5), [t(2.0), t(2.5)], **EXACT)


@pytest.mark.parametrize("v", [None, [t(0.0), t(0.0)], [None, None], [t(INF), t(1.0)]])
def test_msam_without_a_direction_takes_the_plain_gradient(v):
    assert_close(msam_gradient(ONES, v, [BOWL], 0.5), [t(3.0), t(4.0)], **EXACT)


def test_msam_trains_from_the_unperturbed_weights():
    # Step 1: g = (3, 4), w = (1, 1) - 0.1 (3, 4) = (0.7, 0.6), v = (3, 4).
    # Step 2: g at (0.7, 0.6) - (0.3, 0.4) = (0.4, 0.2) is (1, 1); v = 0.5 (3, 4) + (1, 1).
    w = msam_sgd_run(ONES, [[BOWL], [BOWL]], rho=0.5, lr=0.1, mu=0.5)
    assert_close(w, [t(0.7 - 0.25), t(0.6 - 0.3)], **EXACT)


def test_msam_is_the_authors_walk_through_the_perturbed_points():
    """Keep w - rho v/|v| between the steps as their code does, and step down before the update."""
    w, losses = two_layer_net()
    steps = [[L] for L in losses]
    rho, lr, mu = 0.3, 0.01, 0.9
    ahead, v = w, [torch.zeros_like(w_i) for w_i in w]
    for step in steps:
        g = grad(step, ahead)
        down = sam_perturbation(v, rho)
        v = [mu * v_i + g_i for v_i, g_i in zip(v, g, strict=True)]
        w_new = [a + d - lr * v_i for a, d, v_i in zip(ahead, down, v, strict=True)]
        ahead = [a - e for a, e in zip(w_new, sam_perturbation(v, rho), strict=True)]
    assert_close(msam_sgd_run(w, steps, rho, lr, mu), w_new, rtol=0, atol=1e-12)


def test_msam_with_rho_zero_is_the_base_optimizer():
    w, losses = two_layer_net()
    sgd, adamw = (w, {}), (w, {})
    for L in losses:
        sgd = sgd_step(sgd[0], grad([L], sgd[0]), sgd[1], 0.01, 0.9, 0.1)
        adamw = adamw_step(adamw[0], grad([L], adamw[0]), adamw[1], 0.01, weight_decay=0.1)
    steps = [[L] for L in losses]
    assert_close(msam_sgd_run(w, steps, 0.0, 0.01, 0.9, 0.1), sgd[0], **EXACT)
    assert_close(msam_adamw_run(w, steps, 0.0, 0.01, weight_decay=0.1), adamw[0], **EXACT)


def test_msam_on_adamw_uses_the_first_moment():
    # Step 1 is lr sign(g), so w = (0.9, 0.9) and m is along (3, 4): the second gradient is taken at
    # (0.6, 0.5). With beta1 = 0 the second step is its sign again.
    seen = []

    def spied(w):
        seen.append(torch.cat(w).detach())
        return BOWL(w)

    w = msam_adamw_run(ONES, [[spied], [spied]], rho=0.5, lr=0.1, betas=(0.9, 0.0), eps=0.0)
    assert_close(seen, [t(1.0, 1.0), t(0.6, 0.5)], **EXACT)
    # g_2 = (1.7, 2.1), m_hat = (0.9 * 0.1 * g_1 + 0.1 g_2) / 0.19, v_hat = g_2^2.
    m_hat = [(0.09 * g1 + 0.1 * g2) / 0.19 for g1, g2 in [(3, 1.7), (4, 2.1)]]
    assert_close(w, [t(0.9 - 0.1 * m_hat[0] / 1.7), t(0.9 - 0.1 * m_hat[1] / 2.1)], **EXACT)


# --- AE-SAM ---------------------------------------------------------------------------------------


def test_aesam_by_hand():
    # delta = 0.5, T = 4. n = 4: mu 2, sigma^2 = 0.5 * 4 = 2, c = 1: 4 >= 2 + 1.41.
    # n = 4: mu 3, sigma^2 = 1 + 0.5 = 1.5, c = 0.5: 4 >= 3 + 0.61.
    # n = 4: mu 3.5, sigma^2 = 0.75 + 0.125 = 0.875, c = 0: 4 >= 3.5.
    # n = 2: mu 2.75, sigma^2 = 0.4375 + 0.28125 = 0.71875, c = -0.5: 2 < 2.75 - 0.42.
    assert aesam_decides([4, 4, 4, 2], T=4, delta=0.5) == [True, True, True, False]
    # The last step's threshold falls between these two:
    # n = 2.7: mu 3.1, sigma^2 = 0.5175, 2.7 < 3.1 - 0.360.
    # n = 2.8: mu 3.15, sigma^2 = 0.49875, 2.8 >= 3.15 - 0.353.
    assert aesam_decides([4, 4, 4, 2.7], T=4, delta=0.5)[-1] is False
    assert aesam_decides([4, 4, 4, 2.8], T=4, delta=0.5)[-1] is True


def test_aesam_starts_with_sam_and_is_free_of_scale():
    norms = [abs(math.sin(7 * i)) + 0.1 for i in range(200)]
    decisions = aesam_decides(norms, T=200)
    assert decisions[0]
    assert aesam_decides([1e-6 * n for n in norms], T=200) == decisions
    # c falls from 1 to -1, so SAM steps become common.
    assert sum(decisions[50:100]) < sum(decisions[150:])
    assert sum(aesam_decides(norms, 200, lambda1=-9, lambda2=-9)) == 200
    assert sum(aesam_decides(norms, 200, lambda1=9, lambda2=9)) < 10


def test_aesam_passes_over_norms_that_are_not_finite():
    decisions = aesam_decides([1.0, INF, math.nan, 1.0], T=4)
    assert decisions[1:3] == [False, False]
    # The averages stand still meanwhile, the schedule does not: c_3 = -0.5 here and there.
    assert decisions[3] is aesam_decides([1.0, 1.0], T=2, lambda1=-2.0)[1]


# --- ESAM -----------------------------------------------------------------------------------------


def test_esam_by_hand():
    g = [t(3.0), t(4.0), None]
    e = esam_perturbation(g, rho=0.5, beta=0.5, selected=[True, False, True])
    assert e[2] is None
    assert_close(e[:2], [t(0.6), t(0.0)], **EXACT)  # 0.5 / 0.5 * 3 / 5
    e = esam_perturbation(g, 0.5, 0.5, [True, False, True], norm_over="selected")
    assert_close(e[:2], [t(1.0), t(0.0)], **EXACT)


def test_esam_is_sam_on_average_and_with_everything_selected():
    w, losses = two_layer_net()
    g = grad(losses, w)
    sam = sam_perturbation(g, 0.3)
    assert_close(esam_perturbation(g, 0.3, 1.0, [True, True]), sam, **EXACT)

    # All four draws of two tensors, with their probabilities.
    mean = [torch.zeros_like(w_i) for w_i in w]
    for draw in [(a, b) for a in (True, False) for b in (True, False)]:
        p = math.prod(0.6 if chosen else 0.4 for chosen in draw)
        e = esam_perturbation(g, 0.3, 0.6, list(draw))
        mean = [m + p * e_i for m, e_i in zip(mean, e, strict=True)]
    assert_close(mean, sam, **EXACT)


def test_esam_takes_masks_of_elements():
    e = esam_perturbation([t(3.0, 4.0)], 0.5, 0.5, [t(0.0, 1.0)])
    assert_close(e, [t(0.0, 0.8)], **EXACT)
    e = esam_perturbation([t(3.0, 4.0)], 0.5, 0.5, [t(0.0, 1.0)], norm_over="selected")
    assert norm(e) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("g", [[t(0.0), t(0.0)], [t(INF), t(1.0)]])
def test_esam_perturbs_nothing_without_a_direction(g):
    assert norm(esam_perturbation(g, 0.5, 0.5, [True, True])) == 0

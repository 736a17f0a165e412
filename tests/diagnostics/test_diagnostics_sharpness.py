"""Sharpness in a ball: quadratics, two numbers by hand, and the steps of SAM and ASAM."""

from __future__ import annotations

import math

import pytest
import torch
from curved import Quadratic, TwoNumbers, batches, classifier, nothing
from reference_asam import asam_step
from reference_sam import sam_step
from reference_sharpness import flat, noise_of_examples, quadratic_rise_in_ball
from tiny import Classifier, examples
from torch.func import functional_call

from sam_hf.diagnostics import (
    Ball,
    Objective,
    Plan,
    average_sharpness,
    gradient_noise,
    perturbation_budget,
    worst_sharpness,
)


def at(model: torch.nn.Module, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """w, and the gradient there."""
    return flat([w.detach() for w in objective.weights]), flat(objective.gradient())


@pytest.mark.parametrize("slope", [0.0, 1.0])
@pytest.mark.parametrize("rho", [0.01, 0.3, 3.0])
def test_the_worst_case_of_a_quadratic_is_that_of_the_trust_region_problem(slope, rho):
    model = Quadratic(slope=slope)
    objective = Objective(model, nothing())
    _, g = at(model, objective)
    expected = quadratic_rise_in_ball(g, model.h, rho)
    found = worst_sharpness(objective, Ball(rho), steps=100)
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_at_a_minimum_the_worst_case_is_half_the_eigenvalue_times_rho_squared():
    model = Quadratic()
    with torch.no_grad():
        model.first.zero_(), model.second.zero_()
    found = worst_sharpness(Objective(model, nothing()), Ball(0.1), steps=200)
    assert found.value == pytest.approx(0.5 * 7 * 0.1**2, rel=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_in_the_scaled_ball_the_quadratic_is_scaled(adaptive):
    model, ball = Quadratic(slope=0.5), Ball(0.2, adaptive=adaptive, eta=0.1)
    objective = Objective(model, nothing())
    w, g = at(model, objective)
    t = w.abs() + 0.1 if adaptive else torch.ones_like(w)
    expected = quadratic_rise_in_ball(t * g, t[:, None] * model.h * t, 0.2)
    assert worst_sharpness(objective, ball, steps=200).value == pytest.approx(expected, rel=1e-5)
    mean = average_sharpness(objective, ball, samples=2000)
    exact = 0.2**2 * (t * model.h.diagonal() * t).sum().item() / (2 * 7)
    assert abs(mean.value - exact) < 4 * mean.error
    assert mean.error < 0.05 * exact


def test_the_gradient_has_no_part_in_the_average_nor_in_its_error():
    flat_one, steep = (
        average_sharpness(Objective(Quadratic(slope=s), nothing()), Ball(0.1)) for s in (0.0, 50.0)
    )
    assert steep.value == pytest.approx(flat_one.value, rel=1e-8)
    assert steep.error == pytest.approx(flat_one.error, rel=1e-6)


def test_one_step_is_the_perturbation_of_sam_and_of_asam():
    torch.manual_seed(0)
    model, (batch,) = Classifier(), batches(examples(8), 8)
    names = [name for name, _ in model.named_parameters()]
    w = [p.detach() for p in model.parameters()]

    def loss(parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (), batch)["loss"]

    objective = Objective(model, [batch])
    for ball, readings in (
        (Ball(0.05), sam_step(w, [loss], 0.05)[1][0]),
        (Ball(0.5, adaptive=True, eta=0.01), asam_step(w, [loss], 0.5, 0.01)[1][0]),
    ):
        found = worst_sharpness(objective, ball, steps=1)
        assert found.value == pytest.approx(readings.sharpness, rel=1e-10)
        more = worst_sharpness(objective, ball, steps=20)
        assert more.value >= found.value


def test_by_hand_with_two_numbers():
    # At (2, 1/2): H = (1/2, 2)(1/2, 2)', the rise along the unit vector u = (1/2, 2)/|.| by rho:
    # (a + rho u1)(b + rho u2) - 1 = rho (a u2 + b u1) + rho² u1 u2
    rho, a, b = 0.1, 2.0, 0.5
    objective = Objective(TwoNumbers(a, b), nothing())
    angles = torch.linspace(0, 2 * math.pi, 100001, dtype=torch.float64)
    e = rho * torch.stack([angles.cos(), angles.sin()])
    expected = (((a + e[0]) * (b + e[1]) - 1).square() / 2).max().item()
    found = worst_sharpness(objective, Ball(rho), steps=50)
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_asams_ball_does_not_see_a_rescaling_that_leaves_the_function_alone():
    balls = {"sam": Ball(0.1), "asam": Ball(0.1, adaptive=True, eta=0.0)}
    found = {
        name: [
            worst_sharpness(Objective(TwoNumbers(s * 1.5, 1 / s), nothing()), ball).value
            for s in (1.0, 8.0)
        ]
        for name, ball in balls.items()
    }
    assert found["asam"][0] == pytest.approx(found["asam"][1], rel=1e-9)
    assert found["sam"][1] > 5 * found["sam"][0]


def test_m_sharpness_is_the_mean_over_groups_and_grows_as_they_shrink():
    objective = classifier(size=2, n=13)
    ball = Ball(0.2)
    each = [worst_sharpness(objective.subset([i]), ball).value for i in range(6)]
    two = worst_sharpness(objective, ball, m=2)
    assert two.value == pytest.approx(sum(each) / 6, rel=1e-12)
    assert two.error == pytest.approx(torch.tensor(each).std().item() / 6**0.5, rel=1e-6)
    four = worst_sharpness(objective, ball, m=4)
    assert two.value > four.value > worst_sharpness(objective, ball).value


def test_a_concave_point_has_no_negative_worst_case():
    model = Quadratic(torch.linspace(-7.0, -1, 7, dtype=torch.float64))
    with torch.no_grad():
        model.first.zero_(), model.second.zero_()
    objective = Objective(model, nothing())
    assert worst_sharpness(objective, Ball(0.1)).value == 0
    assert average_sharpness(objective, Ball(0.1)).value < 0


def test_a_ball_with_a_loss_or_a_gradient_that_is_no_number_is_infinitely_sharp():
    class Log(torch.nn.Module):
        def __init__(self, at):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([at], dtype=torch.float64))

        def forward(self, x):
            return {"loss": -self.w.log().sum() + 0 * x.sum()}

    class Root(Log):
        def forward(self, x):
            return {"loss": self.w.sqrt().sum() + 0 * x.sum()}

    for model in (Log(0.01), Root(0.0)):
        assert worst_sharpness(Objective(model, nothing()), Ball(0.05)).value == math.inf


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rho": -1.0}, "rho=-1.0 is not allowed"),
        ({"trace_samples": 1}, "trace_samples=1 is not allowed"),
        ({"samples": 1}, "samples=1 is not allowed"),
        ({"eigenvalues": 4, "iterations": 3}, "iterations=3 is not allowed"),
        ({"m": 0}, "m=0 is not allowed"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused_when_it_is_made(options, said):
    with pytest.raises(ValueError, match=said):
        Plan(**options)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda o: Ball(0.0), "rho=0.0 is not allowed. Allowed: a finite number > 0"),
        (lambda o: Ball(-1.0), "rho=-1.0 is not allowed"),
        (lambda o: Ball(math.nan), "rho=nan is not allowed"),
        (lambda o: Ball(0.1, eta=-1.0), "eta=-1.0 is not allowed"),
        (lambda o: worst_sharpness(o, steps=0), "steps=0 is not allowed"),
        (
            lambda o: worst_sharpness(o, m=3),
            "m=3 is not allowed: it is not a multiple of the batch size 4",
        ),
        (
            lambda o: worst_sharpness(o, m=12),
            "m=12 is not allowed: .* at most 8 of the 10 examples",
        ),
        (lambda o: worst_sharpness(o, m=0), "m=0 is not allowed"),
        (lambda o: average_sharpness(o, samples=1), "samples=1 is not allowed"),
        (lambda o: gradient_noise(o.subset([0])), "at least two batches of 4 examples, got 1"),
    ],
)
def test_wrong_numbers_are_refused(action, said):
    with pytest.raises(ValueError, match=said):
        action(classifier())


# ---- Gradients --------------------------------------------------------------------------------


def test_the_noise_is_that_of_the_gradients_of_single_examples():
    torch.manual_seed(0)
    model, data = Classifier(), examples(12)
    grads = [
        flat(torch.autograd.grad(model(**batch)["loss"], list(model.parameters())))
        for batch in batches(data, 1)
    ]
    trace, squared = noise_of_examples(grads)
    noise = gradient_noise(Objective(model, batches(data, 1)))
    assert noise.noise == pytest.approx(trace, rel=1e-9)
    assert noise.squared_norm == pytest.approx(squared, rel=1e-9)
    assert noise.scale == pytest.approx(trace / squared, rel=1e-9)


def test_larger_batches_estimate_the_same_noise():
    torch.manual_seed(0)
    model, data = Classifier(), examples(4000)
    singles = gradient_noise(Objective(model, batches(data, 1)))
    in_tens = gradient_noise(Objective(model, batches(data, 10)))
    assert in_tens.noise == pytest.approx(singles.noise, rel=0.15)
    assert in_tens.squared_norm == pytest.approx(singles.squared_norm, rel=0.02)


def test_a_smaller_last_batch_is_left_out():
    objective = classifier(size=4, n=10)
    assert gradient_noise(objective) == gradient_noise(objective.subset([0, 1]))


def test_the_budget_is_the_share_of_each_group_in_the_first_step():
    objective = classifier()
    grads = dict(zip(objective.names, objective.gradient(), strict=True))
    weights = dict(zip(objective.names, objective.weights, strict=True))
    members = {
        "norms": ["layer_norm.weight", "layer_norm.bias"],
        "biases": ["first.bias", "second.bias"],
        "matrices": ["first.weight", "second.weight"],
    }
    for ball in (Ball(), Ball(0.5, adaptive=True, eta=0.2)):
        e = {
            name: g * ((weights[name].abs() + 0.2) ** 2 if ball.adaptive else 1)
            for name, g in grads.items()
        }
        total = sum(x.square().sum() for x in e.values()).item()
        shares = perturbation_budget(objective, ball)
        assert sum(shares.values()) == pytest.approx(1)
        for group, names in members.items():
            expected = sum(e[name].square().sum() for name in names).item() / total
            assert shares[group] == pytest.approx(expected, rel=1e-10)

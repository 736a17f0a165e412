"""Eigenvalues and traces: given spectra, dense Hessians of small networks, and another package."""

from __future__ import annotations

import pytest
import torch
from curved import Quadratic, TwoNumbers, batches, classifier, nothing
from pyhessian import hessian as PyHessian  # noqa: N812
from reference_sharpness import dense_hessian, flat
from tiny import Classifier, examples
from torch import nn

from sam_hf.diagnostics import Objective, hessian_trace, top_eigenpairs


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("products", ["exact", "differences"])
def test_a_given_spectrum_is_found_with_its_vectors(count, products):
    model = Quadratic(slope=1.0)
    objective = Objective(model, nothing(), products=products)
    pairs = top_eigenpairs(objective, count, tolerance=1e-8)
    tolerance = 1e-9 if products == "exact" else 1e-5
    assert pairs.values == pytest.approx([7.0, 6, 5, 4, 3, 2, 1][:count], rel=tolerance)
    assert pairs.iterations <= 7
    for value, vector in zip(pairs.values, pairs.vectors, strict=True):
        v = flat(vector)
        assert v.norm().item() == pytest.approx(1, rel=1e-9)
        assert (model.h @ v - value * v).norm() < 1e-4


def test_negative_curvature_does_not_pass_for_the_largest_eigenvalue():
    values = torch.tensor([2.0, 1, 0.5, 0, -1, -5, -9], dtype=torch.float64)
    objective = Objective(Quadratic(values), nothing())
    assert top_eigenpairs(objective, 2, tolerance=1e-8).values == pytest.approx([2.0, 1.0])


def test_an_eigenvalue_that_stands_several_times_is_found_once_and_the_search_ends():
    values = torch.tensor([3.0, 3, 3, 1, 1, 1, 1], dtype=torch.float64)
    pairs = top_eigenpairs(Objective(Quadratic(values), nothing()), 3)
    assert pairs.values == pytest.approx([3.0, 1.0]) and pairs.iterations == 2


def test_too_few_iterations_show_in_the_residual():
    values = torch.linspace(1.0, 1.5, 7, dtype=torch.float64)
    model = Quadratic(values)
    few = top_eigenpairs(Objective(model, nothing()), 1, iterations=2, tolerance=1e-9)
    nearest = (values - few.values[0]).abs().min().item()
    assert nearest <= few.residuals[0] and few.residuals[0] > 0.01
    assert few.iterations == 2
    v = flat(few.vectors[0])
    residual = (model.h @ v - few.values[0] * v).norm().item()
    assert few.residuals[0] == pytest.approx(residual, rel=1e-6)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    # z'Hz is the sum over h_ii z_i², and all z_i² are 1.
    model = Quadratic()
    model.h = torch.diag(model.values)
    trace = hessian_trace(Objective(model, nothing(), products="exact"), samples=2)
    assert trace.value == pytest.approx(28.0, rel=1e-12) and trace.error < 1e-12


def test_by_hand_the_valley_of_a_b_equal_to_1_is_as_sharp_as_its_point_is_uneven():
    # On a b = 1 the Hessian is (b, a)(b, a)': its eigenvalues are a² + b² and 0.
    for a in (1.0, 2.0, 4.0):
        objective = Objective(TwoNumbers(a, 1 / a), nothing())
        pairs = top_eigenpairs(objective, 2, tolerance=1e-10)
        assert pairs.values == pytest.approx([a * a + 1 / (a * a), 0.0], abs=1e-9)
        # z = (±1, ±1): z'Hz = (b ± a)², each with the same chance
        trace = hessian_trace(objective, samples=400)
        assert abs(trace.value - (a * a + 1 / (a * a))) < 4 * trace.error + 1e-12


def test_the_dense_hessian_of_a_network_has_the_same_eigenvalues_and_trace():
    torch.manual_seed(0)
    model, data = Classifier(), examples(12)
    (batch,) = batches(data, 12)
    dense = dense_hessian(model, lambda m: m(**batch)["loss"])
    values = torch.linalg.eigvalsh(dense).flip(0)
    objective = Objective(model, batches(data, 5))
    pairs = top_eigenpairs(objective, 3, iterations=60, tolerance=1e-9)
    assert pairs.values == pytest.approx(values[:3].tolist(), rel=1e-8)
    trace = hessian_trace(objective, samples=300)
    assert abs(trace.value - dense.trace().item()) < 3 * trace.error
    # the variance of the estimator is 2 Σ_{i≠j} h_ij²
    off = dense - torch.diag(dense.diagonal())
    assert trace.error == pytest.approx((2 * off.square().sum().item() / 300) ** 0.5, rel=0.25)


def test_only_the_selected_parameters_make_the_hessian():
    torch.manual_seed(0)
    model, data = Classifier(), examples(8)
    (batch,) = batches(data, 8)
    dense = dense_hessian(model, lambda m: m(**batch)["loss"])
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    chosen = [i for i, name in enumerate(names) if name.startswith("second")]
    block = dense[chosen][:, chosen]
    objective = Objective(model, [batch], params="second")
    value = torch.linalg.eigvalsh(block)[-1].item()
    assert top_eigenpairs(objective, tolerance=1e-9).values[0] == pytest.approx(value, rel=1e-8)


def test_pyhessian_finds_the_same_eigenvalues_and_trace():
    torch.manual_seed(0)
    model, data = Classifier(dtype=torch.float32), examples(16, dtype=torch.float32)
    (batch,) = batches(data, 16)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model

        def forward(self, x):
            return self.inside(x)["logits"]

    theirs = PyHessian(
        Logits(), nn.CrossEntropyLoss(), data=(batch["x"], batch["labels"]), cuda=False
    )
    values, _ = theirs.eigenvalues(top_n=8, maxIter=1000, tol=1e-7)
    values = sorted((v for v in values if v > 0), reverse=True)[:2]  # theirs: by absolute value
    traces = theirs.trace(maxIter=500, tol=0)
    for p in model.parameters():
        p.grad = None
    objective = Objective(model, batches(data, 6))
    ours = top_eigenpairs(objective, 2, iterations=80, tolerance=1e-5)
    assert ours.values == pytest.approx(values, rel=2e-3)
    trace = hessian_trace(objective, samples=200)
    their_error = torch.tensor(traces).std().item() / len(traces) ** 0.5
    distance = abs(trace.value - sum(traces) / len(traces))
    assert distance < 4 * (trace.error**2 + their_error**2) ** 0.5


def test_the_same_seed_gives_the_same_and_another_seed_another_start():
    objective = classifier()
    first, again, other = (hessian_trace(objective, samples=3, seed=s) for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (top_eigenpairs, {"count": 0}, "count=0 is not allowed. Allowed: an integer >= 1"),
        (top_eigenpairs, {"count": 5, "iterations": 4}, "iterations=4 is not allowed"),
        (hessian_trace, {"samples": 1}, "samples=1 is not allowed"),
        (hessian_trace, {"samples": 2.5}, "samples=2.5 is not allowed"),
    ],
)
def test_wrong_numbers_are_refused(function, options, said):
    with pytest.raises(ValueError, match=said):
        function(classifier(), **options)


def test_a_loss_that_is_no_number_is_named():
    model = Quadratic()
    with torch.no_grad():
        model.first[0] = float("nan")
    model.h = model.h * model.first[0].detach()
    with pytest.raises(ValueError, match="not finite"):
        top_eigenpairs(Objective(model, nothing(), products="exact"))

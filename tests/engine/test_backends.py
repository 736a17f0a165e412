"""Numbers over all weights, and writing them."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sam_hf.backends import Backend
from sam_hf.perturbation import Perturbation, step_size


def parameters(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


@pytest.mark.parametrize(
    ("dtype", "accumulated"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_inner_product_runs_over_all_tensors_in_fp32_or_better(dtype, accumulated):
    xs = [p.detach() for p in parameters((100, 100), (1000,), (), dtype=dtype)]
    ys = [x * 3 + 1 for x in xs]
    backend = Backend([nn.Parameter(x) for x in xs], Accelerator())
    exact = sum((x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True))
    result = backend.dot(xs, ys)
    assert result.dtype is accumulated and result.ndim == 0
    assert float(result) == pytest.approx(float(exact), rel=1e-6)
    square = sum(x.double().square().sum() for x in xs)
    assert float(backend.dot(xs, xs)) == pytest.approx(float(square), rel=1e-6)
    assert backend.dot([], []) == 0


def test_the_norm_of_a_million_numbers_is_exact_to_six_digits():
    x = torch.randn(1_000_003)
    backend = Backend([nn.Parameter(x)], Accelerator())
    assert float(backend.dot([x], [x])) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_the_inner_product_does_not_depend_on_the_memory_layout():
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    backend = Backend([nn.Parameter(x)], Accelerator())
    turned = y.t().contiguous().t()
    assert turned.stride() != y.stride()
    torch.testing.assert_close(backend.dot([x], [turned]), backend.dot([x], [y]))


@pytest.mark.parametrize("squared", [0.0, float("inf"), float("nan"), 1e-44, -0.0])
def test_the_step_is_zero_where_the_norm_is_no_usable_number(squared):
    size = step_size(1e30, torch.tensor(squared))
    assert size == 0


def test_the_step_is_rho_over_the_norm():
    assert step_size(0.5, torch.tensor(16.0, dtype=torch.float64)) == 0.125


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restore_brings_back_every_bit_in_place_where_subtracting_would_not(dtype):
    weights = [p.detach() for p in parameters((50, 20), (30,), dtype=dtype)]
    weights[0] = weights[0].t()  # not contiguous
    before = [w.clone() for w in weights]
    addresses = [w.data_ptr() for w in weights]
    for _ in range(20):
        perturbation = Perturbation(weights)
        perturbation.apply([torch.randn_like(w) for w in weights], torch.tensor(0.1))
        assert not any(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        perturbation.restore()
        perturbation.restore()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert [w.data_ptr() for w in weights] == addresses


def test_a_restore_before_anything_was_written_does_nothing():
    weights = [p.detach() for p in parameters((3,))]
    before = weights[0].clone()
    Perturbation(weights).restore()
    assert torch.equal(weights[0], before)


def test_the_difference_is_the_perturbation_that_was_applied():
    weights = [p.detach() for p in parameters((3, 2), dtype=torch.float64)]
    before = [w.clone() for w in weights]
    direction = [torch.randn_like(w) for w in weights]
    expected = [0.5 * d for d in direction]
    perturbation = Perturbation(weights)
    perturbation.apply(direction, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(perturbation.difference_(), expected)
    perturbation.restore()
    assert torch.equal(weights[0], before[0])


def test_mixed_precisions_are_perturbed_together():
    wide, narrow = parameters((4,), dtype=torch.float64), parameters((4,), dtype=torch.bfloat16)
    weights = [p.detach() for p in (*wide, *narrow)]
    before = [w.clone() for w in weights]
    perturbation = Perturbation(weights)
    perturbation.apply([torch.ones_like(w) for w in weights], torch.tensor(0.5))
    for w, b in zip(weights, before, strict=True):
        torch.testing.assert_close(w, b + 0.5)


def test_the_swallowed_share_counts_the_half_precision_weights_that_did_not_move():
    weights = [torch.ones(100, dtype=torch.bfloat16), torch.ones(50)]
    perturbation = Perturbation(weights)
    direction = [torch.full((100,), 2.0**-12, dtype=torch.bfloat16), torch.full((50,), 2.0**-12)]
    direction[0][:25] = 1.0
    perturbation.apply(direction, torch.tensor(1.0))
    assert perturbation.swallowed_share() == 0.75


def test_a_second_restore_does_nothing_and_the_copy_is_gone():
    weights = [p.detach() for p in parameters((3,))]
    perturbation = Perturbation(weights)
    perturbation.apply([torch.ones(3)], torch.tensor(0.1))
    perturbation.restore()
    weights[0].fill_(5.0)
    perturbation.restore()
    assert torch.equal(weights[0], torch.full((3,), 5.0)) and perturbation.saved is None

"""Writing w + e, and putting w back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_hf.engine.perturbation import Perturbation, step_size


def parameters(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


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


def test_an_autocast_region_of_the_caller_computes_with_the_weights_that_are_there():
    # Within a region the casts of weights that require a gradient are kept.
    (w,) = parameters((4, 8))
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = nn.functional.linear(x, w)
        perturbation = Perturbation([w.detach()])
        with torch.no_grad():
            perturbation.apply([torch.ones_like(w)], 0.5)
        between = nn.functional.linear(x, w)
        perturbation.restore()
        after = nn.functional.linear(x, w)
    rise = 0.5 * x.sum(1, keepdim=True).expand(2, 4)
    torch.testing.assert_close((between - before).float(), rise, rtol=0.05, atol=0.1)
    assert torch.equal(after, before)

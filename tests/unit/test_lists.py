"""Arithmetic on lists of tensors: the same on a device, where no number is read, as on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from applied import NoReads

from sam_hf.methods import lists
from sam_hf.methods.lists import add_where_, mark_started, quotient, scale_, zero_unless

BAD = {"finite": 2.0, "inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", "device"])
def on(request, monkeypatch):
    """Where the flag is: on a device it must not be read. The path of a device, run on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(lists, "reading_is_free", lambda number: False)
    return request.param


def tensors(value, dtype):
    xs = [torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype) for n in (5, 0, 7, 1)]
    xs = [x.reshape(()) if x.numel() == 1 else x for x in xs]
    xs[2][3] = value
    return xs


def guarded(on):
    return NoReads() if on == "device" else torch.no_grad()


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(("target", "source"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_sources_are_added_where_the_flag_is_set(target, source, value, on):
    xs, ys = tensors(0.5, target), tensors(value, source)
    expected = [x.clone() + y.to(torch.float64).to(target) for x, y in zip(xs, ys, strict=True)]
    objects, kept = list(xs), [y.clone() for y in ys]
    with guarded(on):
        add_where_(xs, ys, torch.tensor(True))
    assert all(x is o for x, o in zip(xs, objects, strict=True))
    for x, e in zip(xs, expected, strict=True):
        assert x.dtype is target
        torch.testing.assert_close(x, e, equal_nan=True, rtol=2e-2, atol=1e-2)
    if target is source:
        for x, e in zip(xs, expected, strict=True):
            torch.testing.assert_close(x, e, equal_nan=True, rtol=0, atol=0)
    for y, k in zip(ys, kept, strict=True):
        torch.testing.assert_close(y, k, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("target", "source"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_targets_are_untouched_where_the_flag_is_not_set(target, source, value, on):
    xs, ys = tensors(float("nan"), target), tensors(value, source)
    before = [x.clone() for x in xs]
    with guarded(on):
        add_where_(xs, ys, torch.tensor(False))
    for x, b in zip(xs, before, strict=True):
        torch.testing.assert_close(x, b, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("flag", [True, False])
def test_targets_in_other_memory_layouts_are_added_to_as_well(flag, on):
    x, y = torch.randn(4, 6).t(), torch.randn(6, 4)
    expected = x + y if flag else x.clone()
    with guarded(on):
        add_where_([x], [y], torch.tensor(flag))
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_zeros_take_the_place_of_tensors_whatever_these_hold_unless_the_flag_is_set(
    value, dtype, flag, on
):
    xs = tensors(value, dtype)
    expected = [x.clone() if flag else torch.zeros_like(x) for x in xs]
    with guarded(on):
        result = zero_unless(xs, torch.tensor(flag))
    for x, e in zip(result, expected, strict=True):
        assert x.dtype is dtype
        torch.testing.assert_close(x, e, equal_nan=True, rtol=0, atol=0)


def test_empty_lists_are_left_alone(on):
    with guarded(on):
        add_where_([], [], torch.tensor(True))
        scale_([], torch.tensor(2.0))


def test_tensors_of_several_precisions_are_scaled_together(on):
    xs = [torch.ones(3, dtype=dtype) for dtype in DTYPES]
    with guarded(on):
        scale_(xs[:1], torch.tensor(0.5))
    assert xs[0].tolist() == [0.5] * 3


def test_a_quotient_that_is_not_finite_is_zero(on):
    with guarded(on):
        values = [quotient(torch.tensor(a), torch.tensor(b)) for a, b in [(1.0, 0.0), (0.0, 0.0)]]
        values += [quotient(torch.tensor(float("nan")), torch.tensor(1.0))]
        values += [quotient(torch.tensor(3.0), torch.tensor(2.0))]
    assert torch.stack(values).tolist() == [0.0, 0.0, 0.0, 1.5]


def test_a_moving_average_has_started_once_a_usable_gradient_came(on):
    state, started = {}, []
    with guarded(on):
        for usable in (False, False, True, False):
            started.append(mark_started(state, "slot", torch.tensor(usable)))
    assert [bool(x) for x in started] == [False, False, False, True]

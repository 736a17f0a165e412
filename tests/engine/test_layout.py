"""Numbers over all weights, however they are stored."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam_hf.distributed import DDPLayout
from sam_hf.engine.layout import Layout


def parameters(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def layout_of(tensors):
    weights = nn.ParameterList([nn.Parameter(x) for x in tensors])
    return Layout(list(weights), weights)


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
    layout = layout_of(xs)
    exact = sum((x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True))
    result = layout.dot(xs, ys)
    assert result.dtype is accumulated and result.ndim == 0
    assert float(result) == pytest.approx(float(exact), rel=1e-6)
    square = sum(x.double().square().sum() for x in xs)
    assert float(layout.dot(xs, xs)) == pytest.approx(float(square), rel=1e-6)
    assert layout.dot([], []) == 0


def test_the_norm_of_a_million_numbers_is_exact_to_six_digits():
    x = torch.randn(1_000_003)
    layout = layout_of([x])
    assert float(layout.dot([x], [x])) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_the_inner_product_does_not_depend_on_the_memory_layout():
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    layout = layout_of([x])
    turned = y.t().contiguous().t()
    assert turned.stride() != y.stride()
    torch.testing.assert_close(layout.dot([x], [turned]), layout.dot([x], [y]))


def exact(xs, ys):
    return float(sum((x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True)))


@pytest.mark.parametrize(
    "sizes",
    [
        [1] * 3000,
        [7, 0, 1, 3] * 500,
        [2**15] * 3,
        [2**15 - 1, 2, 2**15 + 1, 1, 100_000, 5],
        [0],
        [0, 0, 3],
        [2**15, 1],
    ],
    ids=lambda sizes: f"{len(sizes)}-of-{sizes[0]}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_inner_product_over_many_small_tensors_is_that_in_float64(sizes, dtype):
    """Whether they are put together or, where one is large, taken apart."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for n in sizes]
    ys = [torch.rand(n, generator=g, dtype=torch.float64).to(dtype) for n in sizes]
    layout = layout_of(xs)
    scale = exact([x.abs() for x in xs], ys)
    precision = 1e-13 if dtype is torch.float64 else 1e-6
    result = layout.dot(xs, ys)
    assert result.ndim == 0 and result.dtype is layout.accumulate_in
    assert abs(float(result) - exact(xs, ys)) <= precision * scale
    assert float(layout.dot(xs, xs)) == pytest.approx(exact(xs, xs), rel=precision)
    assert float(layout.dot(xs, list(xs))) == pytest.approx(exact(xs, xs), rel=precision)
    assert layout.dot_over(list(xs))(xs, ys) == result


def test_the_inner_product_over_tensors_of_several_precisions_and_shapes_is_that_in_float64():
    xs = [torch.randn(3, 4).bfloat16(), torch.randn(5), torch.randn((), dtype=torch.float64)]
    ys = [torch.randn(3, 4), torch.randn(5).half(), torch.randn((), dtype=torch.float64)]
    result = layout_of(xs).dot(xs, ys)
    assert result.dtype is torch.float64
    assert float(result) == pytest.approx(exact(xs, ys), rel=1e-12)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_makes_the_inner_product_not_finite(bad):
    xs = [torch.ones(3) for _ in range(50)]
    xs[20][1] = bad
    layout = layout_of(xs)
    assert not torch.isfinite(layout.dot(xs, xs))
    assert not torch.isfinite(layout.dot(xs, [torch.ones(3)] * 50))


def test_the_number_of_operations_does_not_grow_with_that_of_small_tensors():
    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def operations(n):
        xs = [torch.ones(10) for _ in range(n)]
        layout = layout_of(xs)
        with Counts() as counts, torch.no_grad():
            layout.dot(xs, xs)
            layout.dot(xs, list(xs))
        # Reshaping is none.
        return counts.calls - 3 * n

    assert operations(400) <= operations(4) + 10


def test_one_process_with_accelerate_has_the_numbers_of_one_without():
    xs = [p.detach() for p in parameters((100, 100), (1000,), ())]
    model = nn.ParameterList([nn.Parameter(x) for x in xs])
    layout = DDPLayout(list(model), model, model, Accelerator())
    assert layout.dot(xs, xs) == layout_of(xs).dot(xs, xs)
    numbers = [torch.tensor(1.0), torch.tensor(2)]
    assert layout.sum_over_processes(numbers).tolist() == [1.0, 2.0]
    assert layout.place == layout_of(xs).place == (0, 1)

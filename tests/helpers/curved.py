"""Models whose curvature is known, and objectives over them."""

from __future__ import annotations

import torch
from tiny import Classifier, Rows, examples
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam_hf.diagnostics import Objective


class Quadratic(nn.Module):
    """L(w) = w'Hw/2 + c'w, in two tensors of 3 and 4 numbers, with eigenvalues 7, 6, ..., 1."""

    def __init__(self, values: Tensor | None = None, slope: float = 0.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        basis, _ = torch.linalg.qr(torch.randn(7, 7, generator=g, dtype=torch.float64))
        self.values = torch.arange(7.0, 0, -1).double() if values is None else values
        self.h = basis @ torch.diag(self.values) @ basis.T
        self.c = slope * torch.randn(7, generator=g, dtype=torch.float64)
        start = torch.randn(7, generator=g, dtype=torch.float64)
        self.first = nn.Parameter(start[:3].clone())
        self.second = nn.Parameter(start[3:].clone())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        w = torch.cat([self.first, self.second])
        return {"loss": w @ self.h @ w / 2 + self.c @ w + 0 * x.sum()}


class TwoNumbers(nn.Module):
    """L(a, b) = (a b - 1)² / 2: by hand, g = (ab - 1) (b, a)."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([b], dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.a * self.b - 1).square().sum() / 2 + 0 * x.sum()}


class _Fails(torch.autograd.Function):
    """The identity, whose derivative says that it cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return _FailsInBackward.apply(grad)


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("derivative for flash_backward is not implemented\nand more")


class _OnceDifferentiable(torch.autograd.Function):
    """As many fused kernels: x³, whose derivative is cut off from the graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Fused(nn.Module):
    """L(w) = Σ w³: the Hessian is diag(6 w). The kernel loses the second derivative, or fails."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.w = nn.Parameter(torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self._cubes().sum() + 0 * x.sum()}

    def _cubes(self) -> Tensor:
        return _Fails.apply(self.w) ** 3 if self.fails else _OnceDifferentiable.apply(self.w)


def batches(data: Rows, size: int) -> list[dict[str, Tensor]]:
    rows = data.rows
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def nothing(count: int = 2) -> list[dict[str, Tensor]]:
    """Batches for a model that does not look at them."""
    return [{"x": torch.zeros(4, 1)} for _ in range(count)]


def classifier(dropout: float = 0.0, size: int = 4, n: int = 10, **options: str) -> Objective:
    torch.manual_seed(0)
    return Objective(Classifier(dropout), batches(examples(n), size), **options)

"""A method and its twin on bare tensors, update after update, as a run applies them to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from reference_sam import Gradient, Loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sam_hf import SAMConfig
from sam_hf.engine.combiner import GradientCombiner
from sam_hf.engine.layout import Layout
from sam_hf.engine.perturbation import HALF, Perturbation, step_size
from sam_hf.methods import Dot

RHO, LR = 0.7, 0.5
NAMES = ["layer.weight", "layer.bias", "norm.weight"]
SHAPES = [(4, 3), (4,), (5,)]


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


@dataclass
class Inputs:
    """One update: its number, w, the gradients at w and anywhere else (None: there is none)."""

    number: int
    w: list[Tensor]
    g: Gradient
    g_s: Gradient

    def mapped(self, change: Callable[[Tensor], Tensor], *, w: bool = False) -> Inputs:
        """The same with other gradients, and with other weights where `w` is set."""
        g, g_s = ([None if x is None else change(x) for x in xs] for xs in (self.g, self.g_s))
        return Inputs(self.number, [change(x) for x in self.w] if w else self.w, g, g_s)


@dataclass
class Outcome:
    """What came of one update."""

    e: list[Tensor]
    gradient: Gradient
    """What the optimizer got."""
    result: Gradient
    """The same, and what was done to w beside a step of plain SGD, in units of the gradient."""


class Applied:
    """A method with its state, between `Perturbation`, `GradientCombiner` and an optimizer.

    Args:
        name: the method's.
        options: its options, named as in `SAMConfig`.
        takes_all: perturb all parameters in each update, whatever the method chooses.
        dot: for a part of the model, the inner product over all parts.
        guard: a context for all that the library does.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any] | None = None,
        *,
        names: Sequence[str] = NAMES,
        rho: float = RHO,
        takes_all: bool = False,
        dot: Dot | None = None,
        guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        given = {"sam_rho": RHO, "sam_method": name, **(options or {})}
        self.method = SAMConfig(**given).build_method()
        self.names, self.rho, self.takes_all = list(names), rho, takes_all
        self.dot, self.guard = dot, guard
        self.state: dict[str, dict[str, Tensor]] = {}

    def chosen(self, number: int) -> list[bool]:
        """Which parameters an update perturbs."""
        if self.takes_all:
            return [True] * len(self.names)
        kept = set(self.method.choose(self.names, number, 0))
        return [name in kept for name in self.names]

    def __call__(self, inputs: Inputs) -> Outcome:
        parameters = {
            name: torch.nn.Parameter(x.clone())
            for name, x in zip(self.names, inputs.w, strict=True)
        }
        layout = Layout(list(parameters.values()), torch.nn.ParameterList(parameters.values()))
        if self.dot is not None:
            layout.dot = self.dot
        optimizer = torch.optim.SGD(parameters.values(), lr=LR)
        combiner = GradientCombiner(self.method, self.state, layout, parameters, optimizer)
        combiner.rho = self.rho
        perturbation: Perturbation | None = None
        if self.method.along_momentum:
            momentum = {
                name: v.clone()
                for name, v in zip(self.names, inputs.g, strict=True)
                if v is not None
            }
            perturbation = self._move(layout, parameters, momentum, -self.rho)
            for name, v in zip(self.names, inputs.g, strict=True):
                assert v is None or torch.equal(momentum[name].nan_to_num(), v.nan_to_num())
        else:
            self._set(parameters, inputs.g)
            if self.method.should_perturb(inputs.number, self.state):
                combiner.keep()
                perturbation = self._ascend(layout, parameters, inputs.number)
        if perturbation is None:
            e = [torch.zeros_like(x) for x in inputs.w]
            with self.guard():
                combiner.reuse()
        else:
            e = [p.detach() - x for p, x in zip(parameters.values(), inputs.w, strict=True)]
            perturbation.restore()
            assert all(
                torch.equal(p, x) for p, x in zip(parameters.values(), inputs.w, strict=True)
            )
            self._set(parameters, inputs.g_s)
            with self.guard():
                combiner.combine()
        gradient = [None if p.grad is None else p.grad.clone() for p in parameters.values()]
        with self.guard():
            optimizer.step()
        moved = [
            None if g is None else (x - p.detach()) / LR
            for p, x, g in zip(parameters.values(), inputs.w, gradient, strict=True)
        ]
        return Outcome(e, gradient, moved if self.method.acts_on_step else gradient)

    def _ascend(
        self, layout: Layout, parameters: dict[str, torch.nn.Parameter], number: int
    ) -> Perturbation:
        flags = zip(parameters.items(), self.chosen(number), strict=True)
        perturbed = {n: p for (n, p), flag in flags if flag and p.grad is not None}
        grads = layout.gradients(list(perturbed.values()))
        if self.method.remembers_gradients:
            grads = [g.float() if g.dtype in HALF else g for g in grads]
        return self._move(layout, parameters, dict(zip(perturbed, grads, strict=True)), self.rho)

    def _move(
        self,
        layout: Layout,
        parameters: dict[str, torch.nn.Parameter],
        grads: dict[str, Tensor],
        rho: float,
    ) -> Perturbation:
        weights = [parameters[name].detach() for name in grads]
        before = [w.clone() for w in weights]
        perturbation = Perturbation(weights)
        with torch.no_grad(), self.guard():
            direction, squared = self.method.direction(
                list(grads), weights, list(grads.values()), layout.dot, self.state
            )
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        with self.guard():
            keeps = self.method.keeps_direction
            perturbation.apply(direction, step_size(rho, squared), keeps)
        return perturbation

    def _set(self, parameters: dict[str, torch.nn.Parameter], grads: Gradient) -> None:
        for p, g in zip(parameters.values(), grads, strict=True):
            p.grad = None if g is None else g.clone()


# ---- The twins --------------------------------------------------------------------------------


class Scripted:
    """A loss with the gradient g at w, and g_s at any other point. It notes where it was asked."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.points: list[list[Tensor]] = []

    def __call__(self, leaves: list[Tensor]) -> Tensor:
        w = self._inputs.w
        self.points.append([x.detach().clone() for x in leaves])
        is_w = all(torch.equal(x, w_i) for x, w_i in zip(leaves, w, strict=True))
        gradient = self._inputs.g if is_w else self._inputs.g_s
        return sum((a * x).sum() for a, x in zip(gradient, leaves, strict=True) if a is not None)


Step = Callable[["TwinInputs"], tuple[Gradient, dict[str, Any]]]


@dataclass
class TwinInputs:
    """What a twin is given for one update."""

    w: list[Tensor]
    losses: list[Loss]
    state: dict[str, Any]
    t: int
    g: Gradient
    """Or the optimizer's momentum, for a method that goes along it."""
    chosen: list[bool]
    """Which parameters are perturbed, where that is drawn."""


@dataclass
class Twin:
    """A method written from its paper: for one update, what the optimizer gets and the state."""

    step: Step
    options: dict[str, Any] = field(default_factory=dict)


class AppliedTwin:
    """A twin with its state, on the same tensors as `Applied`."""

    def __init__(self, twin: Twin) -> None:
        self._twin = twin
        self.state: dict[str, Any] = {}

    def __call__(self, inputs: Inputs, chosen: list[bool]) -> tuple[list[Tensor], Gradient]:
        """e, and what the optimizer gets."""
        loss = Scripted(inputs)
        given = TwinInputs(inputs.w, [loss], self.state, inputs.number, inputs.g, chosen)
        gradient, self.state = self._twin.step(given)
        return [x - w for x, w in zip(loss.points[-1], inputs.w, strict=True)], gradient


# ---- On the device ----------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Refuses to let the host read a number from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        assert func is not torch.ops.aten.equal.default, "the host waits"
        return func(*args, **(kwargs or {}))

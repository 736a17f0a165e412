"""DeepSpeed's ZeRO 0, 1 and 2: all weights in each process, gradients in DeepSpeed's hands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..side_effects import shadowed
from .replicated import Backend


class DeepSpeedBackend(Backend):
    """Keeps the pass at w out of DeepSpeed's sight, and puts w back before DeepSpeed steps.

    DeepSpeed takes the gradients away in hooks of the backward pass, and Accelerate lets it step
    inside `accelerator.backward`. So the pass at w goes past the engine, and its gradients
    are computed by `torch.autograd.grad`, which calls no hooks. In scope `batch` they are reduced
    here, once for each update.
    """

    def __init__(self, weights: Sequence[nn.Parameter], *args: Any) -> None:
        super().__init__(weights, *args)
        self._weights = [w for w in weights if w.requires_grad]

    @property
    def _engine(self) -> Any:
        if self._accelerator.deepspeed_engine_wrapped is None:
            raise RuntimeError(
                "DeepSpeed's engine is gone after the first train() of a trainer. Make a new one."
            )
        return self._accelerator.deepspeed_engine_wrapped.engine

    @property
    def reduces_kept_gradients(self) -> bool:
        return self.is_end_of_update

    @property
    def can_take_some_gradients(self) -> bool:
        return False  # the ascent takes no others in any case

    def descent_is_awaited(self, each_alone: bool) -> bool:
        return True  # DeepSpeed has not seen these examples yet

    @contextmanager
    def ascent(self, model: nn.Module, each_alone: bool) -> Iterator[None]:
        engine = self._engine

        def backward(loss: Tensor, **kwargs: Any) -> None:
            loss = loss * self._loss_scale  # gradients in fp16 must not vanish
            grads = torch.autograd.grad(loss, self._weights, allow_unused=True)
            for w, g in zip(self._weights, grads, strict=True):
                if g is not None:
                    # autograd may hand out one tensor twice, or an expanded one
                    w.grad = g.clone() if w.grad is None else w.grad.add_(g)

        def forward(*args: Any, **kwargs: Any) -> Any:
            dtype, enabled = engine.torch_autocast_dtype(), engine.torch_autocast_enabled()
            with torch.autocast(self._device.type, dtype=dtype, enabled=enabled):
                return engine.module(*args, **kwargs)

        with shadowed(self._accelerator, backward=backward), shadowed(engine, forward=forward):
            yield
        if self.is_end_of_update and not each_alone:
            self.reduce_ascent(self._weights)

    @contextmanager
    def _without_reduction(self, model: nn.Module) -> Iterator[None]:
        # Accelerate tells DeepSpeed to reduce and to step where an update ends.
        with self._as_end_of_update(False):
            yield

    @contextmanager
    def descent(self, put_back: Callable[[], None]) -> Iterator[None]:
        steps: list[tuple[Any, Any]] = []

        def note(*args: Any, **kwargs: Any) -> None:
            steps.append((args, kwargs))

        with shadowed(self._engine, step=note):
            yield
        put_back()
        for args, kwargs in steps:
            self._engine.step(*args, **kwargs)

    def descent_gradients(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        return [None] * len(weights)  # DeepSpeed has them, in parts

    def loss_scale(self) -> Tensor | None:
        return torch.tensor(self._loss_scale)

    @property
    def _loss_scale(self) -> float:
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

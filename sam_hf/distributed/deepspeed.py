"""DeepSpeed's ZeRO 0, 1 and 2: parameters whole on every process, gradients held by DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.state import patched
from .ddp import DDPLayout


class DeepSpeedLayout(DDPLayout):
    """Hides the ascent pass from DeepSpeed, and restores w before DeepSpeed steps.

    DeepSpeed takes the gradients in hooks of the backward pass, and Accelerate lets it step inside
    `accelerator.backward`. The ascent pass therefore bypasses its engine and uses
    `torch.autograd.grad`, which calls no hooks. In scope `batch` it reduces once per update.
    """

    can_take_some_gradients = False  # no others are computed anyway

    def __init__(self, weights: Sequence[nn.Parameter], *args: Any) -> None:
        super().__init__(weights, *args)
        self._weights = [w for w in weights if w.requires_grad]

    @property
    def _engine(self) -> Any:
        if self._accelerator.deepspeed_engine_wrapped is None:
            raise RuntimeError(
                "DeepSpeed's engine is gone after a trainer's first train(). Make a new trainer."
            )
        return self._accelerator.deepspeed_engine_wrapped.engine

    @property
    def reduces_kept_gradients(self) -> bool:  # type: ignore[override]
        return self.is_end_of_update

    def must_replay(self, scope_is_micro_batch: bool) -> bool:
        return True  # DeepSpeed has not seen these examples yet

    @contextmanager
    def ascent(self, scope_is_micro_batch: bool, some: Sequence[Tensor] = ()) -> Iterator[None]:
        engine = self._engine

        def backward(loss: Tensor, **kwargs: Any) -> None:
            loss = loss * self.loss_scale()  # gradients in fp16 must not underflow
            grads = torch.autograd.grad(loss, self._weights, allow_unused=True)
            for w, g in zip(self._weights, grads, strict=True):
                if g is not None:
                    # autograd may return one tensor twice, or an expanded one
                    w.grad = g.clone() if w.grad is None else w.grad.add_(g)

        def forward(*args: Any, **kwargs: Any) -> Any:
            dtype, enabled = engine.torch_autocast_dtype(), engine.torch_autocast_enabled()
            with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
                return engine.module(*args, **kwargs)

        with patched(self._accelerator, backward=backward), patched(engine, forward=forward):
            yield
        if self.is_end_of_update and not scope_is_micro_batch:
            self.reduce_ascent(self._weights)

    def _without_reduction(self) -> AbstractContextManager[None]:
        # Accelerate lets DeepSpeed reduce and step where an update ends.
        return self._as_end_of_update(False)

    def descent(self, passes: Callable[[], Tensor], restore: Callable[[], None]) -> Tensor:
        steps: list[tuple[Any, Any]] = []
        with patched(self._engine, step=lambda *args, **kwargs: steps.append((args, kwargs))):
            loss = passes()
        restore()
        for args, kwargs in steps:
            self._engine.step(*args, **kwargs)
        return loss

    def descent_gradients(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        return [None] * len(weights)  # DeepSpeed holds them, in partitions

    def loss_scale(self) -> Tensor:
        return torch.tensor(float(getattr(self._engine.optimizer, "loss_scale", 1.0)))

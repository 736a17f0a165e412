"""Which of the gradients in `.grad` are those of the recorded losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .layout import Layout

Grads = list[Tensor | None]


class GradientLedger:
    """Separates the gradients of the recorded losses (g) from foreign ones in `.grad`.

    Foreign gradients are those of other losses: the gradient of a penalty whose `backward` other
    code calls, or that of an earlier call of the training step. They do not contribute to e and are
    added to g_s afterwards.

    Between recorded losses `.grad` holds the sum of both, as in plain training; inside
    `take` ... `show` it holds g alone.

    `.grad` can only be read and set one parameter at a time: the loops here cost about 0.2 us per
    parameter and call.

    Args:
        layout: how gradients are stored.
        parameters: all parameters that may have a gradient.
        is_watched: foreign code may write gradients between a recorded loss and the next `take`.
            Then a copy of g is kept, without which the two could not be separated.
    """

    def __init__(self, layout: Layout, parameters: Sequence[Tensor], is_watched: bool) -> None:
        self._layout, self.is_watched = layout, is_watched
        self.parameters = parameters
        self._g: Grads | None = None  # a copy of g, where `.grad` holds something else
        self._shown: list[tuple[Tensor | None, int]] | None = None  # None: the scope starts
        self._foreign: Grads | None = None
        self._is_taken = self.is_lost = False

    def reset(self) -> None:
        """Start a new scope: all of `.grad` counts as foreign."""
        self.is_lost = False  # whether g can no longer be separated from foreign gradients
        self._is_taken, self._g, self._shown, self._foreign = False, None, None, None

    def was_cleared(self) -> bool:
        """Whether other code has cleared the gradients of the recorded losses."""
        return (
            self._shown is not None
            and not self._is_taken
            and any(g is not None for g, _ in self._shown)
            and all(p.grad is None for p in self.parameters)
        )

    def take(self) -> None:
        """Leave only g in `.grad`, and set foreign gradients aside, until `show` or `reset`.

        Raises:
            RuntimeError: other code has changed gradients where no copy of g was kept.
        """
        if self._is_taken:
            return
        now: Grads = [p.grad for p in self.parameters]
        if self._shown is None:
            if any(g is not None for g in now):
                if self._layout.grads_live_in_buffers:  # which the next backward pass writes
                    now = [None if g is None else g.clone() for g in now]
                self._foreign = now
                self.clear()
        else:
            is_changed = any(
                g is not old or _version(g) != version
                for g, (old, version) in zip(now, self._shown, strict=True)
            )
            if is_changed and self._g is None:
                self.is_lost = True
                raise RuntimeError(
                    "Gradients were changed between two micro-batches of an update, so that SAM "
                    "cannot tell which part of them is the gradient of the loss. Change them in "
                    "training_step or in on_pre_optimizer_step (a Trainer), before the first or "
                    "after the last micro-batch (a custom loop), or set "
                    "sam_scope='micro_batch' or sam_rho=0."
                )
            if is_changed and self._g is not None:
                self._foreign = self._add_(now, self._g, -1)
            if self._g is not None:
                self._set(self._g)
                self._g = None
        self._is_taken = True

    @contextmanager
    def of_a_loss(self) -> Iterator[Callable[[Tensor], object]]:
        """Context in which a recorded loss is computed, if foreign code may write gradients too.

        The block calls the given function with the loss. What is written in the block, and in the
        backward pass of the loss, counts as g, and nothing else does.
        """
        engine = torch.autograd.Variable._execution_engine

        def begin(gradient: Tensor) -> None:
            self.take()
            # Queued twice: callbacks run in their order, and DDP's reduction is queued in between.
            engine.queue_callback(lambda: engine.queue_callback(self.show))

        self.take()
        try:
            yield lambda loss: loss.requires_grad and loss.register_hook(begin)  # type: ignore[no-untyped-call]
        finally:
            self.show()

    def show(self) -> None:
        """Add the foreign gradients to g in `.grad`, and keep g."""
        if not self._is_taken:
            return
        self._is_taken = False
        if self._foreign is not None or self.is_watched:
            self._g = [p.grad for p in self.parameters]
            copies: Grads = [None if g is None else g.clone() for g in self._g]
            self._set(self._add_(copies, self._foreign or [None] * len(copies)))
        grads = (p.grad for p in self.parameters)
        self._shown = [(g, _version(g)) for g in grads]

    @property
    def has_foreign(self) -> bool:
        return self._foreign is not None

    def put_foreign(self) -> None:
        """Put the foreign gradients into `.grad`: the next pass adds to them."""
        if self._foreign is not None:
            self._set(self._foreign)
            self._foreign = None

    def finish(self) -> None:
        """Add the foreign gradients to what `.grad` holds, and start a new scope."""
        if self._foreign is not None:
            self._set(self._add_(self._foreign, [p.grad for p in self.parameters]))
        self.reset()

    def discard(self) -> None:
        """Drop g, put the foreign gradients back, and start a new scope."""
        if self._is_taken or self._shown is not None or self._foreign is not None:
            self.clear()
        self.put_foreign()
        self.reset()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None
        if self._shown:
            self._shown = []  # it held g, whose memory the second pass needs

    def _set(self, grads: Grads) -> None:
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g

    def _add_(self, total: Grads, others: Grads, alpha: float = 1) -> Grads:
        """total + alpha * others, in the memory of `total` where that has a gradient."""
        pairs = list(zip(total, others, strict=True))
        both = [(x, y) for x, y in pairs if x is not None and y is not None]
        if both:
            xs, ys = (self._layout.local(side) for side in zip(*both, strict=True))
            torch._foreach_add_(xs, ys, alpha=alpha)
        return [x if x is not None or y is None else alpha * y for x, y in pairs]


def _version(grad: Tensor | None) -> int:
    # Of a DTensor too: FSDP2 adds to its local tensor, which its own version does not count.
    return 0 if grad is None else grad._version + getattr(grad, "_local_tensor", grad)._version

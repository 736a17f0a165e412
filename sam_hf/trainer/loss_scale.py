"""Check that a training step does not rescale its loss: the replay would not repeat that."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LossScaleCheck:
    """Compares, once per run, the training step of the trainer's class with Trainer's own."""

    def __init__(self) -> None:
        self.is_done = False
        self._losses: list[Tensor] = []
        self._factor: Tensor | None = None

    def start_update(self) -> None:
        """Forget an update that was not replayed: the next one may have fewer micro-batches."""
        self._losses, self._factor = [], None

    def add_loss(self, result: Tensor) -> None:
        """Record a loss of the current micro-batch; one per device under `DataParallel`."""
        loss = result.detach()
        self._losses.append(loss.mean() if loss.ndim else loss.clone())

    def end_ascent(self, returned: Tensor) -> None:
        """Record the factor by which the training step multiplied the losses of its micro-batch."""
        if self._factor is None and self._losses:
            self._factor = returned / torch.stack(self._losses).sum()
        self._losses = []

    def compare(self, trainer: str, returned: Tensor) -> None:
        """Raise RuntimeError if the factor of a replayed call differs. Waits for the device."""
        losses, factor = self._losses, self._factor
        self.start_update()
        if factor is None or not losses:
            return
        ours, theirs = float(returned / losses[0]), float(factor)
        if not (math.isfinite(ours) and math.isfinite(theirs)):  # the loss was 0 or not finite
            return
        self.is_done = True
        if abs(ours - theirs) > 0.02 * abs(ours):  # the precision of a loss in bfloat16
            raise RuntimeError(
                f"{trainer}.training_step returned {theirs:.4g} times what compute_loss returned; "
                f"Trainer's own returns {ours:.4g} times it. SAM replays compute_loss through "
                "Trainer.training_step, so that what is done to the loss elsewhere would be lost "
                "in the second pass. Do it in compute_loss, or set sam_rho=0."
            )

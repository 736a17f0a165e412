"""Whether a training step rescales its loss, which the replay would not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .replay import RecordedCall


class LossScale:
    """Compares, once in a run, the step of the trainer's class with Trainer's own."""

    def __init__(self) -> None:
        self._theirs: Tensor | None = None
        self._is_checked = False

    def note(self, calls: list[RecordedCall], returned: Tensor) -> None:
        """Remember by what a training step multiplied the loss of its calls."""
        if self._theirs is None and not self._is_checked:
            losses = [call.loss for call in calls if call.loss is not None]
            self._theirs = returned / torch.stack(losses).sum()

    def check(self, trainer: str, call: RecordedCall, returned: Tensor) -> None:
        """Once, since it waits for the device: whether Trainer's own step multiplies by the same.

        Raises:
            RuntimeError: it does not, so the replay would not be that of the training step.
        """
        if self._is_checked or self._theirs is None or call.loss is None:
            return
        ours, theirs = float(returned / call.loss), float(self._theirs)
        if not (math.isfinite(ours) and math.isfinite(theirs)):  # the loss was 0 or no number
            self._theirs = None
            return
        self._is_checked = True
        if abs(ours - theirs) > 0.02 * abs(ours):  # a loss in bfloat16 is no more exact
            raise RuntimeError(
                f"{trainer}.training_step returned {theirs:.4g} times what compute_loss returned; "
                f"Trainer's own returns {ours:.4g} times it. SAM replays compute_loss through "
                "Trainer.training_step, so that what is done to the loss elsewhere would be lost "
                "in the second pass. Do it in compute_loss, or set sam_rho=0."
            )

    def forget(self) -> None:
        """Forget what an update has left: the next one may have fewer micro-batches."""
        self._theirs = None

"""The mixin that adds SAM to a Trainer class, and the trainers made with it."""

from __future__ import annotations

from .mixin import SAMSeq2SeqTrainer, SAMTrainer, SAMTrainerMixin, with_sam

__all__ = ["SAMSeq2SeqTrainer", "SAMTrainer", "SAMTrainerMixin", "with_sam"]

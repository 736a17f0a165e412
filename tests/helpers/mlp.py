"""A three-layer MLP in float64, trainer classes around SAM, and comparisons with plain training."""

from __future__ import annotations

from typing import Any

import torch
from tiny import CLASSES, FEATURES, examples, sam_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer

from sam_hf import SAMTrainer, with_sam

TINY_RHO = 1e-7


class MLP(nn.Module):
    """Three layers; the first two have the same size. The loss is the mean over the examples."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.middle = nn.Linear(FEATURES, FEATURES) if middle is None else middle
        self.head = nn.Linear(FEATURES, CLASSES)
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def plain(theirs: type) -> type:
    """A class that overrides methods of Trainer, on Trainer."""
    return type("Plain", (theirs, Trainer), {})


def above(theirs: type) -> type:
    """The same as a subclass of SAMTrainer: its methods call those of SAM."""
    return type("Above", (theirs, SAMTrainer), {})


def below(theirs: type) -> type:
    """The same given to `with_sam`: the methods of SAM call its methods."""
    return with_sam(plain(theirs))


def build(
    trainer_class: type, model: Any = MLP, accumulation: int = 1, data: Any = None, **kwargs: Any
) -> Any:
    """A trainer of `model()` with the options of `sam_trainer`, seeded; three updates by SGD."""
    torch.manual_seed(0)
    return sam_trainer(
        model(),
        examples(12 * accumulation) if data is None else data,
        trainer_class,
        gradient_accumulation_steps=accumulation,
        **kwargs,
    )


def trained(*args: Any, **kwargs: Any) -> Any:
    trainer = build(*args, **kwargs)
    trainer.train()
    return trainer


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    """Of all parameters and buffers: equal up to what a tiny rho changes."""
    assert_close(actual.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)

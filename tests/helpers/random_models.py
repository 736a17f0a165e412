"""Models for property-based tests: small float64 classifiers that a frozen dataclass describes.

A failing example is therefore printed as a value that can be pasted into a test.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tiny import CLASSES, FEATURES
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NORMS = ("none", "layer", "group", "batch", "batch_cumulative")
SOURCES = ("torch", "python", "numpy")
COUNTERS = ("number", "list", "tensor", "buffer", "rebound_buffer", "running_mean")
SAVED_COUNTERS = ("buffer", "rebound_buffer", "running_mean")
"""Those that a state dict holds."""


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        skipped_by: the source of random numbers that skips the block in half of the training calls.
        noise_by: the source of random numbers that scales the output in training.
        counter: training state that is written by every call and changes what the block computes.
        is_tied: the linear layer has the weight of the first block's.
    """

    norm: str = "none"
    has_dropout: bool = False
    skipped_by: str | None = None
    noise_by: str | None = None
    counter: str | None = None
    is_tied: bool = False
    is_frozen: bool = False


@dataclass(frozen=True)
class Architecture:
    """A linear stem, residual blocks and a linear head, which is always trained."""

    blocks: tuple[Block, ...] = ()
    width: int = 4
    is_stem_frozen: bool = False
    has_unused: bool = False

    @property
    def has_batch_norm(self) -> bool:
        return any(block.norm.startswith("batch") for block in self.blocks)

    @property
    def has_batch_statistics(self) -> bool:
        return self.has_batch_norm or any(b.counter == "running_mean" for b in self.blocks)

    @property
    def is_random(self) -> bool:
        return any(b.has_dropout or b.skipped_by or b.noise_by for b in self.blocks)

    @property
    def has_trained_norms(self) -> bool:
        return any(block.norm != "none" and not block.is_frozen for block in self.blocks)

    def without(self, **fields: Any) -> Architecture:
        """The same with these fields in every block."""
        return replace(self, blocks=tuple(replace(block, **fields) for block in self.blocks))


@st.composite
def architectures(draw: st.DrawFn, max_blocks: int = 3) -> Architecture:
    def maybe(values: tuple[str, ...]) -> st.SearchStrategy[str | None]:
        return st.none() | st.sampled_from(values)

    blocks = st.builds(
        Block,
        norm=st.sampled_from(NORMS),
        has_dropout=st.booleans(),
        skipped_by=maybe(SOURCES),
        noise_by=maybe(SOURCES),
        counter=maybe(COUNTERS),
        is_tied=st.booleans(),
        is_frozen=st.booleans(),
    )
    return Architecture(
        blocks=tuple(draw(st.lists(blocks, max_size=max_blocks))),
        # A norm over two numbers leaves their signs alone, and a gradient of rounding errors.
        width=draw(st.sampled_from([4, 6])),
        is_stem_frozen=draw(st.booleans()),
        has_unused=draw(st.booleans()),
    )


def _uniform(source: str, like: Tensor | None = None) -> Any:
    """Random numbers in [0, 1): one, or with torch as many as `like` has."""
    if source == "python":
        return random.random()
    if source == "numpy":
        return float(np.random.rand())
    return torch.rand((), dtype=torch.float64) if like is None else torch.rand_like(like)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width, dtype=torch.float64)
    if kind == "group":
        return nn.GroupNorm(width // 4 + width % 4 // 2, width, dtype=torch.float64)
    if kind.startswith("batch"):
        momentum = None if kind == "batch_cumulative" else 0.3
        return nn.BatchNorm1d(width, momentum=momentum, dtype=torch.float64)
    return nn.Identity()


class _Block(nn.Module):
    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.block = block
        # Batch norm takes out a bias, which would leave a gradient of rounding errors.
        has_bias = not block.norm.startswith("batch")
        self.linear = nn.Linear(width, width, has_bias, dtype=torch.float64)
        self.norm = _norm(block.norm, width)
        self.dropout = nn.Dropout(0.3 if block.has_dropout else 0.0)
        zeros = torch.zeros(width if block.counter == "running_mean" else (), dtype=torch.float64)
        if block.counter in SAVED_COUNTERS:
            self.register_buffer("count", zeros)
        else:
            self.count: Any = {"number": 0, "list": [], "tensor": zeros}.get(block.counter or "")

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training and self.block.skipped_by and _uniform(self.block.skipped_by) < 0.5:
            return hidden
        factor, shift = self._count(hidden) if self.training else (1.0, 0.0)
        inner = self.dropout(torch.tanh(self.norm(self.linear(hidden - shift))))
        if self.training and self.block.noise_by:
            inner = inner * (0.5 + _uniform(self.block.noise_by, inner))
        return hidden + factor * inner

    def _count(self, hidden: Tensor) -> tuple[Any, Any]:
        """Write the training state, and read it: a factor of the output and a shift of the input"""
        kind = self.block.counter
        if kind == "running_mean":
            self.count.lerp_(hidden.detach().mean(0), 0.5)
            return 1.0, self.count.clone()
        if kind == "list":
            self.count.append(len(self.count))
            return 1 / len(self.count), 0.0
        if kind in ("number", "rebound_buffer"):
            self.count = self.count + 1
        elif kind in ("tensor", "buffer"):
            self.count.add_(1)
        return (1.0 if kind is None else 1 / self.count), 0.0


class RandomModel(nn.Module):
    """The classifier that an `Architecture` describes. The loss is the mean over the examples."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.width
        self.stem = nn.Linear(FEATURES, width, dtype=torch.float64)
        self.stem.requires_grad_(not architecture.is_stem_frozen)
        self.blocks = nn.ModuleList(_Block(block, width) for block in architecture.blocks)
        for module in self.blocks:
            if module.block.is_tied:
                module.linear.weight = self.blocks[0].linear.weight
        for module in self.blocks:
            if module.block.is_frozen:
                module.requires_grad_(False)
        if architecture.has_unused:
            self.unused = nn.Linear(3, 2, dtype=torch.float64)
        self.head = nn.Linear(width, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        return {"loss": cross_entropy(logits, labels), "logits": logits}

    def counts(self) -> list[Any]:
        """The training state of every block, also what no state dict holds."""
        return [block.count for block in self.blocks]

"""Batches of whatever kind a model takes: their size, their device, the loss of a model on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers computes itself.

    Raises:
        ValueError: its first output is no scalar.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, not a mapping: give loss=, a function of the "
            "model and the batch"
        )
    output = model(**batch)
    loss: Any = output["loss"] if isinstance(output, Mapping) and "loss" in output else None
    if loss is None and not isinstance(output, Mapping):
        loss = output[0] if isinstance(output, tuple) else output
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            f"{type(model).__name__} gave no loss for a batch with {sorted(batch)}: add the "
            "labels, or give loss=, a function of the model and the batch"
        )
    return loss


def batch_size(batch: Any) -> int:
    """The length of the first dimension of the first tensor in the batch."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for item in batch:
            if size := batch_size(item):
                return size
    return 0


def to_device(value: Any, device: torch.device) -> Any:
    """The same with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def add_to_hash(digest: Any, value: Any) -> None:
    """Let a hash of `hashlib` depend on every tensor and number in the value."""
    if isinstance(value, Tensor):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            add_to_hash(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            add_to_hash(digest, item)
    else:
        digest.update(repr(value).encode())

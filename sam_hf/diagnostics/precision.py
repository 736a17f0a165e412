"""What a GPU computes otherwise than a measure of curvature can bear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# From the general setting to those of single operations, which follow it unless they were set.
_CUDNN: Any = torch.backends.cudnn
_SETTINGS: tuple[Any, ...] = (
    torch.backends,
    _CUDNN,
    _CUDNN.conv,
    _CUDNN.rnn,
    torch.backends.cuda.matmul,
)


@contextmanager
def full_precision(model: nn.Module, device: torch.device) -> Iterator[None]:
    """float32 is computed in float32, and recurrent layers by kernels that have gradients in
    evaluation mode: cuDNN's keep what they need for them in training mode alone.

    Convolutions are rounded to TF32's 10 bits by torch's default, other products where the user
    allows it. Differences of gradients would be those of the rounding.
    """
    if device.type != "cuda":
        yield
        return
    # Only what does not follow is set itself: the others go on following afterwards.
    changed: list[tuple[Any, str]] = []
    is_cudnn_used = _CUDNN.enabled
    try:
        for setting in _SETTINGS:
            if setting.fp32_precision != "ieee":
                changed.append((setting, setting.fp32_precision))
                setting.fp32_precision = "ieee"
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            _CUDNN.enabled = False
        yield
    finally:
        _CUDNN.enabled = is_cudnn_used
        for setting, precision in reversed(changed):
            setting.fp32_precision = precision

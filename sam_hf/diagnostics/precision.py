"""What a GPU computes otherwise than a measure of curvature can bear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Each of these may be allowed to round float32 to TF32's 10 bits; for convolutions that is torch's
# default. Differences of gradients would be those of the rounding.
_CUDNN: Any = torch.backends.cudnn
_OPERATIONS: tuple[Any, ...] = (_CUDNN.conv, _CUDNN.rnn, torch.backends.cuda.matmul)


@contextmanager
def full_precision(model: nn.Module, device: torch.device) -> Iterator[None]:
    """float32 is computed in float32, and recurrent layers by kernels that have gradients in
    evaluation mode: cuDNN's keep what they need for them in training mode alone."""
    if device.type != "cuda":
        yield
        return
    precisions = [operation.fp32_precision for operation in _OPERATIONS]
    is_cudnn_used = _CUDNN.enabled
    try:
        for operation in _OPERATIONS:
            operation.fp32_precision = "ieee"
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            _CUDNN.enabled = False
        yield
    finally:
        _CUDNN.enabled = is_cudnn_used
        for operation, precision in zip(_OPERATIONS, precisions, strict=True):
            operation.fp32_precision = precision

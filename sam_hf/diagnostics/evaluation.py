"""Deterministic evaluation of a model in full precision, without lasting side effects."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..compat import precision_settings
from ..engine.random_state import RandomState
from ..engine.state import always_restore, patched

_CUDNN: Any = torch.backends.cudnn


def preserved_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restore the global random state of the CPU and of `device` when the context exits."""
    return always_restore(RandomState([device] if device.type != "cpu" else []).restore)


@contextmanager
def full_precision(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Disable TF32 on a CUDA device, and cuDNN for models with recurrent layers.

    Finite differences of gradients would measure the rounding to TF32 (10-bit mantissa). The
    recurrent kernels of cuDNN support a backward pass only in training mode.
    """
    with ExitStack() as undo:
        for setting, name, exact in precision_settings() if device.type == "cuda" else ():
            # One that inherits the new value is not written, so that it inherits afterwards too.
            if (found := getattr(setting, name)) != exact:
                undo.callback(setattr, setting, name, found)
                setattr(setting, name, exact)
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            undo.callback(setattr, _CUDNN, "enabled", _CUDNN.enabled)
            _CUDNN.enabled = False
        yield


@contextmanager
def deterministic_evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode in full precision with gradients enabled, within the context.

    Dropout is off and running statistics are fixed (`eval()`); autocast and TF32 are disabled. On
    exit, the training flag of each module, all buffers and the global random state are restored.
    """
    # Some modules write buffers in evaluation mode too.
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for module, was_training, buffers in modules:
            module.training = was_training
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)

    # Accelerate replaces `forward` on the instance by a wrapper that enables autocast.
    original = vars(model).get("_original_forward")
    with (
        preserved_random_state(device),
        always_restore(restore),
        patched(model, **({} if original is None else {"forward": original})),
        full_precision(model, device),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        model.eval()
        yield

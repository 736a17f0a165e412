"""Layouts of processes and shards, and what each of them requires."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from .ddp import DDPLayout
from .deepspeed import DeepSpeedLayout
from .fsdp2 import FSDP2Layout, reshard
from .validation import validate_layout, validate_loop

__all__ = ["DDPLayout", "layout_for", "reshard", "validate_layout", "validate_loop"]


def layout_for(trainer: Any, weights: Sequence[nn.Parameter]) -> DDPLayout:
    """The layout of a Trainer that has prepared its model, with these perturbed parameters."""
    args, model, wrapped = trainer.args, trainer.model, trainer.model_wrapped
    is_compiled = bool(args.torch_compile) or any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in wrapped.modules()
    )
    options = (weights, model, wrapped, trainer.accelerator, args.n_gpu, is_compiled)
    if trainer.is_deepspeed_enabled:
        return DeepSpeedLayout(*options)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        sharding = getattr(getattr(model, "config", None), "distributed_config", None)
        n_replicas = getattr(sharding, "dp_replicate_size", None) or 1
        return FSDP2Layout(*options, has_replicas=n_replicas > 1)
    return DDPLayout(*options)

"""Where the weights live: what each layout of processes and shards needs done differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from .deepspeed import DeepSpeedBackend
from .refusals import refuse_what_cannot_work
from .replicated import Backend
from .sharded import ShardedBackend, reshard

__all__ = ["Backend", "backend_for", "refuse_what_cannot_work", "reshard"]


def backend_for(trainer: Any, weights: Sequence[nn.Parameter]) -> Backend:
    """The backend for the layout in which `trainer` runs.

    Args:
        trainer: a Trainer that has prepared its model.
        weights: the perturbed parameters.
    """
    backend = _backend_for(trainer, weights)
    # Also the devices that hold nothing that is perturbed: their dropout must be the same.
    devices = {p.device for p in trainer.model.parameters()}
    backend.rng_devices |= {device for device in devices if device.type not in ("cpu", "meta")}
    return backend


def _backend_for(trainer: Any, weights: Sequence[nn.Parameter]) -> Backend:
    accelerator, n_devices = trainer.accelerator, trainer.args.n_gpu
    shared = (weights, accelerator, n_devices, bool(trainer.args.torch_compile))
    if trainer.is_deepspeed_enabled:
        return DeepSpeedBackend(*shared)
    if any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        sharding = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
        n_replicas = getattr(sharding, "dp_replicate_size", None) or 1
        return ShardedBackend(*shared, has_replicas=n_replicas > 1)
    return Backend(*shared)

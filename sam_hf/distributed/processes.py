"""Collectives over the default process group, and unwrapping of replicated models.

For code that runs outside a training step. Every process must call the collectives. Without an
initialised process group, or with one process, they act on the local process alone.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether the default process group has more than one process."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_main_process() -> bool:
    """Whether this process has rank 0."""
    return not is_distributed() or dist.get_rank() == 0


def sum_over_processes_(tensors: Sequence[Tensor]) -> None:
    """All-reduce each tensor in place with a sum."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(number: float, device: torch.device) -> float:
    """Sum of `number` over the processes. `device` must suit the process group's backend."""
    tensor = torch.tensor(number, dtype=torch.float64, device=device)
    sum_over_processes_([tensor])
    return float(tensor.item())


def from_main_process(value: T, device: torch.device) -> T:
    """`value` of rank 0, pickled. `device` must suit the process group's backend."""
    box = [value]
    if is_distributed():
        dist.broadcast_object_list(box, 0, device=device)
    return box[0]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device."""
    return recursively_apply(lambda tensor: tensor.to(device), batch)


def unwrap(model: nn.Module) -> nn.Module:
    """Module inside DistributedDataParallel, DataParallel and `torch.compile` wrappers.

    ValueError unless this process holds the full parameters (FSDP, tensor parallelism, DeepSpeed).
    """
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (DistributedDataParallel, DataParallel)):
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)
    layout = ""
    if hasattr(inner, "zero_optimization") or any(hasattr(p, "ds_id") for p in inner.parameters()):
        layout = "weights managed by DeepSpeed"
    elif any(isinstance(p, DTensor) for p in inner.parameters()):
        layout = "sharded weights (FSDP2 or tensor parallelism)"
    elif any(isinstance(module, FullyShardedDataParallel) for module in inner.modules()):
        layout = "sharded weights (FSDP1)"
    if layout:
        raise ValueError(
            f"{type(inner).__name__} has {layout}, but sam_hf.diagnostics needs the full weights "
            "on every process. Allowed: one device, or DDP. Measure a saved model (save_model "
            "gathers the weights): sam-hf sharpness FOLDER"
        )
    return inner

"""What code outside a training step needs of several processes: sums, and the model inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel


def is_main_process() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def sum_over_processes_(tensors: Sequence[Tensor]) -> None:
    """Replace the tensors by their sums over all processes. All processes must call it."""
    if is_distributed():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            assert work is not None
            work.wait()


def largest_over_processes(number: int, device: torch.device) -> int:
    """All processes must call it."""
    if not is_distributed():
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def from_main_process_(tensor: Tensor, device: torch.device) -> None:
    """Write what the first process has into the tensor of every one. All must call it.

    Args:
        device: that on which the processes talk to each other; the tensor may lie elsewhere.
    """
    if is_distributed():
        there = tensor.to(device)
        dist.broadcast(there, 0)
        tensor.copy_(there)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that keep it whole: DDP, DataParallel, a compiled one.

    Raises:
        ValueError: this process holds a part of the weights only.
    """
    inside = getattr(model, "_orig_mod", model)
    if isinstance(inside, (DistributedDataParallel, DataParallel)):
        inside = inside.module
    inside = getattr(inside, "_orig_mod", inside)
    kind = _kind_of_shards(inside)
    if kind:
        raise ValueError(
            f"{type(inside).__name__} has {kind}, and the diagnostics need whole ones. Allowed: "
            "one device and DDP. Save the model (save_model gathers it) and measure what was "
            "saved: sam-hf sharpness FOLDER"
        )
    return inside


def is_distributed() -> bool:
    """Whether there is another process to work with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _kind_of_shards(model: nn.Module) -> str:
    if hasattr(model, "zero_optimization") or any(hasattr(p, "ds_id") for p in model.parameters()):
        return "weights that DeepSpeed keeps"
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return "sharded weights (FSDP2 or tensor parallelism)"
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "sharded weights (FSDP1)"
    return ""

"""Models, optimizers and processes of a custom training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..engine.state import patched
from .ddp import DDPLayout
from .deepspeed import DeepSpeedLayout
from .fsdp2 import FSDP2Layout


class PlainAccelerator:
    """The part of an `Accelerator` that layouts use, for a loop without Accelerate.

    Args:
        model: as the loop calls it: plain, compiled, DDP, or sharded with `fully_shard`.
        scaler: the loop's `torch.amp.GradScaler`, if it has one.
    """

    gradient_accumulation_steps = 1

    def __init__(self, model: nn.Module, scaler: Any) -> None:
        ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self._group = getattr(ddp, "process_group", None)
        is_alone = ddp is None and not is_sharded
        self.num_processes = 1 if is_alone else dist.get_world_size(self._group)
        self.process_index = 0 if is_alone else dist.get_rank(self._group)
        self.device = next(model.parameters()).device
        self.ddp_handler = ddp and SimpleNamespace(
            static_graph=ddp.static_graph, gradient_as_bucket_view=ddp.gradient_as_bucket_view
        )
        self.scaler = scaler
        self.gradient_state = SimpleNamespace(sync_gradients=True, plugin_kwargs={})

    @property
    def sync_gradients(self) -> bool:
        return bool(self.gradient_state.sync_gradients)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(**kwargs)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Skip the reduction of gradients over the processes."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)
        else:
            with getattr(model, "no_sync", nullcontext)():
                yield

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        if self.num_processes > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor


@contextmanager
def accumulating(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Context of a micro-batch before the last one of its update."""
    with patched(accelerator.gradient_state, sync_gradients=False), accelerator.no_sync(model):
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of `torch.compile`, DDP, DataParallel and DeepSpeed."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def is_deepspeed(accelerator: Any) -> bool:
    return str(getattr(accelerator, "distributed_type", "")).endswith("DEEPSPEED")


def loop_layout(
    model: nn.Module, accelerator: Accelerator | PlainAccelerator, weights: Sequence[nn.Parameter]
) -> DDPLayout:
    """The layout of a loop's model, with these perturbed parameters."""
    inner = unwrapped(model)
    is_compiled = any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()
    )
    n_devices = len(model.device_ids) if isinstance(model, DataParallel) else 1
    options = (weights, inner, model, accelerator, n_devices, is_compiled)
    if is_deepspeed(accelerator):
        return DeepSpeedLayout(*options)
    if any(isinstance(p, DTensor) for p in inner.parameters()):
        return FSDP2Layout(*options)
    return DDPLayout(*options)


def gathered(value: Any, processes: int) -> list[Any]:
    """The picklable values of all processes, which must all call this."""
    values = [value] * processes
    if processes > 1:
        dist.all_gather_object(values, value)
    return values

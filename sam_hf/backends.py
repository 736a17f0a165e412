"""Where the weights live, how they are read and written, and what cannot be trained with SAM.

The maths of the methods receives one primitive, `Backend.dot`, and never asks where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from .params import select_parameters, sparse_parameters

_HALF = (torch.float16, torch.bfloat16)


class Backend:
    """Numbers over all weights, and what the processes have to say to each other.

    Each process holds all weights, alone or under DDP.

    Args:
        weights: the perturbed parameters.
        accelerator: Accelerate's, which knows the processes and the loss scale.
    """

    def __init__(self, weights: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._device = weights[0].device if weights else torch.device("cpu")
        is_double = any(w.dtype is torch.float64 for w in weights)
        self.accumulate_in = torch.float64 if is_double else torch.float32
        self.rng_devices = {w.device for w in weights if w.device.type != "cpu"}
        self.half = any(w.dtype in _HALF for w in weights)

    @property
    def is_end_of_update(self) -> bool:
        """Whether this micro-batch is the last one of its update."""
        return bool(self._accelerator.sync_gradients)

    @property
    def is_end_of_epoch(self) -> bool:
        loader = self._accelerator.gradient_state
        return bool(loader.end_of_dataloader or not loader.in_dataloader)

    @property
    def reduces_gradients(self) -> bool:
        """Whether the backward pass of this micro-batch ends with a mean over the processes."""
        return self._accelerator.num_processes > 1 and self.is_end_of_update

    def local_gradients(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context for forward and backward whose gradients stay with this process."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def sum_over_processes(self, numbers: Sequence[Tensor]) -> Tensor:
        """The numbers as one tensor, added up over the processes, which must all call this."""
        # In float64 for float64 weights alone: not every device has it.
        total = torch.stack([n.detach().to(self._device, self.accumulate_in) for n in numbers])
        if self._accelerator.num_processes > 1:
            total = self._accelerator.reduce(total, reduction="sum")
        return total

    def unscaled(self, norm: Tensor) -> Tensor:
        """A norm of gradients without the factor of fp16's loss scaling."""
        scaler = self._accelerator.scaler
        return norm if scaler is None else norm / scaler.scale(torch.ones_like(norm))

    def dot(self, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        """The inner product over all tensors, accumulated in fp32 (float64 for float64 weights)."""
        if not xs:
            return torch.zeros((), dtype=self.accumulate_in)
        if xs is ys and xs[0].device.type != "cpu":
            norms = torch._foreach_norm(xs, 2, dtype=self.accumulate_in)
            return torch.stack(norms).square_().sum()
        # There is no multi-tensor inner product, and one made of multi-tensor operations would
        # write a copy of the weights. On a CPU this is also the norm: `vector_norm` adds up one
        # after the other, which is slower and, on 1e6 numbers, fifty times less exact.
        products = [
            torch.linalg.vecdot(
                x.flatten().to(self.accumulate_in), y.flatten().to(self.accumulate_in)
            )
            for x, y in zip(xs, ys, strict=True)
        ]
        return torch.stack(products).sum()

    def gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """g for the method to work on. fp16 cannot hold T² g (below 6e-8 it is 0): it gets fp32."""
        grads = [w.grad for w in weights if w.grad is not None]
        return [g.float() if g.dtype is torch.float16 else g for g in grads]


def step_size(rho: float, squared_norm: Tensor) -> Tensor:
    """ρ / |d|*, or 0 where that is no usable number. Decided on the device, without a wait."""
    size = rho / squared_norm.sqrt()
    return torch.where(torch.isfinite(squared_norm) & torch.isfinite(size), size, 0)


def _reading_is_free(number: Tensor) -> bool:
    """Whether a number can be read without waiting for a device to compute it."""
    return number.device.type == "cpu"


@torch.no_grad()
def add_scaled_(weights: list[Tensor], direction: list[Tensor], scale: Tensor) -> None:
    """w += scale · d, and nothing at all where scale is 0, even if d holds inf or NaN.

    `direction` is overwritten.
    """
    if any(w.dtype in _HALF for w in weights):
        # In fp32, tensor by tensor: neither the scale nor scale · d need fit the narrow type.
        for w, d in zip(weights, direction, strict=True):
            w.add_(torch.where(scale == 0, 0, d.float().mul_(scale)))
    elif _reading_is_free(scale):
        if factor := scale.item():
            torch._foreach_add_(weights, direction, alpha=factor)
    else:
        torch._foreach_mul_(direction, scale)
        nothing = scale == 0
        for d in direction:  # 0 · inf is NaN, and no multi-tensor operation turns NaN into 0
            d.masked_fill_(nothing, 0)
        torch._foreach_add_(weights, direction)


class Perturbation:
    """w + e in the place of w, until `restore` puts w back bit for bit.

    w comes back from a copy: subtracting e would leave rounding errors in every weight. It is
    written in place, because other objects (sharded parameters, flat buffers, captured graphs) hold
    on to the memory of the weights.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.saved: list[Tensor] | None = None

    @torch.no_grad()
    def apply(self, direction: list[Tensor], scale: Tensor) -> None:
        """Write w + scale · d. `direction` is overwritten."""
        saved = [torch.empty_like(w) for w in self.weights]
        torch._foreach_copy_(saved, self.weights)
        self.saved = saved
        add_scaled_(self.weights, direction, scale)
        # An autocast region that somebody opened around the training keeps casts of w.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def difference_(self) -> list[Tensor]:
        """e as it was really applied, in the memory of the weights; `restore` must follow."""
        assert self.saved is not None
        torch._foreach_sub_(self.weights, self.saved)
        return self.weights

    @torch.no_grad()
    def swallowed_share(self) -> float:
        """The share of half-precision weights that rounding left at w. Waits for the device."""
        assert self.saved is not None
        unchanged = total = 0
        for w, old in zip(self.weights, self.saved, strict=True):
            if w.dtype in _HALF:
                unchanged += int((w == old).sum())
                total += w.numel()
        return unchanged / max(total, 1)

    @torch.no_grad()
    def restore(self) -> None:
        """Put w back. A second call does nothing."""
        if self.saved is not None:
            torch._foreach_copy_(self.weights, self.saved)
            self.saved = None
            torch.clear_autocast_cache()


# Layouts in which each process holds all weights.
_REPLICATED = {
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_HPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_SDAA,
    DistributedType.MULTI_XPU,
}
_STEPS_INSIDE_BACKWARD = {
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
}


def refuse_what_cannot_work(trainer: Any, sam_params: str) -> None:
    """Raise where a SAM update would be wrong, with the reason and the way out.

    Raises:
        ValueError: the optimizer, the layout or the model cannot take part.
    """
    args, accelerator = trainer.args, trainer.accelerator
    optimizer = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    by_name = args.optim in _STEPS_INSIDE_BACKWARD
    by_type = issubclass(optimizer, LayerWiseDummyOptimizer)
    if by_name or by_type or optimizer.__name__.lower() in ("lomo", "adalomo"):
        what = f"optim={args.optim.value!r}" if by_name else f"The optimizer {optimizer.__name__}"
        raise ValueError(
            f"{what} updates the weights inside backward, before SAM has the gradient at w + e. "
            "Choose an optim that steps after backward, such as 'adamw_torch' or 'adafactor', or "
            "set sam_rho=0."
        )
    if is_sagemaker_mp_enabled():
        raise ValueError(
            "SageMaker model parallelism runs forward and backward in one call of its own, without "
            "compute_loss. Train without it, or set sam_rho=0."
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed steps inside backward, and SAM does not support it yet. Train without "
            "`deepspeed`, or set sam_rho=0."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism cut the inputs inside the training step, so that it "
            "cannot be replayed. Set cp_size=1 and sp_size=1 in `parallelism_config`, or sam_rho=0."
        )
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "FSDP shards the weights, which SAM does not support yet. Train without `fsdp`, or set "
            "sam_rho=0."
        )
    is_split = getattr(trainer, "is_model_parallel", False)  # PPO's trainer does not look
    if args.n_gpu > 1 or is_split:
        raise ValueError(
            f"SAM runs on one device in each process for the time being; this one has "
            f"{max(args.n_gpu, 1)} devices"
            f"{' and a model split by device_map' if is_split else ''}. "
            "Start a process for each device (`accelerate launch`), or set sam_rho=0."
        )
    kind = accelerator.distributed_type
    if accelerator.num_processes > 1 and kind not in _REPLICATED:
        raise ValueError(
            f"SAM does not support the layout {kind.value} of this run with "
            f"{accelerator.num_processes} processes. Use DDP, or set sam_rho=0."
        )
    handler = accelerator.ddp_handler
    is_static = accelerator.num_processes > 1 and handler is not None and handler.static_graph
    if is_static and trainer.sam_config.sam_scope == "micro_batch":
        raise ValueError(
            "sam_scope='micro_batch' takes its ascent without a reduction over the processes, "
            "which DDP cannot do with a static graph. Set ddp_static_graph=False, "
            "sam_scope='batch' or sam_rho=0."
        )
    perturbed = select_parameters(trainer.model, sam_params)
    if sparse := sorted(sparse_parameters(trainer.model) & perturbed.keys()):
        raise ValueError(
            f"{', '.join(sparse)}: the gradient is sparse, and SAM needs dense ones. Build the "
            "embedding with sparse=False, or set sam_rho=0."
        )

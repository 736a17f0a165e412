"""What cannot be trained with SAM, said before it does harm."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DistributedType
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..params import select_parameters, sparse_parameters

_SUPPORTED = {
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
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
        _refuse_deepspeed(trainer)
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism cut the inputs inside the training step, so that it "
            "cannot be replayed. Set cp_size=1 and sp_size=1 in `parallelism_config`, or sam_rho=0."
        )
    is_loaded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if trainer.is_fsdp_enabled and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={accelerator.state.fsdp_plugin.fsdp_version}: FSDP1 keeps the weights "
            "in flat buffers, which SAM does not support. Set fsdp_version=2 (`fsdp_config`: "
            '"version": 2), or sam_rho=0.'
        )
    sharding = getattr(trainer.model.config, "distributed_config", None) if is_loaded else None
    for name in ("ep_size", "pp_size"):
        if (size := getattr(sharding, name, None) or 1) > 1:
            raise ValueError(
                f"{name}={size} in distributed_config: SAM does not know which process holds which "
                f"weights there. Set {name}=1 (FSDP2 and tp_size are supported), or sam_rho=0."
            )
    if _fsdp_was_dropped(trainer):
        raise ValueError(
            f"FSDP was asked for, but Accelerate shards nothing on {accelerator.device.type}: "
            f"these {accelerator.num_processes} processes would train with DDP, all weights in "
            "each. Leave `fsdp` out, shard the model when it is loaded (`distributed_config`), "
            "train on GPUs, or set sam_rho=0."
        )
    kind = accelerator.distributed_type
    if accelerator.num_processes > 1 and kind not in _SUPPORTED:
        raise ValueError(
            f"SAM does not support the layout {kind.value} of this run with "
            f"{accelerator.num_processes} processes. Use DDP or FSDP2, or set sam_rho=0."
        )
    handler = accelerator.ddp_handler
    is_static = accelerator.num_processes > 1 and handler is not None and handler.static_graph
    if is_static and trainer.sam_config.sam_scope == "micro_batch":
        raise ValueError(
            "sam_scope='micro_batch' takes its ascent without a reduction over the processes, "
            "which DDP cannot do with a static graph. Set ddp_static_graph=False, "
            "sam_scope='batch' or sam_rho=0."
        )
    method = trainer.sam_config.build_method()
    if method.needs_adapters and (trainer.is_fsdp_enabled or is_loaded):
        raise ValueError(
            f"sam_method={trainer.sam_config.sam_method!r} needs whole adapters, and FSDP and "
            "tensor parallelism cut them. Train in one process or with DDP, or set sam_rho=0."
        )
    perturbed = select_parameters(trainer.model, sam_params)
    if sparse := sorted(sparse_parameters(trainer.model) & perturbed.keys()):
        raise ValueError(
            f"{', '.join(sparse)}: the gradient is sparse, and SAM needs dense ones. Build the "
            "embedding with sparse=False, or set sam_rho=0."
        )


def _fsdp_was_dropped(trainer: Any) -> bool:
    """Whether the options or `accelerate launch` say FSDP, and it is not what runs."""
    # Accelerate sets the first of the two by itself once a plugin is there; the launcher sets both.
    is_launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and "FSDP_VERSION" in os.environ
    is_asked = is_launched or getattr(trainer.args, "fsdp_plugin_args", None) is not None
    is_loaded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    is_sharded = trainer.is_fsdp_enabled or is_loaded
    return is_asked and not is_sharded and trainer.accelerator.num_processes > 1


def _refuse_deepspeed(trainer: Any) -> None:
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin.zero_stage not in (0, 1, 2):
        raise ValueError(
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} shards the weights behind an interface of "
            "its own, through which SAM cannot perturb them safely. Allowed: zero_stage 0, 1 or 2. "
            "To shard weights use FSDP2 (`fsdp`), or set sam_rho=0."
        )
    config = trainer.sam_config
    method, name = config.build_method(), f"sam_method={config.sam_method!r}"
    reason = None
    if method.along_momentum:
        reason = f"{name} perturbs along the optimizer's momentum, which DeepSpeed shards"
    elif method.keeps_gradient():
        reason = f"{name} combines the gradients at w and at w + e, and DeepSpeed hides the latter"
    elif method.steps_too():
        reason = f"{name} acts beside the optimizer's step, which DeepSpeed takes by itself"
    elif config.sam_trigger != "always":
        reason = "sam_trigger steps with the gradient of the ascent, which DeepSpeed has not seen"
    if reason is not None:
        raise ValueError(f"{reason}. Use DDP or FSDP2 (`fsdp`), or another method.")
    options = trainer.args.gradient_checkpointing_kwargs or {}
    if trainer.args.gradient_checkpointing and options.get("use_reentrant"):
        raise ValueError(
            "use_reentrant=True in activation_checkpointing_kwargs does not allow the gradients of "
            "the ascent to be computed beside DeepSpeed. Set use_reentrant=False, or sam_rho=0."
        )

"""Refusal of what SAM cannot train, before the first update, with the reason and a way out."""

from __future__ import annotations

import inspect
import os
from typing import Any, NoReturn

from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..engine.parameters import select_parameters, sparse_parameters
from ..methods import Method

# Values of Accelerate's `DistributedType`.
_SUPPORTED = """
DEEPSPEED FSDP MULTI_CPU MULTI_GPU MULTI_HPU MULTI_MLU MULTI_MUSA MULTI_NPU MULTI_SDAA MULTI_XPU
"""
_FUSED = ("lomo", "adalomo")  # optimizers that step inside backward


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"{reason}, or set sam_rho=0.")


def validate_layout(trainer: Any) -> None:
    """Refuse an optimizer, a layout or a model with which a SAM update would be wrong.

    Raises:
        ValueError: with the reason and what to change.
    """
    config, accelerator, kind = trainer.sam_config, trainer.accelerator, type(trainer).__name__
    method, n_processes = config.build_method(), accelerator.num_processes
    is_loaded = bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
    is_sharded = trainer.is_fsdp_enabled or is_loaded
    _validate_optimizer(trainer)
    if is_sagemaker_mp_enabled():
        _refuse(
            "SageMaker model parallelism runs forward and backward in one call of its own, without "
            "compute_loss. Train without it"
        )
    if trainer.is_deepspeed_enabled:
        _validate_deepspeed(trainer, method)
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        _refuse(
            "Context and sequence parallelism split the inputs inside the training step, which "
            "cannot be replayed. Set cp_size=1 and sp_size=1 in `parallelism_config`"
        )
    if trainer.is_fsdp_enabled and (version := accelerator.state.fsdp_plugin.fsdp_version) != 2:
        _refuse(
            f"fsdp_version={version}: FSDP1 keeps the weights in flat buffers, which SAM does not "
            'support. Set fsdp_version=2 (`fsdp_config`: "version": 2)'
        )
    sharding = getattr(trainer.model.config, "distributed_config", None) if is_loaded else None
    for name in ("ep_size", "pp_size"):
        if (size := getattr(sharding, name, None) or 1) > 1:
            _refuse(
                f"{name}={size} in distributed_config: SAM does not know which process holds which "
                f"weights there. Set {name}=1 (FSDP2 and tp_size are supported)"
            )
    # Accelerate sets the first variable by itself once a plugin exists; the launcher sets both.
    is_launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and "FSDP_VERSION" in os.environ
    is_asked = is_launched or getattr(trainer.args, "fsdp_plugin_args", None) is not None
    if is_asked and not is_sharded and n_processes > 1:
        _refuse(
            f"FSDP was requested, but Accelerate does not shard on {accelerator.device.type}: "
            f"these {n_processes} processes would train with DDP, with all weights on each. Leave "
            "`fsdp` out, shard the model when it is loaded (`distributed_config`), train on GPUs"
        )
    if n_processes > 1 and (layout := accelerator.distributed_type.value) not in _SUPPORTED.split():
        _refuse(
            f"SAM does not support the layout {layout} of this run with {n_processes} processes. "
            "Use DDP or FSDP2"
        )
    handler = accelerator.ddp_handler
    is_static = n_processes > 1 and handler is not None and handler.static_graph
    if is_static and config.sam_scope == "micro_batch":
        _refuse(
            "sam_scope='micro_batch' runs its ascent pass without a reduction over the processes, "
            "which DDP cannot do with a static graph. Set ddp_static_graph=False, sam_scope='batch'"
        )
    if method.needs_adapters and is_sharded:
        _refuse(
            f"sam_method={config.sam_method!r} needs whole adapters, and FSDP and tensor "
            "parallelism shard them. Train in one process or with DDP"
        )
    perturbed = select_parameters(trainer.model, config.sam_params)
    if sparse := sorted(sparse_parameters(trainer.model) & perturbed.keys()):
        _refuse(
            f"{', '.join(sparse)}: the gradient is sparse, and SAM needs dense ones. Build the "
            "embedding with sparse=False"
        )
    fraction, why = config.sam_ascent_fraction, why_not_deferred(trainer)
    if fraction < 1 and why is not None and not can_cut_micro_batches(trainer):
        raise ValueError(
            f"sam_ascent_fraction={fraction} is not allowed with {kind}. Its compute_loss may need "
            "whole micro-batches, so that some micro-batches of an update would skip the ascent "
            f"pass, but {why}; or override sam_select_examples, or set sam_ascent_fraction=1.0."
        )


def _validate_optimizer(trainer: Any) -> None:
    optim = trainer.args.optim
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    name = type(optimizer).__name__
    by_name = optim in _FUSED or optim.endswith("_layerwise")
    if by_name or isinstance(optimizer, LayerWiseDummyOptimizer) or name.lower() in _FUSED:
        what = f"optim={optim.value!r}" if by_name else f"The optimizer {name}"
        _refuse(
            f"{what} updates the weights inside backward, before SAM has the gradient at w + e. "
            "Choose an optim that steps after backward, such as 'adamw_torch' or 'adafactor'"
        )
    step = inspect.signature(type(optimizer).step) if optimizer is not None else None
    closure = step.parameters.get("closure") if step is not None else None
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"The optimizer {name} evaluates the loss itself, in a closure that it gets in step(), "
            "and the Trainer passes none. Choose an optim that steps with a given gradient, such "
            "as 'adamw_torch' or 'sgd'."
        )


def _validate_deepspeed(trainer: Any, method: Method) -> None:
    plugin, config = trainer.accelerator.state.deepspeed_plugin, trainer.sam_config
    if plugin.zero_stage not in (0, 1, 2):
        _refuse(
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} shards the weights behind an interface of "
            "its own, through which SAM cannot perturb them safely. Allowed: zero_stage 0, 1 or 2. "
            "To shard weights use FSDP2 (`fsdp`)"
        )
    name, reason = f"sam_method={config.sam_method!r}", None
    if method.along_momentum:
        reason = f"{name} perturbs along the optimizer's momentum, which DeepSpeed shards"
    elif method.combines:
        reason = f"{name} combines the gradients at w and at w + e, and DeepSpeed hides the latter"
    elif method.acts_on_step:
        reason = f"{name} acts at the optimizer step, which DeepSpeed runs by itself"
    elif config.sam_trigger != "always":
        reason = "sam_trigger steps with the gradient of the ascent, which DeepSpeed has not seen"
    if reason is not None:
        raise ValueError(f"{reason}. Use DDP or FSDP2 (`fsdp`), or another method.")
    options = trainer.args.gradient_checkpointing_kwargs or {}
    if trainer.args.gradient_checkpointing and options.get("use_reentrant"):
        _refuse(
            "use_reentrant=True in activation_checkpointing_kwargs does not allow the gradients of "
            "the ascent pass to be computed outside of DeepSpeed. Set use_reentrant=False"
        )


def can_cut_micro_batches(trainer: Any) -> bool:
    """Whether `compute_loss` takes a cut micro-batch: Trainer's, or by `sam_select_examples`."""
    kind = type(trainer)
    return kind.compute_loss is Trainer.compute_loss or overrides(kind, "sam_select_examples")


def why_not_deferred(trainer: Any) -> str | None:
    """Why no micro-batch of an update can skip its ascent pass, and what to change, or None."""
    kind = type(trainer)
    if trainer.args.gradient_accumulation_steps == 1:
        return "an update has one micro-batch: accumulate several"
    if trainer.sam_config.sam_scope == "micro_batch":
        return "each has its own e: set sam_scope='batch'"
    if trainer.is_fsdp_enabled or getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "gradients are reduced to shards in each of them: use DDP"
    if overrides(kind, "training_step") or overrides(kind, "_prepare_inputs"):
        return "its own training_step or _prepare_inputs would be bypassed"
    return None


def overrides(kind: type, name: str) -> bool:
    """Whether a class other than Trainer and those of this package defines a method."""
    package = f"{__package__.partition('.')[0]}."
    others = [base for base in kind.__mro__ if not issubclass(Trainer, base)]
    return any(name in vars(b) and not b.__module__.startswith(package) for b in others)

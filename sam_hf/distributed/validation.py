"""Refuse what SAM cannot train, before the first update, with the reason and what to change."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..compat import supports_fsdp2
from ..config import SAMConfig
from ..engine.parameters import select_parameters, sparse_parameters

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
    args, n_processes = trainer.args, accelerator.num_processes
    is_loaded = bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
    is_sharded = trainer.is_fsdp_enabled or is_loaded
    _validate_optimizer(trainer.optimizer, args.optim)
    if is_sagemaker_mp_enabled():
        _refuse(
            "SageMaker model parallelism runs forward and backward in a single call, without "
            "compute_loss. Train without it"
        )
    # Accelerate sets the first variable by itself once a plugin exists; the launcher sets both.
    is_launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and "FSDP_VERSION" in os.environ
    is_asked = is_launched or getattr(args, "fsdp_plugin_args", None) is not None
    if is_asked and not is_sharded and n_processes > 1:
        _refuse(
            f"FSDP was requested, but Accelerate does not shard on {accelerator.device.type}: "
            f"these {n_processes} processes would train with DDP, with all weights on each. Leave "
            "`fsdp` out, shard the model when it is loaded (`distributed_config`), train on GPUs"
        )
    _validate_common(trainer.model, config, accelerator, trainer.is_fsdp_enabled, is_sharded)
    sharding = getattr(trainer.model.config, "distributed_config", None) if is_loaded else None
    for name in ("ep_size", "pp_size"):
        if (size := getattr(sharding, name, None) or 1) > 1:
            _refuse(
                f"{name}={size} in distributed_config: SAM does not know which process holds which "
                f"weights there. Set {name}=1 (FSDP2 and tp_size are supported)"
            )
    options = args.gradient_checkpointing_kwargs or {}
    is_reentrant = args.gradient_checkpointing and options.get("use_reentrant")
    if trainer.is_deepspeed_enabled and is_reentrant:
        _refuse(
            "use_reentrant=True in activation_checkpointing_kwargs does not allow the gradients of "
            "the ascent pass to be computed outside of DeepSpeed. Set use_reentrant=False"
        )
    fraction, why = config.sam_ascent_fraction, why_not_deferred(trainer)
    if fraction < 1 and why is not None and not can_cut_micro_batches(trainer):
        raise ValueError(
            f"sam_ascent_fraction={fraction} is not allowed with {kind}. Its compute_loss may need "
            "whole micro-batches, so that some micro-batches of an update would skip the ascent "
            f"pass, but {why}; or override sam_select_examples, or set sam_ascent_fraction=1.0."
        )


def validate_loop(
    model: Any, optimizer: Any, config: Any, accelerator: Any, scaler: Any, total_steps: Any
) -> None:
    """Refuse the arguments of `SAM` with which an update would be wrong.

    Raises:
        TypeError: something other than a model, an optimizer and options is given.
        ValueError: with the reason and what to change.
    """
    if not isinstance(model, nn.Module):
        given = "parameters" if isinstance(model, Iterable) else f"a {type(model).__name__}"
        raise TypeError(f"SAM takes the model, got {given}: SAM(model, optimizer, config).")
    if not hasattr(optimizer, "param_groups"):
        kind = type(optimizer).__name__
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {kind}"
        raise TypeError(f"SAM takes an optimizer instance, got {given}: SAM(model, optimizer).")
    if not isinstance(config, SAMConfig):
        raise TypeError(f"config={config!r} is not allowed. Allowed: a SAMConfig or None.")
    if total_steps is not None and not (isinstance(total_steps, int) and total_steps >= 1):
        raise ValueError(
            f"total_steps={total_steps!r} is not allowed. Allowed: 1 or more, or None."
        )
    if accelerator is None and type(optimizer).__name__ == "AcceleratedOptimizer":
        raise ValueError("Accelerate has prepared the optimizer. Pass accelerator= to SAM too.")
    if accelerator is not None and scaler is not None:
        raise ValueError(
            "scaler= is for loops without Accelerate, which has its own. Leave it out."
        )
    if config.sam_rho == 0:
        return
    _validate_optimizer(optimizer)
    is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
    is_deepspeed = hasattr(model, "zero_optimization")
    is_replicated = isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel)
    if accelerator is not None:
        is_prepared = is_sharded or is_deepspeed or is_replicated
        if accelerator.num_processes > 1 and not is_prepared:
            raise ValueError(
                f"SAM got a model that is not prepared, in {accelerator.num_processes} processes. "
                "Pass the model and the optimizer that accelerator.prepare returned."
            )
        is_fsdp = accelerator.distributed_type == "FSDP"
        _validate_common(model, config, accelerator, is_fsdp, is_sharded)
    elif is_deepspeed:
        raise ValueError(
            "SAM supports DeepSpeed through Accelerate. Pass accelerator=, with the model and the "
            "optimizer that accelerator.prepare returned."
        )
    else:
        _validate_parameters(model, config, is_sharded)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not is_deepspeed and not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"The optimizer {type(optimizer).__name__} steps no parameter of the model "
            f"{type(model).__name__}. Pass the two that belong together."
        )
    if config.build_method().needs_auxiliary:
        raise ValueError(
            f"sam_method={config.sam_method!r} adds parameters before the optimizer is made, which "
            "only SAMTrainer does. Choose another method, or use SAMTrainer."
        )
    steps = getattr(accelerator, "gradient_accumulation_steps", 1)
    is_apart = config.sam_scope == "micro_batch" or is_sharded or steps == 1
    if config.sam_ascent_fraction < 1 and is_apart:
        raise ValueError(
            f"sam_ascent_fraction={config.sam_ascent_fraction} leaves out whole micro-batches of "
            "an update in a loop, whose closures cannot be cut. It needs an accelerator with "
            "gradient_accumulation_steps above 1, whole weights and sam_scope='batch'; or set 1.0."
        )
    usual = SAMConfig()
    for name in ("sam_start_ratio", "sam_rho_warmup_ratio", "sam_trigger", "sam_rho_schedule"):
        value = getattr(config, name)
        if total_steps is None and value not in (getattr(usual, name), "learning_rate"):
            raise ValueError(
                f"{name}={value!r} depends on the length of the run. Pass total_steps=, the number "
                "of updates, to SAM."
            )


def _validate_common(
    model: nn.Module, config: SAMConfig, accelerator: Any, is_fsdp: bool, is_sharded: bool
) -> None:
    """Refuse what Accelerate's layout does not allow."""
    n_processes = accelerator.num_processes
    if (plugin := getattr(accelerator.state, "deepspeed_plugin", None)) is not None:
        _validate_deepspeed(plugin, config)
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        _refuse(
            "Context and sequence parallelism split the inputs inside the training step, which "
            "cannot be replayed. Set cp_size=1 and sp_size=1 in `parallelism_config`"
        )
    if is_fsdp and (version := accelerator.state.fsdp_plugin.fsdp_version) != 2:
        _refuse(
            f"fsdp_version={version}: FSDP1 keeps the weights in flat buffers, which SAM does not "
            'support. Set fsdp_version=2 (`fsdp_config`: "version": 2)'
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
    _validate_parameters(model, config, is_sharded)


def _validate_parameters(model: nn.Module, config: SAMConfig, is_sharded: bool) -> None:
    if is_sharded and not supports_fsdp2():
        _refuse(f"Sharded weights need torch 2.11 or later, and this is torch {torch.__version__}")
    if config.build_method().needs_adapters and is_sharded:
        _refuse(
            f"sam_method={config.sam_method!r} needs whole adapters, and FSDP and tensor "
            "parallelism shard them. Train in one process or with DDP"
        )
    perturbed = select_parameters(model, config.sam_params)
    if sparse := sorted(sparse_parameters(model) & perturbed.keys()):
        _refuse(
            f"{', '.join(sparse)}: the gradient is sparse, and SAM needs dense ones. Build the "
            "embedding with sparse=False"
        )


def _validate_optimizer(optimizer: Any, optim: Any = "") -> None:
    """`optim` is the Trainer's option."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
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
            f"The optimizer {name} evaluates the loss itself, in a closure passed to step(), which "
            "SAM does not support. Choose one that steps with a given gradient, such as AdamW or "
            "SGD."
        )


def _validate_deepspeed(plugin: Any, config: SAMConfig) -> None:
    if plugin.zero_stage not in (0, 1, 2):
        _refuse(
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} shards the weights behind its own "
            "interface, through which SAM cannot perturb them safely. Allowed: zero_stage 0, 1 or "
            "2. To shard weights use FSDP2 (`fsdp`)"
        )
    method, name, reason = config.build_method(), f"sam_method={config.sam_method!r}", None
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

"""Differences between the supported versions of torch, transformers and huggingface_hub.

Each docstring names the lowest version, as far as tested, from which the function can be dropped.
"""

from __future__ import annotations

import os
from typing import Any

import huggingface_hub
import torch
import transformers


def precision_settings() -> list[tuple[Any, str, Any]]:
    """Attributes that control TF32: object, name, and the value that disables it.

    The global one comes first, since those of single operations may inherit from it.
    From torch 2.11: only `fp32_precision` is needed.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(cudnn, "conv"):
        return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    settings: Any = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul)
    return [(setting, "fp32_precision", "ieee") for setting in settings]


def reset_fsdp(outermost: Any) -> None:
    """Drop the weights that FSDP2 has gathered or has started to gather, after a failed pass.

    From torch 2.13: only `FSDPModule.reset_iter_state` is needed.
    """
    if hasattr(outermost, "reset_iter_state"):
        outermost.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state: Any = outermost._get_fsdp_state()
    context = state._state_ctx
    context.post_backward_final_callback_queued = False
    context.iter_forward_root = None
    for each in context.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = TrainingState.IDLE
        if (group := each._fsdp_param_group) is not None:
            group._training_state = TrainingState.IDLE  # in FORWARD it would only defer the wait
            if group._all_gather_result is not None:
                group.wait_for_unshard()
            group._post_forward_indices.clear()
            group.reshard()
    state._comm_ctx.post_forward_order.clear()


def supports_fsdp2() -> bool:
    """Whether updates of sharded weights are exact with this torch. From torch 2.11: always."""
    return _version(torch) >= (2, 11)


def saves_within_updates(args: Any) -> bool:
    """Whether a signal may make a checkpoint in the middle of an update.

    From transformers 5.5: only `args.enable_jit_checkpoint` is needed.
    """
    return bool(getattr(args, "enable_jit_checkpoint", False))


def load_first_adapter(model: Any, checkpoint: str) -> None:
    """Load the first of several adapters of a PEFT model, after the Trainer has loaded the others.

    From transformers 5.23: the Trainer loads it.
    """
    is_there = os.path.isfile(os.path.join(checkpoint, "adapter_config.json"))
    if is_there and _version(transformers) < (5, 23):
        model.load_adapter(checkpoint, model.active_adapters[0], is_trainable=True)


def upload_exclusions(*patterns: str) -> list[str]:
    """Arguments of `hf upload` that exclude the files matching one of the patterns.

    From huggingface_hub 1.0: the option is repeated. Before, the last one would replace the others.
    """
    if _version(huggingface_hub) < (1, 0):
        return ["--exclude", *patterns]
    return [word for pattern in patterns for word in ("--exclude", pattern)]


def _version(package: Any) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, package.__version__.split(".")[:2]))

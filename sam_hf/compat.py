"""What differs between the versions of torch, transformers and huggingface_hub that are supported.

Each entry says with which lowest version it can go, as far as versions were tried.
"""

from __future__ import annotations

import os
from typing import Any

import huggingface_hub
import torch
import transformers


def precision_settings() -> list[tuple[Any, str, Any]]:
    """Attributes that decide on TF32: object, name, and the value that forbids it.

    The global one first, since those of single operations may inherit from it.
    torch 2.11: `fp32_precision` alone.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(cudnn, "conv"):
        return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    settings: Any = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, matmul)
    return [(setting, "fp32_precision", "ieee") for setting in settings]


def reset_fsdp(outermost: Any) -> None:
    """Drop the weights that FSDP2 has gathered or has started to gather, after a failed pass.

    torch 2.13: `FSDPModule.reset_iter_state` alone.
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
            group._training_state = TrainingState.IDLE  # in FORWARD it would only put the wait off
            if group._all_gather_result is not None:
                group.wait_for_unshard()
            group._post_forward_indices.clear()
            group.reshard()
    state._comm_ctx.post_forward_order.clear()


def supports_fsdp2() -> bool:
    """Whether updates of sharded weights are exact with this torch. torch 2.11: always."""
    return _version(torch) >= (2, 11)


def saves_within_updates(args: Any) -> bool:
    """Whether a signal may make a checkpoint in the middle of an update.

    transformers 5.5: `args.enable_jit_checkpoint` alone.
    """
    return bool(getattr(args, "enable_jit_checkpoint", False))


def load_first_adapter(model: Any, checkpoint: str) -> None:
    """Load the first of several adapters of a PEFT model, after the Trainer has loaded the others.

    transformers 5.23: the Trainer alone.
    """
    is_there = os.path.isfile(os.path.join(checkpoint, "adapter_config.json"))
    if is_there and _version(transformers) < (5, 23):
        model.load_adapter(checkpoint, model.active_adapters[0], is_trainable=True)


def upload_exclusions(*patterns: str) -> list[str]:
    """What `hf upload` takes in order to leave out the files that match one of the patterns.

    huggingface_hub 1.0: the option is repeated. Before, the last one would replace the others.
    """
    if _version(huggingface_hub) < (1, 0):
        return ["--exclude", *patterns]
    return [word for pattern in patterns for word in ("--exclude", pattern)]


def _version(package: Any) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, package.__version__.split(".")[:2]))

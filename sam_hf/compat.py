"""What differs between the versions of torch and transformers that are supported.

Each entry says with which lowest version it can go, as far as versions were tried.
"""

from __future__ import annotations

from typing import Any

import torch


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
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def saves_within_updates(args: Any) -> bool:
    """Whether a signal may make a checkpoint in the middle of an update.

    transformers 5.5: `args.enable_jit_checkpoint` alone.
    """
    return bool(getattr(args, "enable_jit_checkpoint", False))

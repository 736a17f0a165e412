"""One of two processes that run a script under each launch file.

What `accelerate launch` makes of a file happens for real, up to the point where it would start the
processes: they are there already, so that the libraries are imported once and not for each file.

`accelerate launch --config_file ... launch_worker.py cases.json folder`
"""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import distributed_c10d
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler


def run_in_this_process(args: Any) -> None:
    """In the place of torchrun, which would start `nproc_per_node` processes with the script."""
    assert args.nproc_per_node == os.environ["WORLD_SIZE"], args.nproc_per_node
    sys.argv = [args.training_script, *args.training_script_args]
    runpy.run_path(args.training_script, run_name="__main__")


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Accelerate shards nothing on a CPU unless it takes it for a GPU."""
    original = TrainingArguments.__post_init__

    def post_init(self: TrainingArguments) -> None:
        original(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    with patch.object(TrainingArguments, "__post_init__", post_init):
        yield


@contextmanager
def with_loss_scaling() -> Iterator[None]:
    """Accelerate does not scale the loss on a CPU."""
    original = Trainer.create_accelerator_and_postprocess

    def create(self: Trainer) -> None:
        original(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    with patch.object(Trainer, "create_accelerator_and_postprocess", create):
        yield


@contextmanager
def without_compiler() -> Iterator[None]:
    """DeepSpeed would first compile its sums through shared memory, for minutes."""
    with patch("deepspeed.comm.torch.build_shm_op", lambda: None):
        yield


@contextmanager
def counting_bytes() -> Iterator[None]:
    """Each update prints what a process would send over a ring of two, without DDP's reductions."""
    sent = 0

    def counted(function: Callable[..., Any], whole: int, times: float) -> Callable[..., Any]:
        def call(*tensors: Any, **named: Any) -> Any:
            nonlocal sent
            tensor = [*tensors, *named.values()][whole]
            sent += int(tensor.nbytes * times / 2)
            return function(*tensors, **named)

        return call

    def on_step_begin(self: CallbackHandler, *args: Any) -> Any:
        nonlocal sent
        sent = 0
        return begin(self, *args)

    def on_step_end(self: CallbackHandler, *args: Any) -> Any:
        if dist.get_rank() == 0:
            print(f"{sent} bytes sent")
        return end(self, *args)

    begin, end = CallbackHandler.on_step_begin, CallbackHandler.on_step_end
    with ExitStack() as stack:
        stack.enter_context(patch.object(CallbackHandler, "on_step_begin", on_step_begin))
        stack.enter_context(patch.object(CallbackHandler, "on_step_end", on_step_end))
        # FSDP calls these by the one module, what DeepSpeed calls finds them in the other.
        for module in (dist, distributed_c10d):
            for name, whole in (("all_gather_single", 0), ("reduce_scatter_single", 1)):
                function = counted(getattr(module, name), whole, 1)
                stack.enter_context(patch.object(module, name, function))
        stack.enter_context(patch.object(dist, "all_reduce", counted(dist.all_reduce, 0, 2)))
        yield


@contextmanager
def noting_layout(found: list[str]) -> Iterator[None]:
    """Append what the first step runs: the model's wrapper, its weights and their precision."""
    original = Trainer.training_step

    def training_step(self: Trainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not found:
            plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
            zero = f" (ZeRO-{plugin.zero_stage})" if plugin is not None else ""
            dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
            parts = [type(model).__name__ + zero, f"{' and '.join(dtypes)} weights"]
            if self.accelerator.mixed_precision != "no":
                parts.append(f"{self.accelerator.mixed_precision} compute")
            parts += ["loss scaling"] if self.accelerator.scaler is not None else []
            found.append(", ".join(parts))
        return original(self, model, *args, **kwargs)

    with patch.object(Trainer, "training_step", training_step):
        yield


SHIMS = {
    shim.__name__: shim
    for shim in (as_on_a_gpu, with_loss_scaling, without_compiler, counting_bytes)
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What the script printed, and how it ended."""
    output, errors = io.StringIO(), io.StringIO()
    environment, code, layout = dict(os.environ), 0, list[str]()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(output))
        stack.enter_context(redirect_stderr(errors))
        stack.enter_context(patch("torch.distributed.run.run", run_in_this_process))
        stack.enter_context(noting_layout(layout))
        for shim in case["shims"]:
            stack.enter_context(SHIMS[shim]())
        try:
            launch_command(launch_command_parser().parse_args(case["launch"]))
        except SystemExit as end:
            code = end.code
        except Exception:
            code = 1
            errors.write(traceback.format_exc())
    os.environ.clear()
    os.environ.update(environment)
    result = {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}
    return {**result, "layout": next(iter(layout), None)}


if __name__ == "__main__":
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = os.environ["RANK"]
    results: dict[str, Any] = {}
    for name, case in cases.items():
        results[name] = run(case)
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

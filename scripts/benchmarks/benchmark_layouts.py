"""Time and communication of an update in several processes."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from benchmark_utils import WARM_UP, Clock, OneUpdate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

# Torch has several names for each.
_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "reduce")

# --------------------------------------------------------------------------- measured communication


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives and the bytes of the whole tensors that they gather or reduce.

    All are dispatched, under any backend: those of DDP's reducer, which is written in C++, and
    those that FSDP2 and DeepSpeed call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # dispatched again, with the local tensors of the DTensor
        result = func(*args, **(kwargs or {}))
        space, name = func.name().split(".")[0].split("::")
        if space in ("c10d", "_c10d_functional") and (kind := _kind(name)) is not None:
            self.calls[kind] += 1
            self.bytes[kind] += max(_nbytes(part) for part in (*args, result))
        return result

    def sent(self, processes: int) -> float:
        """The bytes that each of this many processes would send over a ring."""
        twice = self.bytes["all_reduce"]  # to all, by way of the shards
        return (sum(self.bytes.values()) + twice) * (processes - 1) / processes


def _kind(name: str) -> str | None:
    """`all_gather` for `_allgather_base_`. None for what sends nothing, such as a wait."""
    joined = name.replace("_", "")
    return next((kind for kind in _KINDS if joined.startswith(kind.replace("_", ""))), None)


def _nbytes(part: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, Tensor))


class UpdateMeter(AbstractContextManager["UpdateMeter"]):
    """What is sent within it and, on a GPU, the peak memory."""

    def __init__(self) -> None:
        self.counter = CollectiveCounter()
        self.peak_bytes: int | None = None

    def __enter__(self) -> UpdateMeter:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------------ the processes


def start_processes(argv: list[str], processes: int, on_cpu: bool) -> dict[str, Any]:
    """Run the benchmark with these arguments in this many processes. Returns its result.

    Raises:
        subprocess.CalledProcessError: a process has failed, with the reason on stderr.
    """
    script = Path(__file__).with_name("benchmark_step.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(script), *argv]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if on_cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        environment["BENCHMARK_FOLDER"] = folder
        subprocess.run(command, env=environment, check=True)
        return json.loads((Path(folder) / "result.json").read_text())


def is_started() -> bool:
    """Whether this is one of the processes."""
    return "BENCHMARK_FOLDER" in os.environ


def hand_over(result: dict[str, Any]) -> None:
    """Pass the result to the process that has started this one; rank 0 does so for all."""
    if dist.get_rank() == 0:
        (Path(os.environ["BENCHMARK_FOLDER"]) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_rows(
    names: list[str],
    options: Any,
    model: Callable[[], nn.Module],
    trainer: Callable[..., Trainer],
) -> dict[str, dict[str, Any]]:
    """Train one row after the other, then in reverse order, so that drift favours no row.

    `model` builds a model for each row, since hooks of a layout stay on the parameters; `trainer`
    builds a row's trainer from its name, the model and training arguments.
    """
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    turns = [options.rounds - options.rounds // 2, options.rounds // 2]
    for rounds, order in zip(turns, (names, names[::-1]), strict=True):
        for name in order if rounds else ():
            seconds, meter = _train(name, options, rounds, model, trainer)
            counter = meter.counter
            rows[name]["seconds"] += seconds
            rows[name]["peak_bytes"] = meter.peak_bytes
            rows[name]["calls"], rows[name]["bytes"] = counter.calls, counter.bytes
            rows[name]["sent_bytes"] = counter.sent(dist.get_world_size())
    return rows


def _train(
    name: str,
    options: Any,
    rounds: int,
    model: Callable[[], nn.Module],
    trainer: Callable[..., Trainer],
) -> tuple[list[float], UpdateMeter]:
    """The seconds of `rounds` updates, and what was measured in the update before them."""
    more: dict[str, Any] = {"ddp_timeout": 600}
    if options.device == "cpu":
        more["ddp_backend"] = "gloo"
    if options.layout.startswith("zero"):
        more["deepspeed"] = _deepspeed(options)
    built = model()
    with _without_compiler(options):
        if options.layout == "fsdp2":
            built = _sharded(built, options, more)
        trained = trainer(name, built, **more)
        clock, meter = Clock(), UpdateMeter()
        trained.add_callback(clock)
        trained.add_callback(OneUpdate(meter))
        trained.args.max_steps = WARM_UP + 1 + rounds
        trained.train()
    trained.accelerator.free_memory()
    del trained, built
    gc.collect()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return clock.seconds[WARM_UP + 1 :], meter


def _deepspeed(options: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(options.layout[-1])},
        "zero_allow_untested_optimizer": True,
    }
    return config if options.dtype == "fp32" else config | {options.dtype: {"enabled": True}}


def _without_compiler(options: Any) -> AbstractContextManager[Any]:
    """On a CPU, DeepSpeed would first compile sums through shared memory that nothing here uses."""
    if options.device == "cpu" and options.layout.startswith("zero"):
        return patch("deepspeed.comm.torch.build_shm_op", lambda: None)
    return nullcontext()


def _sharded(model: nn.Module, options: Any, more: dict[str, Any]) -> nn.Module:
    """The model as `from_pretrained` shards it: by its blocks, also on a CPU."""
    folder = Path(os.environ["BENCHMARK_FOLDER"]) / "model"
    TrainingArguments(folder, use_cpu=options.device == "cpu", **more).device  # noqa: B018 - starts
    if dist.get_rank() == 0 and not folder.exists():
        model.save_pretrained(folder)
    dist.barrier()
    blocks = {
        re.sub(r"[.]\d+(?=[.]|$)", ".*", name): "free_full_weight"
        for name, module in model.named_modules()
        if type(module).__name__ in (model._no_split_modules or ())
    }
    config = DistributedConfig(
        fsdp_size=dist.get_world_size(),
        fsdp_plan=blocks,
        fsdp_mixed_precision=options.dtype == "bf16",
    )
    return type(model).from_pretrained(folder, distributed_config=config)

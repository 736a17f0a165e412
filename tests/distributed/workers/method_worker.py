"""One process of runs of the methods: trains every case, and saves what it saw.

`torchrun --nproc_per_node 2 method_worker.py cases.json folder`
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import layout_worker
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed

# Each `train()` begins with a full garbage collection: spare it what the imports left.
gc.collect()
gc.freeze()


class Watch(TrainerCallback):
    """Keeps the weights after each update, put together, and what went through the model."""

    def __init__(self, model: Any) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.inputs: list[list[Tensor]] = []
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.inputs.append([])

    def look(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training and self.inputs:
            x = kwargs["input_ids"] if "input_ids" in kwargs else kwargs["x"]
            self.inputs[-1].append(x.clone())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights.append(layout_worker.whole(model))


def run(case: dict[str, Any], folder: Path, checkpoint: str | None = None) -> dict[str, Any]:
    """Train, from the beginning or from a checkpoint."""
    start_afresh()
    set_seed(0)
    trainer = layout_worker.build(case, folder)
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    if case.get("bucket_views"):  # the Trainer has no option for it
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "shards": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": watch.weights,
        "counts": [len(inputs) for inputs in watch.inputs],
        "inputs": watch.inputs,
        "local": layout_worker.local(trainer.model),
        "optimizer": optimizer_state(trainer.optimizer),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "is_restored": trainer.watch.is_restored,
    }


def optimizer_state(optimizer: Any) -> list[Tensor]:
    while hasattr(optimizer, "optimizer"):  # Accelerate's holds torch's
        optimizer = optimizer.optimizer
    states = optimizer.state_dict()["state"]
    numbers = [v for _, state in sorted(states.items()) for _, v in sorted(state.items())]
    return [torch.as_tensor(v.to_local() if isinstance(v, DTensor) else v).clone() for v in numbers]


def resume(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run with checkpoints, and one that goes on from the one in the middle."""
    args = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": case["resume"]}
    case = case | {"args": case["args"] | args}
    whole = run(case, folder)
    dist.barrier()
    middle = folder / f"checkpoint-{case['resume']}"
    resumed = run(case, folder, str(middle))
    dist.barrier()
    return whole | {
        "resumed": resumed,
        "files": sorted(file.name for file in middle.glob("*sam_state*")),
    }


def start_afresh() -> None:
    """Forget the layout of the run before."""
    for variable in [v for v in os.environ if "FSDP" in v]:  # what Accelerate leaves behind
        del os.environ[variable]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if dist.is_initialized():
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


if __name__ == "__main__":
    cases, root = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {}
    for name, case in cases.items():
        try:
            results[name] = (resume if "resume" in case else run)(case, root / name)
        except (ValueError, RuntimeError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, root / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

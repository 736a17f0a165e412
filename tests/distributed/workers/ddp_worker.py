"""One process of a run under DDP: trains every case that it is given, and saves what it saw.

`torchrun --nproc_per_node 2 ddp_worker.py cases.json folder`
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import torch.distributed as dist
from tiny import Classifier, arguments, examples, weights
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from sam_hf import SAMConfig, SAMTrainer
from sam_hf.distributed import ddp

torch.set_num_threads(1)
# Each `train()` begins with a full garbage collection: spare it what the imports left.
gc.collect()
gc.freeze()


class Watch(TrainerCallback):
    """Counts the reductions, and sees to it that each update begins and steps from the same w."""

    def __init__(self) -> None:
        self.reductions, self.updates = 0, 0
        self.before: dict[str, torch.Tensor] = {}
        self.graphs: list[int] = []  # compiled until the end of each update
        self.is_restored = True

    def hook(self, state, bucket):  # torch checks the annotations, and knows no strings
        self.reductions += bucket.is_last()
        return allreduce_hook(state, bucket)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        model.update = state.global_step
        if not self.updates:
            unwrapped(self.trainer.model_wrapped).register_comm_hook(None, self.hook)
        self.before = weights(model)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        self.updates += 1
        now = weights(model)
        self.is_restored &= all(torch.equal(now[n], v) for n, v in self.before.items())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


class Sometimes(Classifier):
    """Has a parameter that, after the first update, is used by one process at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        self.update = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        is_used = self.update == 0 or self.update % 2 == dist.get_rank()
        return super().forward(x * self.extra if is_used else x, labels)


class Recorder(SAMTrainer):
    """Keeps the examples of each micro-batch of each update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows: dict[int, list[dict[str, torch.Tensor]]] = {}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Called for each micro-batch. With a training_step of its own, the trainer would be one
        # whose ascent pass computes all gradients.
        self.windows.setdefault(self.state.global_step, []).append(dict(inputs))
        return super().floating_point_ops(inputs)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Without what torch.compile puts around it."""
    return getattr(model, "_orig_mod", model)


def train(case: dict[str, Any]) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    watch = Watch()
    trainer = Recorder(
        model=Sometimes() if case.get("sometimes") else Classifier(),
        args=arguments(ddp_backend="gloo", ddp_timeout=40, **case["args"]),
        train_dataset=examples(case.get("examples", 48)),
        sam_config=SAMConfig(**case["sam"]),
        callbacks=[watch],
    )
    watch.trainer = trainer
    # The Trainer has no option for it.
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = case.get("bucket_views", False)
    with patch.object(ddp, "_BUCKET_BYTES", case.get("bucket_bytes", ddp._BUCKET_BYTES)):
        trainer.train()
    return {
        "world_size": dist.get_world_size(),
        "wrapper": type(unwrapped(trainer.model_wrapped)).__name__,
        "weights": weights(trainer.model),
        "logs": trainer.state.log_history,
        "windows": list(trainer.windows.values()),
        "reductions": watch.reductions / watch.updates,
        "is_restored": watch.is_restored,
        "graphs": watch.graphs,
    }


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        try:
            results[name] = train(case)
        except (ValueError, RuntimeError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

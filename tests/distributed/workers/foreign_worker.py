"""One process of runs under DDP that add gradients of their own, or use only a part of the model.

Trains every case with `Trainer` and with `SAMTrainer`, and saves the weights after each update.

`torchrun --nproc_per_node 2 foreign_worker.py cases.json folder`
"""

from __future__ import annotations

import copy
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import torch.distributed as dist
from mlp import MLP, above, below, plain
from tiny import Spy, arguments, examples
from torch import Tensor, nn
from transformers import TrainerCallback

from sam_hf import SAMConfig

torch.set_num_threads(1)
# Each `train()` begins with a full garbage collection: spare it what the imports left.
gc.collect()
gc.freeze()
UPDATES = 4


class Spare(MLP):
    """Has a parameter that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(4, dtype=torch.float64))


class Block(nn.Module):
    """A residual branch with a norm, which training uses only where `is_used()` says so."""

    def __init__(self, used: str) -> None:
        super().__init__()
        self.norm, self.linear, self.used = nn.LayerNorm(5), nn.Linear(5, 5), used
        self.update = 0
        self.history: list[bool] = []

    def is_used(self) -> bool:
        if self.used == "by turns":  # by process 0, by process 1, by both, by none
            return (True, False, True, False)[(self.update - dist.get_rank()) % 4]
        return (random.random() if self.used == "random" else torch.rand(()).item()) < 0.5

    def forward(self, x: Tensor) -> Tensor:
        is_used = self.is_used()
        self.history.append(is_used)
        return x + self.linear(self.norm(x)) if is_used else x


class Watch(Spy):
    """Lets the processes draw other numbers, and tells the block which update it is in."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        random.seed(dist.get_rank())
        torch.manual_seed(dist.get_rank())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        model.middle.update = state.global_step


def penalise(model: nn.Module, k: int) -> None:
    """Run the backward pass of a penalty, another one in each process."""
    factor = (1 + dist.get_rank()) / k
    (factor * sum(p.square().sum() for p in model.parameters())).backward()


class Penalised:
    """Adds the gradient of a penalty before each training step."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        penalise(model, self.args.gradient_accumulation_steps)
        return super().training_step(model, inputs, num_items_in_batch)


class Halves:
    """Calls `training_step` on the two halves of the batch."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = torch.zeros(())
        for half in (slice(0, 2), slice(2, 4)):
            part = {name: value[half] for name, value in inputs.items()}
            loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss


class Penalty(TrainerCallback):
    """Adds the gradient of a penalty at an event."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.add)

    def add(self, args: Any, *_: Any, model: nn.Module, **__: Any) -> None:
        penalise(model, args.gradient_accumulation_steps)


class Wrapped:
    """Has a training step of its own, so that the ascent pass computes all gradients."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        return super().training_step(model, inputs, num_items_in_batch)


class Untouched:
    """The Trainer as it is."""


KINDS = {"penalised": Penalised, "halves": Halves, "wrapped": Wrapped}


def train(case: dict[str, Any], place: Any, **kwargs: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    block = Block(case["used"]) if "used" in case else None
    model = Spare() if case.get("has_spare") else MLP(block)
    k = case["args"].get("gradient_accumulation_steps", 1)
    watch = Watch()
    options = copy.deepcopy(case["args"])  # Accelerate writes into it
    trainer = place(KINDS.get(case.get("kind"), Untouched))(
        model=model,
        args=arguments(ddp_backend="gloo", ddp_timeout=40, max_steps=UPDATES, **options),
        train_dataset=examples(2 * 4 * k * UPDATES),
        callbacks=[watch, *map(Penalty, case.get("events", []))],
        **kwargs,
    )
    # The Trainer has no option for it.
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = case.get("bucket_views", False)
    trainer.train()
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "weights": watch.weights,
        "history": [] if block is None else block.history,
        "logs": trainer.state.log_history,
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    place = below if case.get("is_below") else above
    return {
        "plain": train(case, plain),
        "sam": train(case, place, sam_config=SAMConfig(**case["sam"])),
    }


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        try:
            results[name] = run(case)
        except (ValueError, RuntimeError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

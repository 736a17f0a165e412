"""A process that measures its half of the examples, with the weights whole or in shards.

`torchrun --nproc_per_node 2 diagnostics_worker.py cases.json folder`
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import torch.distributed as dist
from curved import batches
from tiny import Classifier, examples, sam_trainer, weights
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import set_seed

from sam_hf.diagnostics import (
    Objective,
    Plan,
    SharpnessCallback,
    measure,
    random_plane,
    scan,
    worst_sharpness,
)

PLAN = Plan(steps=3, samples=3, iterations=5, trace_samples=3, eigenvalues=2)
AXIS = [-0.5, 0.0, 0.5]
N, SIZE = 24, 4


def model() -> Classifier:
    set_seed(0)
    return Classifier()


def measured(mine: list, path: Path | None) -> dict:
    wrapped = DistributedDataParallel(model()) if dist.is_initialized() else model()
    before = weights(wrapped)
    objective = Objective(wrapped, mine)
    found = {"measures": measure(objective, PLAN), "examples": objective.example_count}
    plane = random_plane(objective, 1)
    for _ in range(2):  # the second time from the file, if there is one
        found["losses"] = scan(objective, plane, [AXIS], path=path, progress=False).losses
    found["same"] = all(torch.equal(before[k], x) for k, x in weights(wrapped).items())
    return found


def trained() -> list[dict]:
    """What the callback logs in a training, whose model DDP wraps."""
    set_seed(0)
    data = examples(N)
    trainer = sam_trainer(Classifier(), data, trainer_kwargs={"eval_dataset": data}, max_steps=2)
    trainer.add_callback(SharpnessCallback(trainer, 1, plan=PLAN, examples=N, max_share=None))
    trainer.train()
    return [
        {k: v for k, v in entry.items() if k.startswith("sharpness/")}
        for entry in trainer.state.log_history
        if "sharpness/loss" in entry
    ]


def uneven() -> dict:
    """One process has a batch less, and a smaller one."""
    rows = batches(examples(15), SIZE)
    mine = rows[:2] if dist.get_rank() == 0 else rows[2:]
    return measure(Objective(model(), mine), PLAN)


def refusals(folder: Path) -> dict[str, str]:
    said = {}
    other = folder / "other.parquet"  # the first process alone knows what is in it
    if dist.get_rank() == 0:
        other.write_bytes(b"nothing")
    dist.barrier()
    whole = Objective(model(), batches(examples(4), 4))
    line = random_plane(whole, 1)
    flat = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    sharded = model()
    fully_shard(sharded)
    for name, action in (
        ("shards", lambda: Objective(sharded, batches(examples(4), 4))),
        ("file", lambda: scan(whole, line, [AXIS], path=other, progress=False)),
        ("flat", lambda: Objective(flat, batches(examples(4), 4))),
        ("m", lambda: worst_sharpness(Objective(model(), batches(examples(4), 4)), m=4)),
    ):
        try:
            action()
        except ValueError as error:
            said[name] = str(error)
    return said


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = batches(examples(N), SIZE)[rank :: dist.get_world_size()]
    found = measured(mine, folder / "landscape.parquet")
    found["refusals"] = refusals(folder)
    found["uneven"] = uneven()
    found["logs"] = trained()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[2]))

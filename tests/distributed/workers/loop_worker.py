"""One process of a loop with `SAM`: trains every case that it is given, and saves what it saw.

`torchrun --nproc_per_node 2 loop_worker.py cases.json folder`
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from layout_worker import as_on_gpus, untrained, whole
from layouts import UPDATES, data, windows
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from sam_hf import SAM, SAMConfig

torch.set_num_threads(1)


def prepared(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Model, optimizer, and the accelerator if there is one."""
    layout, steps = case["layout"], case["args"]["gradient_accumulation_steps"]
    model = untrained(case).to(getattr(torch, case.get("dtype", "float64")))
    if layout.endswith("by hand"):
        if layout == "ddp by hand":
            model = DistributedDataParallel(model)
        else:
            for module in (model.first, model.second, model):
                fully_shard(module)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), None
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    options: dict[str, Any] = {}
    if layout == "fsdp2":
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap"
        )
        as_on_gpus()
    if layout == "deepspeed":
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": steps,
            "gradient_clipping": 0.0,  # its own default is 1
            "zero_optimization": {"stage": case["stage"]},
            "zero_allow_untested_optimizer": True,
        }
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
        # It would first compile its sums through shared memory, for minutes.
        patch("deepspeed.comm.torch.build_shm_op", lambda: None).start()
    accelerator = Accelerator(
        cpu=layout != "deepspeed", gradient_accumulation_steps=steps, **options
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, accelerator


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    steps, rank = case["args"]["gradient_accumulation_steps"], dist.get_rank()
    model, optimizer, accelerator = prepared(case)
    reductions = []

    def hook(state, bucket):  # torch checks the annotations, and knows no strings
        reductions.append(bucket.is_last())
        return allreduce_hook(state, bucket)

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, hook)
    sam = SAM(model, optimizer, SAMConfig(**case["sam"]), accelerator=accelerator)
    losses, count = [], case.get("updates", UPDATES)
    for number, window in enumerate(windows(data("classifier").rows, steps, updates=count)):
        if number == case.get("resumed_at"):
            accelerator.register_for_checkpointing(sam)
            accelerator.save_state(str(folder / "state"))
            accelerator.wait_for_everyone()
            sam = SAM(model, optimizer, SAMConfig(**case["sam"]), accelerator=accelerator)
            accelerator._custom_objects.clear()
            accelerator.register_for_checkpointing(sam)
            accelerator.load_state(str(folder / "state"))
        mine = window[rank::2]
        for i, rows in enumerate(mine):
            batch = default_collate(rows)
            if accelerator is not None:
                with accelerator.accumulate(model):
                    losses.append(sam.backward(lambda: model(**batch)["loss"]))  # noqa: B023
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            is_end = i == len(mine) - 1
            loss = sam.backward(lambda: model(**batch)["loss"] / steps, is_end)  # noqa: B023
            losses.append(loss)
            if is_end:
                optimizer.step()
                optimizer.zero_grad()
    return {
        "weights": whole(getattr(model, "module", model)),
        "reductions": sum(reductions),
        "metrics": sam.metrics(),
        "losses": torch.stack(losses),
        "type": type(model).__name__,
        "is_sharded": any(isinstance(p, DTensor) for p in model.parameters()),
    }


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """The error that the layout gives."""
    model, optimizer, accelerator = prepared(case)
    given = untrained(case) if case.get("passes_unprepared") else model
    try:
        SAM(given, optimizer, SAMConfig(**case["sam"]), accelerator=accelerator)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    PartialState(cpu=True)
    before = dict(PartialState._shared_state)
    results = {}
    for name, case in cases.items():
        PartialState._shared_state.update(before)
        results[name] = refused(case) if case.get("is_refused") else train(case, folder)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

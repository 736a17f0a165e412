"""One process of runs that are stopped, struck and resumed under DDP; saves what it saw.

`torchrun --nproc_per_node 2 recovery_worker.py cases.json folder`
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from faulty import Fault, Faulty, K, failure, forward_number
from safetensors.torch import load_file
from tiny import Classifier, Spy, arguments, examples, weights
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import dropout
from transformers import Trainer, TrainerCallback, set_seed, trainer_jit_checkpoint
from twin_runs import losses, optimizer_state

from sam_hf import SAMConfig, SAMTrainer

torch.set_num_threads(1)
# Each `train()` begins with a full garbage collection: spare it what the imports left.
gc.collect()
gc.freeze()
UPDATES, STRUCK = 6, 2  # what strikes comes in the third update


class AtOnce:
    """A timer that does not wait."""

    def __init__(self, _: float, function: Any) -> None:
        self.start = function


class At(TrainerCallback):
    """Calls a fault at an event of the update that is struck."""

    def __init__(self, event: str, fault: Fault) -> None:
        def handler(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STRUCK:
                fault(torch.zeros(()))

        setattr(self, event, handler)


def build(case: dict[str, Any], faults: dict[int, Fault] | None = None, **args: Any) -> Any:
    """The trainer of a case, each of which starts alike, and a spy as its last callback."""
    set_seed(0)
    dropout = case.get("dropout", 0.0)
    model = Classifier(dropout, torch.float32) if dropout else Faulty(faults, noise=0.0)
    dtype = torch.float32 if dropout else torch.float64
    options: dict[str, Any] = {
        "gradient_accumulation_steps": K,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "max_steps": UPDATES,
        "ddp_backend": "gloo",
        "ddp_timeout": 40,
        **args,
    }
    sam = case["sam"]
    return (Trainer if sam is None else SAMTrainer)(
        model=model,
        args=arguments(**options),
        train_dataset=examples(
            dist_size() * 4 * options["gradient_accumulation_steps"] * 5, 0, dtype
        ),
        callbacks=[Spy()],
        **({} if sam is None else {"sam_config": SAMConfig(**sam)}),
    )


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def spied(trainer: Any) -> list[dict[str, Tensor]]:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Spy)).weights


def end(trainer: Any) -> dict[str, Any]:
    """What a run ends with, bit by bit."""
    return {
        "is_wrapped": type(trainer.model_wrapped).__name__ == "DistributedDataParallel",
        "updates": trainer.state.global_step,
        "weights": weights(trainer.model),
        "optimizer": optimizer_state(trainer),
        "generator": torch.get_rng_state(),
        "losses": losses(trainer)[STRUCK + 1 - UPDATES :],
    }


def saved(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    dist.barrier()
    (checkpoint,) = folder.glob("checkpoint-*")
    return {
        "name": checkpoint.name,
        "weights": load_file(checkpoint / "model.safetensors"),
    }


# ---- The kinds of cases -------------------------------------------------------------------------


def resume(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run with a checkpoint in the middle of its epoch, and one that goes on from there."""
    args = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": STRUCK + 1}
    whole = build(case, output_dir=str(folder), **args)
    whole.train()
    expected = end(whole)
    resumed = build(case, **args)
    dist.barrier()
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STRUCK + 1}"))
    return {"expected": expected, "actual": end(resumed)}


def strike(hidden: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGTERM)
    return hidden


def strike_in_backward(hidden: Tensor) -> Tensor:
    hidden.register_hook(lambda _: signal.raise_signal(signal.SIGTERM))
    return hidden


@cache
def straight(sam: str) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The weights after each update of a run that nothing disturbs, and its end."""
    trainer = build({"sam": json.loads(sam)})
    trainer.train()
    return spied(trainer), end(trainer)


def just_in_time(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run that is told to stop, on every process at the same moment, and one that goes on."""
    trainer_jit_checkpoint.threading = SimpleNamespace(Timer=AtOnce)  # it would wait 3 s
    moment, scope = case["moment"], (case["sam"] or {}).get("sam_scope")
    faults, callbacks = {}, []
    if moment.startswith("on_"):
        callbacks = [At(moment, strike)]
    else:
        failing_pass, where = moment.split()
        number = forward_number(failing_pass, scope, K - 1, STRUCK) if scope else K * STRUCK + 1
        faults = {number: strike if where == "forward" else strike_in_backward}
    updates, expected = straight(json.dumps(case["sam"]))
    stopped = build(case, faults, output_dir=str(folder), enable_jit_checkpoint=True)
    for callback in callbacks:
        stopped.add_callback(callback)
    stopped.train()
    checkpoint = saved(folder)
    resumed = build(case)
    resumed.train(resume_from_checkpoint=str(folder / checkpoint["name"]))
    return {
        "expected": expected,
        "actual": end(resumed),
        "checkpoint": checkpoint,
        "at_checkpoint": updates[int(checkpoint["name"].split("-")[1]) - 1],
        "stopped": weights(stopped.model),
        "when_stopped": updates[stopped.state.global_step - 1],
    }


def out_of_memory(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run in which no process has the memory for 4 examples, and one that begins with 3."""
    where, scope = case["where"], case["sam"]["sam_scope"]
    number = forward_number(case["pass"], scope, case["index"])
    retried = build(
        case, {number: failure(where, torch.OutOfMemoryError)}, auto_find_batch_size=True
    )
    retried.train()
    assert not retried.model.faults
    fresh = build(case, per_device_train_batch_size=3)
    fresh.train()
    return {"actual": end(retried), "expected": end(fresh)}


def crash(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run in which the last process fails, or has the launcher interrupted, at w + e."""

    def interrupt(hidden: Tensor) -> Tensor:
        os.kill(os.getppid(), signal.SIGINT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            torch.tanh(hidden)
        raise AssertionError("no interrupt came")

    fault = interrupt if case["fault"] == "interrupt" else failure("forward")
    scope = case["sam"]["sam_scope"]
    is_last = int(os.environ["RANK"]) == dist_size() - 1
    faults = {forward_number("descent", scope, K - 1, STRUCK): fault} if is_last else {}
    args = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1}
    build(case, faults, **args).train()
    raise AssertionError("the run should have failed")


def resume_layout(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As `resume`, with shards, through the layout's own checkpoints."""

    import layout_worker  # it takes seconds, which the others need not wait for

    name = case["layout"].rstrip("2")

    def run(checkpoint: str | None) -> dict[str, Any]:
        start_afresh()
        set_seed(0)
        trainer = layout_worker.build(case, folder)
        noise = partial(dropout, p=0.3, training=True)
        trainer.model.get_submodule("first").register_forward_hook(lambda *io: noise(io[-1]))
        trainer.train(resume_from_checkpoint=checkpoint)
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # Accelerate's and DeepSpeed's own hold torch's
            optimizer = optimizer.optimizer
        states = optimizer.state_dict()["state"]
        numbers = [v for _, state in sorted(states.items()) for _, v in sorted(state.items())]
        return {
            "updates": trainer.state.global_step,
            "is_wrapped": type(trainer.model_wrapped).__name__.lower().startswith(name),
            "weights": layout_worker.local(trainer.model),
            "optimizer": [
                torch.as_tensor(v.to_local() if isinstance(v, DTensor) else v) for v in numbers
            ],
            "generator": torch.get_rng_state(),
            "losses": losses(trainer)[STRUCK - UPDATES :],
        }

    case = case | {"args": case["args"] | {"output_dir": str(folder)}}
    expected = run(None)
    dist.barrier()
    actual = run(str(folder / f"checkpoint-{STRUCK}"))
    start_afresh()
    return {"expected": expected, "actual": actual}


def start_afresh() -> None:
    """Forget the layout of the run before."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if dist.is_initialized():
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


KINDS = {f.__name__: f for f in (resume, resume_layout, just_in_time, out_of_memory, crash)}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    root = Path(sys.argv[2])
    results = {
        name: KINDS[case["kind"]](case, root / name.replace(" ", "-"))
        for name, case in cases.items()
    }
    torch.save(results, root / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

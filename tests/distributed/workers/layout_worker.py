"""One process of runs in layouts that shard: trains every case, and saves what it saw.

`torchrun --nproc_per_node 2 layout_worker.py cases.json folder`
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from layouts import UPDATES, data
from sharded_models import SeldomClassifier, ShardedClassifier, TiedLanguageModel, TinyConfig
from tiny import VOCABULARY, arguments
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from sam_hf import SAMConfig, SAMTrainer
from sam_hf.engine.parameters import canonical_name

torch.set_num_threads(1)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
MODELS = {
    "classifier": (ShardedClassifier, TinyConfig()),
    "seldom": (SeldomClassifier, TinyConfig()),
    "language": (TiedLanguageModel, TinyConfig()),
    "llama": (LlamaForCausalLM, LLAMA),
}
PLANS = {
    "classifier": {"first": "free_full_weight", "second": "keep_full_weight"},
    "language": {"middle": "free_full_weight"},
}


def local(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what this process holds of the parameters."""
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, put together from all processes."""
    return {
        canonical_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


class Watch(TrainerCallback):
    """Sees to it that each optimizer step starts from the w with which its update began."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.is_restored = True
        self.updates = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.before = local(model)

    def look(self, model: torch.nn.Module) -> None:
        now = local(model)
        self.updates += 1
        self.is_restored &= all(torch.equal(now[n], v) for n, v in self.before.items())

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        if not args.deepspeed:  # it has stepped by now
            self.look(model)


def untrained(case: dict[str, Any], model: Any = None) -> Any:
    """The model of a case, the same in every process, or what it makes of `model`."""
    if model is None:
        torch.manual_seed(0)
        model_class, config = MODELS[case.get("model", "classifier")]
        model = model_class(config).double()
    if "lora" in case:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, **case["lora"]))
    for name in case.get("unfrozen", []):
        model.get_parameter(name).requires_grad_()
    return model


class RunsTheModelItself(SAMTrainer):
    """A training step that adds the gradient of a loss of its own."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.accelerator.backward(model(**inputs)["loss"] * 0.1)
        return super().training_step(model, inputs, num_items_in_batch)


def as_on_gpus() -> None:
    """On CPUs, Accelerate turns FSDP off without a word, and refuses tensor parallelism.

    It goes by this name.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def build(case: dict[str, Any], folder: Path) -> Any:
    """The trainer of a case."""
    kind, layout = case.get("model", "classifier"), case["layout"]
    args = arguments(ddp_backend="gloo", ddp_timeout=40, **case["args"])
    args.device  # noqa: B018 - starts the processes
    if layout in ("fsdp2-load", "tp"):
        place = folder / "models" / kind
        if dist.get_rank() == 0:
            untrained({"model": kind}).save_pretrained(place)
        dist.barrier()
        if layout == "tp":
            as_on_gpus()
            config = DistributedConfig(tp_size=2, tp_plan="auto")
        else:
            sizes = {"fsdp_size": 2, "fsdp_plan": PLANS[kind]} | case["config"]
            config = DistributedConfig(**sizes)
        model = MODELS[kind][0].from_pretrained(
            place, dtype=torch.float64, distributed_config=config
        )
        model = untrained(case, model)
    else:
        model = untrained(case).to(getattr(torch, case.get("dtype", "float64")))
    if layout == "fsdp2":
        as_on_gpus()
    if layout == "deepspeed":
        # It would first compile its sums through shared memory, for minutes.
        patch("deepspeed.comm.torch.build_shm_op", lambda: None).start()
    watch = Watch()
    trainer = (RunsTheModelItself if case.get("runs_model") else SAMTrainer)(
        model=model,
        args=args,
        train_dataset=data(kind),
        eval_dataset=data(kind),
        sam_config=SAMConfig(**case["sam"]),
        callbacks=[watch],
    )
    trainer.watch = watch
    return trainer


def watch_the_step(watch: Watch) -> None:
    """See to it that DeepSpeed, which steps inside `backward`, steps from w too."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    step = getattr(DeepSpeedEngine.step, "unwatched", DeepSpeedEngine.step)

    def look_and_step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        watch.look(engine.module)
        return step(engine, *args, **kwargs)

    look_and_step.unwatched = step
    DeepSpeedEngine.step = look_and_step


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    trainer = build(case, folder)
    if case["layout"] == "deepspeed":
        watch_the_step(trainer.watch)
    trains, updates = case.get("trains", 1), case.get("updates", UPDATES)
    for number in range(trains):
        if number:
            trainer.evaluate()  # gathers weights, and keeps some so
        trainer.train()
    return {
        "world_size": dist.get_world_size(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "shards": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": whole(trainer.model),
        "logs": trainer.state.log_history,
        "is_restored": trainer.watch.is_restored and trainer.watch.updates == updates * trains,
    }


def fail(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Out of memory in every process, in the last backward pass at w + e; somebody catches it."""
    trainer = build(case, folder)
    calls, last = [], 2 * trainer.args.gradient_accumulation_steps

    def break_down(grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        calls.append(output)
        if len(calls) == last:
            output.register_hook(break_down)

    handle = trainer.model.get_submodule("second").register_forward_hook(hook)
    before = whole(trainer.model)
    try:
        trainer.train()
        raise AssertionError("nothing failed")
    except torch.OutOfMemoryError:
        pass
    handle.remove()
    return {
        "evaluated": trainer.evaluate()["eval_loss"],
        "before": before,
        "weights": whole(trainer.model),
    }


if __name__ == "__main__":
    # Each `train()` begins with a full garbage collection: spare it what the imports left.
    gc.collect()
    gc.freeze()
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {}
    for name, case in cases.items():
        try:
            results[name] = (fail if case.get("fails") else train)(case, folder)
        except (ValueError, RuntimeError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        for variable in [v for v in os.environ if "FSDP" in v]:  # what Accelerate leaves behind
            del os.environ[variable]
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

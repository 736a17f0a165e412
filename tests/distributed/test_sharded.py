"""FSDP2 and tensor parallelism: two processes give the float64 twin's weights, put together.

FSDP2 once for models that `from_pretrained(distributed_config=...)` has sharded, once by the
Trainer's `fsdp` option. On a CPU, Accelerate turns the latter off without a word, so that the
worker gives the processes the name of a GPU's; the collectives are gloo's in both.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import DISTRIBUTED, PROCESSES, by_the_paper, data, first_gradient_norm, launch
from reference_radius import START
from slow import cases_to_run, slow_unless
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import default_collate

from sam_hf.distributed.fsdp2 import _shards

sys.path.insert(0, str(DISTRIBUTED))

from layout_worker import untrained

RHO = 0.3
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"]}}


def case(layout: str, scope: str = "batch", steps: int = 1, **more: Any) -> dict[str, Any]:
    args = {"gradient_accumulation_steps": steps, **more.pop("args", {})}
    if layout == "fsdp2":
        config = FSDP["fsdp_config"] | more.pop("config", {})
        args |= {"fsdp": True, "fsdp_config": config}
    sam = {"sam_rho": RHO, "sam_scope": scope, **more.pop("sam", {})}
    return {"layout": layout, "config": {}, "sam": sam, "args": args, **more}


AUTO = {"sam": {"sam_rho": None}, "args": {"max_steps": 9}, "updates": 9}
ADAPTER = {"target_modules": ["first", "second"], "r": 2}
CASES = {
    f"{layout}-{scope}-{steps}": case(layout, scope, steps)
    for layout in ("fsdp2-load", "fsdp2")
    for scope in ("batch", "micro_batch")
    for steps in (1, 2, 3)
} | {
    "load-replicas": case("fsdp2-load", steps=2, config={"fsdp_size": 1, "dp_replicate_size": 2}),
    "load-replicas-micro_batch": case(
        "fsdp2-load", "micro_batch", 2, config={"fsdp_size": 1, "dp_replicate_size": 2}
    ),
    "load-short-window": case("fsdp2-load", steps=4),
    "short-window-micro_batch": case("fsdp2", "micro_batch", 4),
    "load-twice": case("fsdp2-load", trains=2),
    "load-tied": case("fsdp2-load", steps=2, model="language"),
    "load-asam": case("fsdp2-load", sam={"sam_method": "asam", "sam_eta": 0.2}),
    "load-some": case("fsdp2-load", "micro_batch", 2, sam={"sam_params": "second"}),
    "load-adapters": case("fsdp2-load", steps=2, lora=ADAPTER),
    "load-adapters-micro_batch": case("fsdp2-load", "micro_batch", 2, lora=ADAPTER),
    "load-adapters-and-shards": case(
        "fsdp2-load", steps=2, lora=ADAPTER, unfrozen=["base_model.model.layer_norm.weight"]
    ),
    "tied": case("fsdp2", "micro_batch", 2, model="language"),
    "asam": case("fsdp2", sam={"sam_method": "asam", "sam_eta": 0.2}),
    "auto": case("fsdp2", steps=2, **AUTO),
    "auto-micro_batch": case("fsdp2", "micro_batch", 2, **AUTO),
    "each-synchronised": case(
        "fsdp2",
        steps=2,
        args={"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    ),
    "kept-gathered": case("fsdp2", config={"reshard_after_forward": False}),
    "checkpointed": case(
        "fsdp2",
        steps=2,
        config={"activation_checkpointing": True},
        sam={"sam_params": "^first[.]weight"},
    ),
    "efficient-loading": case("fsdp2", config={"cpu_ram_efficient_loading": True}),
    "adapters": case("fsdp2", steps=2, lora=ADAPTER),
    "bf16": case("fsdp2", steps=2, dtype="float32", args={"bf16": True}),
    "tensor-parallel": case("tp", steps=2, model="llama"),
    "tensor-parallel-micro_batch": case("tp", "micro_batch", 2, model="llama"),
}
FAILING = {
    f"{layout}-{scope}-fails": case(layout, scope, 2, fails=True)
    for layout in ("fsdp2-load", "fsdp2")
    for scope in ("batch", "micro_batch")
}
REFUSED = {"own-loss": case("fsdp2", steps=2, runs_model=True)}
ALL = CASES | FAILING | REFUSED
QUICK = [
    "fsdp2-batch-1",
    "fsdp2-batch-2",
    "fsdp2-micro_batch-2",
    "fsdp2-load-batch-2",
    "fsdp2-load-micro_batch-2",
    "load-some",
    "asam",
    "tied",
    "bf16",
    "tensor-parallel",
    "fsdp2-batch-fails",
    *REFUSED,
]
quick_cases = slow_unless(name=QUICK)
# |w - twin|, where the passes compute in less than float64: Llama's norms and loss are of float32.
TOLERANCE = {"bf16": 1e-3, "tensor-parallel": 1e-8, "tensor-parallel-micro_batch": 1e-8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = cases_to_run(ALL, QUICK)
    uses = ["peft"] if any("lora" in case for case in cases.values()) else []
    return launch("layout_worker.py", cases, tmp_path_factory.mktemp("fsdp2"), uses=uses)


@quick_cases
@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_the_twin_on_all_examples(runs, name):
    expected = by_the_paper(CASES[name], untrained(CASES[name]), is_shared=True)
    for seen in runs:
        assert "error" not in seen[name], seen[name]
        assert seen[name]["world_size"] == PROCESSES
        if name.startswith("tensor"):
            assert seen[name]["wrapper"] == "LlamaForCausalLM"
        elif "adapters" not in name:
            assert seen[name]["wrapper"].startswith("FSDP")
        assert seen[name]["shards"] > 0
        assert seen[name]["is_restored"]
        stored = torch.float32 if name == "bf16" else torch.float64
        assert all(w.dtype is stored for w in seen[name]["weights"].values())
        actual = {n: w.double() for n, w in seen[name]["weights"].items()}
        rtol, atol = (0, TOLERANCE[name]) if name in TOLERANCE else (1e-10, 1e-12)
        assert_close(actual, expected, rtol=rtol, atol=atol)


@quick_cases
@pytest.mark.parametrize("name", CASES)
def test_the_processes_log_the_same_and_the_second_pass_saw_other_weights(runs, name):
    first, second = (seen[name] for seen in runs)
    assert abs(first["logs"][0]["sam_sharpness"]) > 1e-5
    assert first["logs"][:-1] == second["logs"][:-1]
    if CASES[name]["sam"].get("sam_method") != "asam":
        rel = 1e-6 if name in TOLERANCE else 1e-12
        rho = START if CASES[name]["sam"]["sam_rho"] is None else RHO
        assert first["logs"][0]["sam_perturbation_norm"] == pytest.approx(rho, rel=rel)


@quick_cases
@pytest.mark.parametrize("name", [n for n in CASES if "batch-1" in n or n == "load-adapters"])
def test_the_gradient_norm_in_the_log_is_that_of_all_processes_and_shards(runs, name):
    expected = first_gradient_norm(CASES[name], untrained(CASES[name]))
    for seen in runs:
        logged = seen[name]["logs"][0]["sam_ascent_grad_norm"]
        assert logged == pytest.approx(expected, rel=1e-12)


@quick_cases
@pytest.mark.parametrize("name", FAILING)
def test_after_a_failure_at_w_plus_e_nobody_sees_it_also_not_in_weights_that_were_gathered(
    runs, name
):
    model, rows = untrained(FAILING[name]), data("classifier").rows
    with torch.no_grad():
        expected = float(model(**default_collate(rows))["loss"])
    for seen in runs:
        assert "error" not in seen[name], seen[name]
        for n, w in seen[name]["before"].items():
            assert torch.equal(seen[name]["weights"][n], w)
        assert seen[name]["evaluated"] == pytest.approx(expected, rel=1e-6)


def test_a_loss_outside_of_compute_loss_is_refused_where_fsdp2_hides_its_gradient(runs):
    for seen in runs:
        assert seen["own-loss"]["error"].startswith("RuntimeError: The model is run in training_st")
        assert "set gradient_accumulation_steps=1 or sam_rho=0" in seen["own-loss"]["error"]


def test_a_weight_that_fsdp2_and_tensor_parallelism_cut_in_one_dimension_is_cut_in_four():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16))
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["fsdp"])
        for p in model.parameters():
            assert _shards(p) * p.to_local().numel() == p.numel(), p.placements
        assert _shards(model[0].weight) == 4
    finally:
        dist.destroy_process_group()

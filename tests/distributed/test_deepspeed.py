"""DeepSpeed's ZeRO 0, 1 and 2: two processes give the weights of the float64 twin, in float32.

DeepSpeed stores fp32 weights at the widest: the distance from the twin is rounding.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from layouts import DISTRIBUTED, PROCESSES, by_the_paper, first_gradient_norm, launch
from slow import cases_to_run, slow_unless
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("deepspeed")
sys.path.insert(0, str(DISTRIBUTED))

from layout_worker import untrained

from sam_hf.distributed.deepspeed import DeepSpeedLayout

RHO = 0.3


def case(stage: int, scope: str = "batch", steps: int = 1, **more: Any) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        **more.pop("config", {}),
    }
    args = {"gradient_accumulation_steps": steps, "deepspeed": config, **more.pop("args", {})}
    sam = {"sam_rho": RHO, "sam_scope": scope, **more.pop("sam", {})}
    return {"layout": "deepspeed", "dtype": "float32", "sam": sam, "args": args, **more}


CASES = {
    f"{stage}-{scope}-{steps}": case(stage, scope, steps)
    for stage in (0, 1, 2)
    for scope in ("batch", "micro_batch")
    for steps in (1, 2, 3)
} | {
    "asam": case(2, steps=2, sam={"sam_method": "asam", "sam_eta": 0.2}),
    "clipped": case(2, steps=2, args={"max_grad_norm": 0.3}),
    "adapters": case(2, steps=2, lora={"target_modules": ["first", "second"], "r": 2}),
    "overlapped": case(2, "micro_batch", 2, zero={"overlap_comm": True}),
    "short-window": case(1, steps=4),
    "short-window-micro_batch": case(2, "micro_batch", 4),
    "seldom": case(1, "micro_batch", model="seldom", sam={"sam_params": "extra"}),
    "seldom-batch": case(1, model="seldom", sam={"sam_params": "extra"}),
    "some": case(1, "micro_batch", 2, sam={"sam_params": "second"}),
}
REFUSED = {"zero-3": case(3)}


def half(name: str, **options: Any) -> dict[str, Any]:
    return {"config": {name: {"enabled": True, **options}}, "args": {name: True}}


HALF = {
    "bf16": case(2, steps=2, **half("bf16")),
    "fp16": case(1, "micro_batch", 2, **half("fp16", initial_scale_power=4)),
    "fp16-batch": case(2, **half("fp16", initial_scale_power=4)),
    "autocast": case(2, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
}
# A loss scale that no gradient of fp16 survives, neither that of the ascent nor that of the descent
OVERFLOW = {"overflow": case(2, **half("fp16", initial_scale_power=30))}
ALL = CASES | HALF | OVERFLOW | REFUSED
QUICK = [
    "0-batch-1",
    "1-batch-2",
    "2-batch-3",
    "1-micro_batch-1",
    "2-micro_batch-2",
    "clipped",
    "bf16",
    *OVERFLOW,
    *REFUSED,
]
quick_cases = slow_unless(name=QUICK)
NEEDS_FP16 = ("fp16", "fp16-batch", "overflow")


@pytest.fixture(autouse=True)
def _only_where_the_processor_has_fp16(request: pytest.FixtureRequest) -> None:
    from deepspeed.accelerator import get_accelerator

    params = getattr(request.node, "callspec", SimpleNamespace(params={})).params
    asks = params.get("name") in NEEDS_FP16 or "overflow" in request.node.name
    if asks and not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed refuses fp16 on this processor")


# |w - twin|; 1e-6 where nothing is said
TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp16-batch": 1e-3, "autocast": 1e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = cases_to_run(ALL, QUICK)
    uses = ["peft"] if any("lora" in case for case in cases.values()) else []
    return launch("layout_worker.py", cases, tmp_path_factory.mktemp("deepspeed"), uses=uses)


@quick_cases
@pytest.mark.parametrize("name", CASES | HALF)
def test_the_weights_are_those_of_the_twin(runs, name):
    options = (CASES | HALF)[name]
    expected = by_the_paper(options, untrained(options), is_shared=False)
    for seen in runs:
        assert "error" not in seen[name], seen[name]
        assert seen[name]["world_size"] == PROCESSES
        assert seen[name]["wrapper"] == "DeepSpeedEngine"
        assert seen[name]["is_restored"]
        actual = {n: w.double() for n, w in seen[name]["weights"].items()}
        assert_close(actual, expected, rtol=0, atol=TOLERANCE.get(name, 1e-6))


def test_an_overflow_skips_the_step_and_leaves_w_in_place(runs):
    before = {n: p.half() for n, p in untrained(OVERFLOW["overflow"]).named_parameters()}
    for seen in runs:
        after = seen["overflow"]
        assert "error" not in after and after["is_restored"]
        assert all(torch.equal(after["weights"][n], w) for n, w in before.items())
        assert after["logs"][0]["sam_perturbation_norm"] == 0.0  # inf · 0 is not


@quick_cases
@pytest.mark.parametrize("name", CASES | HALF)
def test_the_processes_agree_to_the_last_bit_and_the_second_pass_saw_other_weights(runs, name):
    first, second = (seen[name] for seen in runs)
    assert all(torch.equal(second["weights"][n], w) for n, w in first["weights"].items())
    assert abs(first["logs"][0]["sam_sharpness"]) > 1e-3
    assert first["logs"][:-1] == second["logs"][:-1]


def test_a_stage_that_shards_the_weights_is_refused_with_the_way_out(runs):
    for seen in runs:
        assert "ValueError: DeepSpeed's ZeRO stage 3" in seen["zero-3"]["error"]
        assert "FSDP2" in seen["zero-3"]["error"]


@quick_cases
@pytest.mark.parametrize("name", ["0-batch-1", "1-batch-2", "2-batch-3", "fp16-batch"])
def test_the_gradient_norm_in_the_log_is_that_of_all_processes(runs, name):
    options = (CASES | HALF)[name]
    expected = first_gradient_norm(options, untrained(options))
    for seen in runs:
        logged = seen[name]["logs"][0]["sam_ascent_grad_norm"]
        assert logged == pytest.approx(expected, rel=1e-2 if name in HALF else 1e-6)


def test_both_passes_compute_in_the_type_that_deepspeed_casts_to():
    """The engine casts in its `forward`, which the ascent pass bypasses."""
    seen = []

    class Module(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(super().forward(x).dtype)
            return super().forward(x)

    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.optimizer = Module(2, 2), None

        def forward(self, x: Tensor) -> None:
            raise AssertionError("the engine would take the gradients")

        def torch_autocast_dtype(self) -> torch.dtype:
            return torch.bfloat16

        def torch_autocast_enabled(self) -> bool:
            return True

    engine, accelerator = Engine(), Accelerator()
    accelerator.deepspeed_engine_wrapped = SimpleNamespace(engine=engine)
    layout = DeepSpeedLayout(list(engine.parameters()), engine.module, engine, accelerator)
    with layout.ascent(scope_is_micro_batch=True):
        accelerator.backward(engine(torch.ones(1, 2)).float().sum())
    assert seen == [torch.bfloat16]
    assert all(p.grad is not None for p in engine.parameters())

"""Loops with `SAM` on two processes: the weights are those of the float64 twin in one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from layouts import DISTRIBUTED, UPDATES, by_the_paper, launch
from slow import cases_to_run, slow_unless
from torch.testing import assert_close

sys.path.insert(0, str(DISTRIBUTED))

from layout_worker import untrained

RHO = 0.3


def case(layout: str, scope: str = "batch", steps: int = 1, **more: Any) -> dict[str, Any]:
    sam = {"sam_rho": RHO, "sam_scope": scope, **more.pop("sam", {})}
    return {
        "layout": layout,
        "sam": sam,
        "args": {"gradient_accumulation_steps": steps},
        **more,
    }


SHARDED = ("fsdp2", "fsdp2 by hand")
LAYOUTS = ("ddp", "ddp by hand", *SHARDED)
SCOPES, STEPS = ("batch", "micro_batch"), (1, 3)
CASES = {
    f"{layout}-{scope}-{steps}": case(layout, scope, steps)
    for layout in LAYOUTS
    for scope in SCOPES
    for steps in STEPS
}
DEEPSPEED = {
    f"deepspeed-{scope}-{steps}": case("deepspeed", scope, steps, stage=2, dtype="float32")
    for scope in SCOPES
    for steps in STEPS
}
DEEPSPEED["deepspeed-auto"] = case(
    "deepspeed", steps=3, stage=2, dtype="float32", sam={"sam_rho": None}, updates=9
)
ASAM = {"sam_method": "asam", "sam_eta": 0.2}
VASSO = {"sam_method": "vasso"}
OTHERS = {
    "asam": case("ddp", steps=3, sam=ASAM),
    "asam-sharded": case("fsdp2", steps=3, sam=ASAM),
    "some": case("ddp", steps=3, sam={"sam_params": "second"}),
    **{
        f"auto-{layout}-{scope}": case(layout, scope, 3, sam={"sam_rho": None}, updates=9)
        for layout in ("ddp", "fsdp2")
        for scope in SCOPES
    },
    "auto-resumed": case("ddp", "micro_batch", sam={"sam_rho": None}, updates=9, resumed_at=6),
    "auto-not-resumed": case("ddp", "micro_batch", sam={"sam_rho": None}, updates=9),
    "resumed": case("ddp", "micro_batch", sam=VASSO, resumed_at=2),
    "not-resumed": case("ddp", "micro_batch", sam=VASSO),
}
AGAINST_THE_TWIN = [name for name in OTHERS if "resumed" not in name]
REFUSED = {
    "gsam": case("deepspeed", stage=1, dtype="float32", sam={"sam_method": "gsam"}),
    "unprepared": case("ddp", passes_unprepared=True),
}
QUICK = [name for name in (*CASES, *DEEPSPEED) if name.endswith("3")] + ["deepspeed-auto", *OTHERS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, Any]]:
    cases = CASES | DEEPSPEED | OTHERS
    some = {name: cases[name] for name in cases_to_run(cases, QUICK)}
    refused = {name: {**c, "is_refused": True} for name, c in REFUSED.items()}
    pytest.importorskip("deepspeed")
    return launch("loop_worker.py", some | refused, tmp_path_factory.mktemp("loops"))


@slow_unless(name=QUICK)
@pytest.mark.parametrize("name", [*CASES, *DEEPSPEED, *AGAINST_THE_TWIN])
def test_the_weights_are_those_of_the_paper(name, runs):
    options = (CASES | DEEPSPEED | OTHERS)[name]
    is_shared = options["layout"] in SHARDED
    kind = "FSDP" if is_shared else "DeepSpeedEngine" if name in DEEPSPEED else "Distributed"
    expected = by_the_paper(options, untrained(options), is_shared)
    tolerance = 1e-6 if options["layout"] == "deepspeed" else 1e-10
    for run in runs:
        assert run[name]["type"].startswith(kind) and run[name]["is_sharded"] == is_shared
        actual = {n: w.double() for n, w in run[name]["weights"].items()}
        assert_close(actual, expected, rtol=0, atol=tolerance)


@slow_unless(name=QUICK)
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("ddp")])
def test_scope_micro_batch_reduces_once_per_update_and_scope_batch_twice(name, runs):
    options = CASES[name]
    passes = 1 if options["sam"]["sam_scope"] == "micro_batch" else 2
    for run in runs:
        assert run[name]["reductions"] == passes * UPDATES


def test_every_process_reads_the_same_metrics(runs):
    first, second = (run["ddp-batch-3"]["metrics"] for run in runs)
    assert first == second and first["sam_perturbation_norm"] == pytest.approx(RHO)


@pytest.mark.parametrize("prefix", ["", "auto-"])
def test_a_state_of_each_process_is_saved_and_loaded_to_the_bit(runs, prefix):
    for run in runs:
        for name, w in run[f"{prefix}not-resumed"]["weights"].items():
            assert torch.equal(run[f"{prefix}resumed"]["weights"][name], w)


def test_what_a_layout_cannot_do_is_refused_in_one_line(runs):
    for run in runs:
        assert "combines the gradients at w and at w + e" in run["gsam"]["error"]
        assert "not prepared, in 2 processes" in run["unprepared"]["error"]

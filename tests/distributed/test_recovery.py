"""Two processes under DDP that are stopped, run out of memory or fail, and what they leave."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from layouts import launch, start
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.slow
STRUCK, UPDATES = 2, 6
PLAIN = None
SCOPES: dict[str, dict[str, Any]] = {
    scope: {"sam_rho": 0.3, "sam_scope": scope} for scope in ("batch", "micro_batch")
}

RESUMED = {
    f"{name} resumed": {"kind": "resume", "sam": sam, "dropout": 0.3}
    for name, sam in {"plain": PLAIN, "rho 0": {"sam_rho": 0.0}, **SCOPES}.items()
}
# The Trainer itself refuses to save what is needed to resume a model sharded at load time.
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {
        "layout": "fsdp2",
        "args": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"]}},
    }
}
if find_spec("deepspeed") is not None:
    LAYOUTS |= {
        f"ZeRO {stage}": {
            "layout": "deepspeed",
            "dtype": "float32",
            "args": {
                "deepspeed": {
                    "train_micro_batch_size_per_gpu": "auto",
                    "gradient_accumulation_steps": "auto",
                    "gradient_clipping": "auto",
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                }
            },
        }
        for stage in (1, 2)
    }
SHARDED = {
    f"{kind} {name} resumed": {
        **layout,
        "kind": "resume_layout",
        "config": {},
        "sam": sam,
        "args": {
            "gradient_accumulation_steps": 2,
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
            "train_sampling_strategy": "random",
            "max_steps": UPDATES,
            "save_strategy": "steps",
            "save_steps": STRUCK,  # three in an epoch
            **layout["args"],
        },
    }
    for kind, layout in LAYOUTS.items()
    for name, sam in {"rho 0": {"sam_rho": 0.0}, **SCOPES}.items()
}
MOMENTS = ["descent forward", "descent backward", "on_pre_optimizer_step"]
STOPPED = {
    f"{name} {moment}": {"kind": "just_in_time", "sam": sam, "moment": moment}
    for name, sam in SCOPES.items()
    for moment in MOMENTS
}
WITHOUT_MEMORY = {
    f"{name} out of memory in {where} {index}": {
        "kind": "out_of_memory",
        "sam": sam,
        "pass": "descent",
        "where": where,
        "index": index,
    }
    for name, sam in SCOPES.items()
    for where, index in (("forward", 0), ("backward", 2))
}
ENDING_WELL = RESUMED | STOPPED | WITHOUT_MEMORY | SHARDED


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process saw of each case that should go well: all of them in one launch."""
    return launch("recovery_worker.py", ENDING_WELL, tmp_path_factory.mktemp("recovery"))


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ENDING_WELL)
def test_a_run_ends_as_one_that_was_never_stopped_to_the_last_bit(runs, name):
    for seen in runs:
        assert seen[name]["actual"]["updates"] == UPDATES
        assert seen[name]["actual"]["is_wrapped"]
        assert_same_bits(seen[name]["actual"], seen[name]["expected"])


@pytest.mark.parametrize("name", RESUMED | STOPPED | WITHOUT_MEMORY)
def test_the_processes_end_alike(runs, name):
    first, second = (seen[name]["actual"]["weights"] for seen in runs)
    assert_same_bits(first, second)


def test_without_perturbation_a_resumed_run_is_the_plain_trainers(runs):
    for seen in runs:
        assert_same_bits(seen["rho 0 resumed"], seen["plain resumed"])


@pytest.mark.parametrize("kind", ["", *(f"{kind} " for kind in LAYOUTS)], ids=["DDP", *LAYOUTS])
@pytest.mark.parametrize("scope", SCOPES)
def test_with_perturbation_a_resumed_run_is_another(runs, kind, scope):
    off, on = (runs[0][f"{kind}{name} resumed"]["actual"]["weights"] for name in ("rho 0", scope))
    assert not torch.equal(on["first.weight"], off["first.weight"])


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_to_all_processes_in_any_moment_saves_w_and_stops_at_w(runs, name):
    for seen in runs:
        checkpoint = seen[name]["checkpoint"]
        is_late = name.endswith("on_pre_optimizer_step")  # the Trainer's callback has just looked
        assert checkpoint["name"] == f"checkpoint-{STRUCK + is_late}"
        assert_same_bits(checkpoint["weights"], seen[name]["at_checkpoint"])
        assert_same_bits(seen[name]["stopped"], seen[name]["when_stopped"])


# ---- Failures that end the run -----------------------------------------------------------------

FAULTS = {
    "batch-error": ("batch", "error"),
    "micro_batch-error": ("micro_batch", "error"),
    "batch-interrupt": ("batch", "interrupt"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_process_that_fails_at_w_plus_e_ends_the_run_and_the_last_checkpoint_holds_w(
    runs, name, tmp_path
):
    scope, fault = FAULTS[name]
    cases = {"run": {"kind": "crash", "sam": SCOPES[scope], "fault": fault}}
    done = start("recovery_worker.py", cases, tmp_path)
    assert done.returncode != 0
    message = {"error": "out of memory. Tried to allocate", "interrupt": "KeyboardInterrupt"}
    assert message[fault] in done.stderr
    assert not list(tmp_path.glob("rank*.pt"))
    last = tmp_path / "run" / f"checkpoint-{STRUCK}"
    assert last == max((tmp_path / "run").iterdir())
    expected = runs[0][f"{scope} {MOMENTS[0]}"]["at_checkpoint"]
    assert_same_bits(load_file(last / "model.safetensors"), expected)
    assert torch.load(last / "optimizer.pt")["state"]

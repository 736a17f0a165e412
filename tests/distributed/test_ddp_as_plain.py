"""DDP: at a tiny rho, runs with gradients or graphs that differ between processes are plain ones.

The `backward` of a penalty leaves another gradient in `.grad` of each process, which DDP averages
with the next gradient that it reduces. A part of the model that one process uses and the other does
not has a gradient in one of them alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import launch
from mlp import TINY_RHO
from torch.testing import assert_close

pytestmark = pytest.mark.slow

GSAM = {"sam_method": "gsam", "sam_method_args": {"alpha": 0.4}}
LOOKSAM = {"sam_method": "looksam", "sam_method_args": {"k": 2, "alpha": 0.0}}
# Perturbs the first update, and no other.
TRIGGER = {
    "sam_trigger": "gradient_norm",
    "sam_trigger_start": 100.0,
    "sam_trigger_end": 100.0,
}
UNUSED = {"ddp_find_unused_parameters": True}
EACH = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def penalised(sam: dict[str, Any], k: int, **more: Any) -> dict[str, Any]:
    args = {"gradient_accumulation_steps": k, **more.pop("args", {})}
    return {"kind": "penalised", "sam": {"sam_rho": TINY_RHO, **sam}, "args": args, **more}


PENALISED = {
    f"{name}-{k}{'-views' if views else ''}{'-below' if is_below else ''}": penalised(
        sam, k, bucket_views=views, is_below=is_below
    )
    for name, sam in {
        "batch": {},
        "micro_batch": {"sam_scope": "micro_batch"},
        "some": {"sam_params": "first"},
        "interval": {"sam_interval": 2},
    }.items()
    for k in (1, 3)
    for views in (False, True)
    for is_below in (False, True)
    if name in ("batch", "micro_batch") or not (views or is_below)
} | {
    f"{scope}-each{'-views' if views else ''}": penalised(
        {"sam_scope": scope}, 3, args=EACH, bucket_views=views
    )
    for scope in ("batch", "micro_batch")
    for views in (False, True)
}
for k in (1, 3):
    momentum = {"optim_args": "momentum=0.9"}
    PENALISED[f"msam-{k}"] = penalised({"sam_method": "msam"}, k, args=momentum)
OTHERS = {
    f"{scope}-{name}-{k}": {
        "sam": {"sam_rho": TINY_RHO, "sam_scope": scope},
        "args": {"gradient_accumulation_steps": k},
        **how,
    }
    for scope in ("batch", "micro_batch")
    for name, how in {
        "halves": {"kind": "halves"},
        "on_step_begin": {"events": ["on_step_begin"]},
        "on_substep_end": {"events": ["on_substep_end"]},
    }.items()
    for k in (1, 3)
}
PARTLY_USED = {
    f"{name}-{used}-{k}": {
        "used": used,
        "sam": {"sam_rho": TINY_RHO, "sam_params": "norms", **sam},
        "args": {"gradient_accumulation_steps": k, **UNUSED},
    }
    for name, sam in {
        "batch": {},
        "micro_batch": {"sam_scope": "micro_batch"},
        "asam": {"sam_method": "asam"},
        "gsam": GSAM,
        "trigger": TRIGGER,
    }.items()
    for used in ("by turns", "random", "torch")
    for k in (1, 3)
}
# A process that perturbs nothing has the whole gradient after its first pass. Where the others
# reduce in their second pass, it must run one too, or they wait for it.
PARTLY_USED |= {
    f"micro_batch-wrapped-{k}{'-each' if each else ''}": {
        "kind": "wrapped",
        "used": "random",
        "sam": {"sam_rho": TINY_RHO, "sam_params": "norms", "sam_scope": "micro_batch"},
        "args": {"gradient_accumulation_steps": k, **UNUSED, **each},
    }
    for k, each in ((1, {}), (3, {}), (3, EACH))
}
CASES = PENALISED | OTHERS | PARTLY_USED
REFUSED = {
    f"{name}-{k}": penalised(sam, k)
    for name, sam in {"gsam": GSAM, "looksam": LOOKSAM, "trigger": TRIGGER}.items()
    for k in (1, 3)
} | {f"unused-{k}": penalised({}, k, args=UNUSED, has_spare=True) for k in (1, 3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process saw of each case: all of them in one launch."""
    return launch("foreign_worker.py", CASES | REFUSED, tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize("name", CASES)
def test_the_weights_after_each_update_are_those_of_plain_training(runs, name):
    for seen in runs:
        assert "error" not in seen[name], seen[name]
        ours, expected = seen[name]["sam"], seen[name]["plain"]
        assert ours["wrapper"] == expected["wrapper"] == "DistributedDataParallel"
        assert len(ours["weights"]) == len(expected["weights"]) == 4
        assert_close(ours["weights"], expected["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_processes_agree_to_the_last_bit(runs, name):
    first, second = (seen[name]["sam"]["weights"] for seen in runs)
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(ours[n], w) for n, w in theirs.items())


@pytest.mark.parametrize("name", PARTLY_USED)
def test_the_processes_do_not_use_the_same_parts(runs, name):
    ours, theirs = (seen[name]["plain"]["history"] for seen in runs)
    assert ours != theirs


@pytest.mark.parametrize("name", REFUSED)
def test_gradients_that_cannot_be_averaged_apart_are_refused_with_the_way_out(runs, name):
    for seen in runs:
        error = seen[name]["error"]
        assert error.startswith("RuntimeError: ") and "compute_loss" in error, error
        assert "sam_rho=0" in error

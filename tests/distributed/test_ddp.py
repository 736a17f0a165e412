"""DDP: two processes give the weights of the float64 twin, which knows nothing of processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmark_layouts import CollectiveCounter
from layouts import PROCESSES, by_the_paper, launch
from slow import cases_to_run, slow_unless
from tiny import Classifier
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore
from twin_runs import by_the_twin, means

from sam_hf.distributed.ddp import all_reduce_

RHO = 0.3


def case(scope: str, steps: int, **args: Any) -> dict[str, Any]:
    return {
        "sam": {"sam_rho": RHO, "sam_scope": scope},
        "args": {"gradient_accumulation_steps": steps, **args},
    }


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
CASES = {
    **{f"batch-{steps}": case("batch", steps) for steps in (1, 2, 3)},
    **{f"micro_batch-{steps}": case("micro_batch", steps) for steps in (1, 2, 3)},
    "batch-2-unused": case("batch", 2, ddp_find_unused_parameters=True),
    "micro_batch-2-unused": case("micro_batch", 2, ddp_find_unused_parameters=True),
    "batch-1-static": case("batch", 1, ddp_static_graph=True),
    "batch-2-compiled": case("batch", 2, **COMPILED),
    "micro_batch-1-compiled": case("micro_batch", 1, **COMPILED),
    **{
        f"{scope}-2-auto": {
            **case(scope, 2, max_steps=9),
            "sam": {"sam_rho": None, "sam_scope": scope},
            "updates": 9,
        }
        for scope in ("batch", "micro_batch")
    },
}
EACH = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
# Gradients that are kept for later are views of what DDP writes in every backward pass.
VIEWS = {
    f"{scope}-{steps}-views": {**case(scope, steps, **EACH), "bucket_views": True}
    for scope in ("batch", "micro_batch")
    for steps in (2, 3)
}
# SAM reduces the gradients of an ascent over some parameters itself, here in many buckets.
SOME = {
    f"batch-{steps}-some": {
        "sam": {"sam_rho": RHO, "sam_scope": "batch", "sam_params": "norm|second"},
        "args": {"gradient_accumulation_steps": steps},
        "bucket_bytes": 64,
    }
    for steps in (1, 2)
}
REDUCED = CASES | VIEWS | SOME
# The number of examples, options, and how many examples come in each micro-batch of a process.
ENDS = {
    "filled": (18, {}, [[4, 4], [4], [4, 4]], [[4, 4], [4], [4, 4]]),
    "short": (
        22,
        {"accelerator_config": {"even_batches": False}},
        [[4, 4], [4], [4, 4]],
        [[4, 4], [2], [4, 4]],
    ),
    "dropped": (22, {"dataloader_drop_last": True}, [[4, 4]] * 3, [[4, 4]] * 3),
}
UNEVEN = {
    f"{scope}-{name}": {**case(scope, 2, **args), "examples": n}
    for scope in ("batch", "micro_batch")
    for name, (n, args, *_) in ENDS.items()
}
SOMETIMES = {
    f"{scope}-sometimes": {
        "sam": {"sam_rho": RHO, "sam_scope": scope, "sam_params": "extra"},
        "args": {"ddp_find_unused_parameters": True, "max_steps": 4},
        "sometimes": True,
    }
    for scope in ("batch", "micro_batch")
}
SOMETIMES["micro_batch-each-sometimes"] = {
    **SOMETIMES["micro_batch-sometimes"],
    "args": {
        **SOMETIMES["micro_batch-sometimes"]["args"],
        "gradient_accumulation_steps": 2,
        **EACH,
    },
}
REFUSED = {"micro_batch-1-static": case("micro_batch", 1, ddp_static_graph=True)}
ALL = REDUCED | UNEVEN | SOMETIMES | REFUSED
QUICK = [
    "batch-1",
    "batch-2",
    "micro_batch-3",
    "micro_batch-2-unused",
    "micro_batch-2-views",
    "batch-2-some",
    "batch-short",
    "micro_batch-filled",
    "batch-sometimes",
    *REFUSED,
]
quick_cases = slow_unless(name=QUICK)


def untrained() -> Classifier:
    """The model, the same in every process."""
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process saw of each case: all of them in one launch."""
    return launch("ddp_worker.py", cases_to_run(ALL, QUICK), tmp_path_factory.mktemp("ddp"))


@quick_cases
@pytest.mark.parametrize("name", REDUCED)
def test_the_weights_are_those_of_the_twin_on_all_examples(runs, name):
    expected = by_the_paper(REDUCED[name], untrained(), is_shared=False)
    for seen in runs:
        assert "error" not in seen[name], seen[name]
        assert seen[name]["world_size"] == PROCESSES
        assert seen[name]["wrapper"] == "DistributedDataParallel"
        assert seen[name]["is_restored"]
        assert_close(seen[name]["weights"], expected, rtol=1e-10, atol=1e-12)


@quick_cases
@pytest.mark.parametrize("name", REDUCED | UNEVEN)
def test_the_processes_agree_to_the_last_bit_and_log_the_same(runs, name):
    first, *others = (seen[name] for seen in runs)
    assert first["logs"][0]["sam_sharpness"] > 1e-3  # the second pass saw other weights
    for other in others:
        assert all(torch.equal(other["weights"][n], v) for n, v in first["weights"].items())
        for entry, theirs in zip(first["logs"][:-1], other["logs"][:-1], strict=True):
            assert entry == theirs


@quick_cases
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_reduced_once_in_each_pass_that_is_synchronised(runs, name):
    passes = 2 if name.startswith("batch") else 1
    assert {seen[name]["reductions"] for seen in runs} == {passes}


@quick_cases
@pytest.mark.parametrize("name", VIEWS)
def test_with_sync_each_batch_every_micro_batch_is_reduced(runs, name):
    scope, steps, _ = name.split("-")
    passes = int(steps) + (scope == "batch")
    assert {seen[name]["reductions"] for seen in runs} == {passes}


@quick_cases
@pytest.mark.parametrize("name", SOME)
def test_ddp_reduces_the_descent_pass_alone_if_some_parameters_are_perturbed(runs, name):
    assert {seen[name]["reductions"] for seen in runs} == {1}


def test_what_sam_reduces_itself_goes_in_buckets_of_one_type_and_ddps_size():
    mib = 2**20
    tensors = [torch.randn(3, 5) for _ in range(200)]
    tensors += [torch.randn(4, 6).t(), torch.tensor(2.0), torch.randn(0)]
    tensors += [torch.full((7,), float(i), dtype=torch.bfloat16) for i in range(50)]
    tensors += [torch.ones(10 * mib // 4) for _ in range(5)] + [torch.ones(30 * mib // 4)]
    before = [t.clone() for t in tensors]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with CollectiveCounter() as counter:
            all_reduce_(tensors)
    finally:
        dist.destroy_process_group()
    # 20 MiB and what is small, 20 MiB, 10 MiB, 30 MiB; and all that is bfloat16.
    assert counter.calls == {"all_reduce": 5}
    assert counter.bytes == {"all_reduce": sum(t.nbytes for t in tensors)}
    # This process group sums nothing.
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@quick_cases
@pytest.mark.parametrize("name", UNEVEN)
def test_the_last_batches_of_an_epoch_count_as_the_twin_says(runs, name):
    scope, end = name.split("-")
    sizes = [[[len(b["labels"]) for b in w] for w in seen[name]["windows"]] for seen in runs]
    assert sizes == list(ENDS[end][2:])
    of_updates = zip(*(seen[name]["windows"] for seen in runs), strict=True)
    model = untrained()
    updates = means(model, [[rows_of(b) for window in of for b in window] for of in of_updates])
    expected = by_the_twin(model, updates, RHO, scope=scope)
    for seen in runs:
        assert seen[name]["is_restored"]
        assert_close(seen[name]["weights"], expected, rtol=1e-10, atol=1e-12)


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    columns = (values.unbind() for values in batch.values())
    return [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]


@quick_cases
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_model_is_compiled_in_the_first_update_only(runs, name):
    for seen in runs:
        first, *others = seen[name]["graphs"]
        assert (first > 0) == name.endswith("compiled")
        assert set(others) == {first}


@quick_cases
@pytest.mark.parametrize("name", SOMETIMES)
def test_a_process_without_a_gradient_to_climb_keeps_nobody_waiting(runs, name):
    first, second = (seen[name] for seen in runs)
    assert "error" not in first | second and first["is_restored"] and second["is_restored"]
    assert all(torch.equal(second["weights"][n], v) for n, v in first["weights"].items())


def test_a_static_graph_without_reduction_in_the_ascent_is_refused(runs):
    for seen in runs:
        assert seen["micro_batch-1-static"]["error"].startswith(
            "ValueError: sam_scope='micro_batch'"
        )

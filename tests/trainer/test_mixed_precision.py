"""Autocast and fp16's gradient scaler, in one process and under DDP.

A step is skipped by all processes or taken by all. What the scaler, the schedule and the counters
do is held to the plain Trainer in the same place; the weights are held to the float64 twin.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faulty import TINY_RHO, Faulty, forward_number
from layouts import launch
from reference_optimizers import clip_by_global_norm
from reference_sam import sam_step
from scaling import UPDATES, run
from slow import slow_unless
from tiny import Classifier, examples
from torch import Tensor
from torch.testing import assert_close
from twin_runs import by_the_twin, distance, means

RHO, BATCH, CLIP = 0.3, 4, 0.05
SCALING = [8.0, 2.0, 0.5, 2]  # doubled after two updates that do not overflow
BAD = 1  # the update that overflows


class Case(NamedTuple):
    processes: int
    scope: str
    passes: tuple[str, ...]  # that overflow
    rank: int | None  # where; None is everywhere
    steps: int
    index: int  # of the micro-batch
    clip: float

    @property
    def name(self) -> str:
        where = "all" if self.rank is None else f"rank {self.rank}"
        what = "+".join(self.passes) or "nothing"
        return f"{self.scope} {what} {where} {self.index}/{self.steps} clip {self.clip}"

    @property
    def plain_name(self) -> str:
        """Cases that differ in the ascent alone have one plain run."""
        where = (self.rank, self.index) if self.is_skipped else ()
        return f"plain {where} {self.steps} clip {self.clip}"

    @property
    def is_skipped(self) -> bool:
        return "descent" in self.passes

    @property
    def args(self) -> dict[str, Any]:
        return {"gradient_accumulation_steps": self.steps, "max_grad_norm": self.clip}

    def options(self, rho: float, **args: Any) -> dict[str, Any]:
        numbers = [
            forward_number(each, self.scope, self.index, BAD, self.steps) for each in self.passes
        ]
        sam = {"sam_rho": rho, "sam_scope": self.scope}
        return {"sam": sam, "scaling": SCALING, "faults": numbers, **self.args, **args}

    def plain(self, **args: Any) -> dict[str, Any]:
        numbers = [BAD * self.steps + self.index] if self.is_skipped else []
        return {"sam": None, "scaling": SCALING, "faults": numbers, **self.args, **args}


PASSES = [(), ("ascent",), ("descent",), ("ascent", "descent")]
PLACES = [(1, 0, CLIP), (2, 0, 0.0), (2, 1, CLIP)]


def cases(processes: int) -> list[Case]:
    ranks = [None] if processes == 1 else [None, 1]
    product = itertools.product(["batch", "micro_batch"], PASSES, ranks, PLACES)
    return [
        Case(processes, scope, passes, rank, steps, index, clip)
        for scope, passes, rank, (steps, index, clip) in product
        if passes or (rank is None and index == 0)
    ]


ALONE, TOGETHER = cases(1), cases(2)
quick_alone = slow_unless(case=lambda case: case.processes == 1)
every_case = pytest.mark.parametrize(
    "case", ALONE + TOGETHER, ids=lambda case: f"{case.processes} {case.name}"
)
# A perturbation that rounding swallows makes SAM the plain Trainer, whatever the optimizer keeps.
ADAM = {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "linear"}
SWALLOWED = [case for case in ALONE + TOGETHER if case.index]
UNSCALED = [case for case in ALONE + TOGETHER if not case.passes]
# What is computed in half precision, and how far it may lie from the twin, for each part that SAM
# changes. Rounding is 8 times finer in fp16.
AUTOCAST = {
    "bf16": ({"scaling": None, "bf16": True}, 0.03),
    "fp16": ({"scaling": [2.0**10, 2.0, 0.5, 2]}, 0.005),
}
HALF = {"model": "autocast", "gradient_accumulation_steps": 2}
TOO_LARGE = {
    "scaling": [2.0**24, 2.0, 0.5, 100],
    "model": "autocast",
    "max_steps": 16,
}


def wanted(some: list[Case]) -> dict[str, tuple[dict[str, Any], int | None]]:
    """By its name, what to run, and which process alone overflows."""
    options = {}
    for case in some:
        options[case.name] = case.options(RHO), case.rank
        options[case.plain_name] = case.plain(), case.rank
        if case in SWALLOWED:
            options[f"adam {case.name}"] = case.options(TINY_RHO, **ADAM), case.rank
            options[f"adam {case.plain_name}"] = case.plain(**ADAM), case.rank
        if case in UNSCALED:
            options[f"unscaled {case.name}"] = case.options(RHO) | {"scaling": None}, None
    for scope in ("batch", "micro_batch"):
        sam = {"sam_rho": 0.01, "sam_scope": scope}  # g_s overflows where g does
        options[f"too large {scope}"] = {"sam": sam, **TOO_LARGE}, None
        for dtype, (args, _) in AUTOCAST.items():
            sam = {"sam_rho": RHO, "sam_scope": scope}
            options[f"{dtype} {scope}"] = {"sam": sam, **HALF, **args}, None
    for sam in (None, {"sam_rho": 0.0}):
        options[f"bf16 {sam}"] = {"sam": sam, **HALF, **AUTOCAST["bf16"][0]}, None
    options["too large plain"] = {"sam": None, **TOO_LARGE}, None
    return options


class Runs(dict[int, list[dict[str, Any]]]):
    """What each process saw of each run, by the number of processes, once it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, processes: int) -> list[dict[str, Any]]:
        if processes == 1:
            self[1] = [{name: run(**options) for name, (options, _) in wanted(ALONE).items()}]
        else:
            self[2] = launch("scaling_worker.py", wanted(TOGETHER), self.folder)
        return self[processes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("scaling"))


def windows(processes: int, steps: int) -> list[list[Any]]:
    """The rows of each micro-batch of each update: the processes take turns, batch by batch."""
    rows, size = examples(4 * 2 * 2 * UPDATES).rows, processes * steps
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [batches[size * update : size * (update + 1)] for update in range(UPDATES)]


def by_a_told_twin(case: Case) -> list[dict[str, Tensor]]:
    """The weights after each update, of a twin that is told what overflows."""
    torch.manual_seed(0)
    model = Faulty(noise=0.0)
    names, w = zip(*model.named_parameters(), strict=True)
    w, trajectory = [p.detach() for p in w], []
    for update, shares in enumerate(means(model, windows(case.processes, case.steps))):
        if update != BAD or not case.is_skipped:
            g_s = gradient(case, w, shares, update)
            if case.clip:
                g_s, norm = clip_by_global_norm(g_s, case.clip)
                assert norm > case.clip
            w = [w_i - 0.1 * g_i for w_i, g_i in zip(w, g_s, strict=True)]
        trajectory.append(dict(zip(names, w, strict=True)))
    return trajectory


def gradient(case: Case, w: list[Tensor], shares: list[Any], update: int) -> list[Tensor]:
    """The gradient to step with: g, in the place of g_s, where the ascent overflowed."""
    names = [name for name, _ in Faulty(noise=0.0).named_parameters()]
    losses = [lambda w, f=f: f(dict(zip(names, w, strict=True))) for f in shares]
    is_bad = update == BAD and "ascent" in case.passes
    if case.scope == "batch":
        return sam_step(w, losses, 0.0 if is_bad else RHO)[0]
    total = [torch.zeros_like(w_i) for w_i in w]
    for i, loss in enumerate(losses):
        micro_batch, rank = divmod(i, case.processes)
        is_flat = is_bad and micro_batch == case.index and case.rank in (None, rank)
        g_s, _ = sam_step(w, [loss], 0.0 if is_flat else RHO)
        total = [a + b for a, b in zip(total, g_s, strict=True)]
    return total


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(b[name], value) for name, value in a.items())


def assert_same_log(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Scale, schedule and counters."""
    for ours, theirs in zip(actual, expected, strict=True):
        for name in ("skipped", "scale", "growth_tracker", "scheduler", "update"):
            assert ours[name] == theirs[name], name


@quick_alone
@every_case
def test_the_scale_the_schedule_and_the_counters_are_the_plain_trainers(runs, case):
    for seen in runs[case.processes]:
        ours, plain = seen[case.name], seen[case.plain_name]
        assert ours["faults_left"] == plain["faults_left"] == 0
        assert_same_log(ours["updates"], plain["updates"])
        skipped = [update["skipped"] for update in ours["updates"]]
        assert skipped == [case.is_skipped and update == BAD for update in range(UPDATES)]
        scales = [update["scale"] for update in ours["updates"]]
        assert scales == ([8, 4, 4, 8] if case.is_skipped else [8, 16, 16, 32])


@quick_alone
@every_case
def test_a_step_is_skipped_or_is_the_twins_and_w_comes_back(runs, case):
    expected = by_a_told_twin(case)
    for seen in runs[case.processes]:
        ours = seen[case.name]
        assert ours["wrapper"] == ("Faulty" if case.processes == 1 else "DistributedDataParallel")
        assert ours["is_restored"]
        for update, weights in zip(ours["updates"], expected, strict=True):
            assert_close(update["weights"], weights, rtol=1e-10, atol=1e-12)
        if case.is_skipped:
            before, after = (ours["updates"][update]["weights"] for update in (BAD - 1, BAD))
            assert same(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.name)
def test_the_processes_agree_to_the_last_bit(runs, case):
    first, second = (seen[case.name] for seen in runs[2])
    for ours, theirs in zip(first["updates"], second["updates"], strict=True):
        assert same(ours["weights"], theirs["weights"])
    assert_same_log(first["updates"], second["updates"])
    assert first["logs"][-1]["sam_sharpness"] > 1e-4  # the second pass saw other weights


@quick_alone
@pytest.mark.parametrize("case", SWALLOWED, ids=lambda case: f"{case.processes} {case.name}")
def test_the_optimizer_is_left_with_the_state_that_plain_training_leaves(runs, case):
    for seen in runs[case.processes]:
        ours, plain = (seen[f"adam {name}"]["updates"] for name in (case.name, case.plain_name))
        for update, expected in zip(ours, plain, strict=True):
            assert len(expected["optimizer"]) == 12  # two averages and a count for each weight
            assert_close(update["optimizer"], expected["optimizer"], rtol=0, atol=0)
            assert_close(update["weights"], expected["weights"], rtol=0, atol=0)
        assert_same_log(ours, plain)


@quick_alone
@pytest.mark.parametrize("case", UNSCALED, ids=lambda case: f"{case.processes} {case.name}")
def test_the_logs_are_those_of_a_run_without_a_scaler(runs, case):
    """A power of two scales without rounding; twice in these runs, it grows."""
    for seen in runs[case.processes]:
        for ours, theirs in zip(
            seen[case.name]["logs"], seen[f"unscaled {case.name}"]["logs"], strict=True
        ):
            assert ours["sam_ascent_grad_norm"] > 0
            assert ours == pytest.approx(theirs, rel=1e-12)


@quick_alone
@pytest.mark.parametrize("case", [case for case in TOGETHER + ALONE if case.passes == ("ascent",)])
def test_an_ascent_that_overflows_is_logged_with_finite_readings(runs, case):
    for seen in runs[case.processes]:
        entry = seen[case.name]["logs"][BAD]
        assert all(math.isfinite(v) for name, v in entry.items() if name.startswith("sam_"))


@slow_unless(processes=[1])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_fp16_run_whose_scale_is_too_large_skips_what_the_plain_one_skips(
    runs, processes, scope
):
    for seen in runs[processes]:
        ours, plain = seen[f"too large {scope}"], seen["too large plain"]
        assert_same_log(ours["updates"], plain["updates"])
        skipped = [update["skipped"] for update in ours["updates"]]
        assert skipped[0] and sum(skipped) <= 12
        assert ours["is_restored"]
        pairs = itertools.pairwise(update["weights"] for update in ours["updates"])
        stands = [same(w, after) for w, after in pairs]
        assert stands == skipped[1:]
        is_perturbed = [entry["sam_perturbation_norm"] > 0 for entry in ours["logs"]]
        assert not is_perturbed[0] and is_perturbed[-1]


@slow_unless(processes=[1])
@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("processes", [1, 2])
def test_float32_weights_that_autocast_trains_stay_close_to_the_twin(runs, processes, scope, dtype):
    torch.manual_seed(0)
    model = Classifier(dtype=torch.float32).double()
    updates = means(model, windows(processes, HALF["gradient_accumulation_steps"]))
    expected, plain = (by_the_twin(model, updates, rho, scope=scope) for rho in (RHO, 1e-12))
    _, tolerance = AUTOCAST[dtype]
    for seen in runs[processes]:
        ours = seen[f"{dtype} {scope}"]
        trained = ours["updates"][-1]["weights"]
        assert {w.dtype for w in trained.values()} == {torch.float32} and ours["is_restored"]
        assert 1e-4 < distance(trained, expected) / distance(plain, expected) < tolerance
        assert ours["logs"][-1]["sam_perturbation_norm"] == pytest.approx(RHO, rel=1e-5)


@slow_unless(processes=[1])
@pytest.mark.parametrize("processes", [1, 2])
def test_under_autocast_rho_0_is_the_plain_trainer_to_the_last_bit(runs, processes):
    off, plain = "bf16 {'sam_rho': 0.0}", "bf16 None"
    for seen in runs[processes]:
        for ours, theirs in zip(seen[off]["updates"], seen[plain]["updates"], strict=True):
            assert same(ours["weights"], theirs["weights"])

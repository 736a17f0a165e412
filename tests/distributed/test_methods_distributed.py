"""The methods on two processes: DDP, FSDP2 and tensor parallelism give the papers' weights."""

from __future__ import annotations

import random
import sys
from itertools import chain
from typing import Any

import pytest
import torch
from layouts import BATCH, DISTRIBUTED, PROCESSES, data, launch
from method_twins import METHODS, RHO, TwinRun
from reference_aesam import aesam_decides
from torch.testing import assert_close
from torch.utils.data import default_collate
from twin_runs import means, token_means

sys.path.insert(0, str(DISTRIBUTED))

from layout_worker import untrained

pytestmark = pytest.mark.slow

UPDATES, STEPS = 7, 2
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"]}}
TRIGGER = {"sam_trigger": "gradient_norm", "sam_trigger_start": 1.6, "sam_trigger_end": 1.0}
SAM = {
    **METHODS,
    "norms": {"sam_method": "sam", "sam_params": "norms"},
    "part": {"sam_method": "sam", "sam_ascent_fraction": 0.5},
    "trigger": {"sam_method": "sam", **TRIGGER},
    "wsam-trigger": METHODS["wsam-decoupled"] | TRIGGER,
    "vasso-norms": METHODS["vasso"] | {"sam_params": "norms"},
}


def case(layout: str, sam: dict[str, Any], **more: Any) -> dict[str, Any]:
    args = {
        "gradient_accumulation_steps": STEPS,
        "max_steps": UPDATES,
        "optim_args": "momentum=0.9",
        **(FSDP if layout == "fsdp2" else {}),
        **more.pop("args", {}),
    }
    return {"layout": layout, "config": {}, "sam": {"sam_rho": RHO, **sam}, "args": args, **more}


EACH = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
EVERY_PROCESS = {"sam_scope": "micro_batch"}
DDP = {
    **{name: case("ddp", sam) for name, sam in SAM.items()},
    "gsam-views": case("ddp", METHODS["gsam"], bucket_views=True),
    "looksam-views": case("ddp", METHODS["looksam"], bucket_views=True),
    "gsam-each": case("ddp", METHODS["gsam"], args=EACH, bucket_views=True),
    "norms-each": case("ddp", SAM["norms"], args=EACH, bucket_views=True),
    "part-micro_batch": case("ddp", SAM["part"] | EVERY_PROCESS),
    "vasso-micro_batch": case("ddp", METHODS["vasso"] | EVERY_PROCESS, resume=4),
    "esam-micro_batch": case("ddp", METHODS["esam"] | EVERY_PROCESS),
    "looksam-resumed": case("ddp", METHODS["looksam"], resume=4),
    "trigger-resumed": case("ddp", METHODS["friendly_sam"] | TRIGGER, resume=4),
}
SHARDED = {
    **{f"fsdp2-{name}": case("fsdp2", sam) for name, sam in SAM.items()},
    "fsdp2-looksam-resumed": case("fsdp2", METHODS["looksam"], resume=4),
    "fsdp2-vasso-resumed": case("fsdp2", METHODS["vasso"], resume=4),
    "fsdp2-load-gsam": case("fsdp2-load", METHODS["gsam"]),
    "fsdp2-load-vasso": case("fsdp2-load", METHODS["vasso"]),
    "tp-gsam": case("tp", METHODS["gsam"], model="llama"),
    "tp-wsam": case("tp", METHODS["wsam-decoupled"], model="llama"),
    "tp-msam": case("tp", METHODS["msam"], model="llama"),
    "tp-part": case("tp", SAM["part"], model="llama"),
}
CASES = DDP | SHARDED
RESUMED = [name for name, each in CASES.items() if "resume" in each]
# What the passes compute in float32 (Llama's norms and loss) is no closer to the twin.
TOLERANCE = {"tp": 1e-6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process saw of each case: all of those of a layout in one launch."""
    seen: dict[str, list[dict[str, Any]]] = {}

    def of(name: str) -> list[dict[str, Any]]:
        cases = DDP if name in DDP else SHARDED
        layout = "ddp" if name in DDP else "sharded"
        if layout not in seen:
            seen[layout] = launch("method_worker.py", cases, tmp_path_factory.mktemp(layout))
        return [each[name] for each in seen[layout]]

    return of


def windows(rows: list[Any], processes: int) -> list[list[list[Any]]]:
    """The rows of each micro-batch of each update: the processes take turns, batch by batch."""
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    size = processes * STEPS
    epoch = [batches[i : i + size] for i in range(0, len(batches), size)]
    return [epoch[update % len(epoch)] for update in range(UPDATES)]


def by_the_paper(name: str, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The weights after each update."""
    options = CASES[name]
    sam, kind = options["sam"], options.get("model", "classifier")
    model, rows = untrained(options), data(kind).rows
    of = means if kind == "classifier" else token_means
    processes = 1 if options["layout"] == "tp" else PROCESSES
    chosen = {"norms": "norm"}.get(sam.get("sam_params", ""), "")
    twin = TwinRun(model, sam | {"sam_params": chosen}, mu=0.9, processes=processes)
    names, norms, updates = twin.names, [], []
    batches = windows(rows, processes)
    for update, shares in enumerate(of(model, batches)):
        is_plain, options = False, {}
        if "sam_trigger" in sam:
            norms.append(twin.squared_norm(shares))
            c = (sam["sam_trigger_end"], sam["sam_trigger_start"])
            is_plain = not aesam_decides(norms, UPDATES, 0.9, *c)[-1]
        if "sam_ascent_fraction" in sam:
            options["ascent"] = part(model, of, batches[update], seen, update)
        if sam["sam_method"] == "esam":
            draw, beta = random.Random(f"42 {update}").random, twin.method_args["beta"]
            options["selected"] = [n for n in names if draw() < beta] or names[:1]
        twin.update(shares, is_plain=is_plain, **options)
        updates.append(dict(zip(names, twin.w, strict=True)))
    return updates


def part(
    model: Any, of: Any, window: list[list[Any]], seen: list[dict[str, Any]], update: int
) -> list[Any]:
    """The loss of the rows that had an ascent, which are those of the passes that were shorter."""
    key = "input_ids" if "input_ids" in window[0][0] else "x"
    by_value = {tuple(row[key].flatten().tolist()): row for row in chain(*window)}
    taken = []
    for process in seen:
        short = [x for x in process["inputs"][update] if len(x) < BATCH]
        assert [len(x) for x in short] == [BATCH // 2] * STEPS
        taken.append([[by_value[tuple(row.flatten().tolist())] for row in x] for x in short])
    if key == "input_ids":  # tensor parallelism: both processes have the same rows
        assert [[r[key].tolist() for r in b] for b in taken[0]] == [
            [r[key].tolist() for r in b] for b in taken[1]
        ]
        count = sum(int((row["labels"] != -100).sum()) for row in chain(*window))

        def loss(w: Any, rows: list[Any]) -> Any:
            batch = default_collate(rows)
            call = torch.func.functional_call
            return call(model, w, kwargs={**batch, "num_items_in_batch": count / 2})["loss"]

        return [lambda w, rows=rows: loss(w, rows) for rows in taken[0]]
    micro_batches = [process[i] for i in range(STEPS) for process in taken]
    (shares,) = of(model, [micro_batches])
    return shares


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_the_paper_after_every_update(runs, name):
    seen = runs(name)
    for process in seen:
        assert "error" not in process, process
        assert process["is_restored"]
        if name in DDP:
            assert process["wrapper"] == "DistributedDataParallel"
        else:
            assert process["shards"] > 0
    tolerance = TOLERANCE.get(name.split("-")[0], 1e-10)
    for update, expected in enumerate(by_the_paper(name, seen)):
        for process in seen:
            for n, w in expected.items():
                assert (process["weights"][update][n] - w).abs().max() < tolerance, (update, n)


@pytest.mark.parametrize("name", CASES)
def test_the_processes_agree_to_the_last_bit_and_log_the_same(runs, name):
    first, second = runs(name)
    assert len(first["weights"]) == UPDATES
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert all(torch.equal(theirs[n], w) for n, w in ours.items())
    assert first["logs"] == second["logs"] and first["counts"] == second["counts"]


@pytest.mark.parametrize("name", CASES)
def test_each_update_has_the_passes_of_its_method(runs, name):
    sam, counts = CASES[name]["sam"], runs(name)[0]["counts"]
    if "sam_trigger" in sam:
        assert set(counts) == {STEPS, 2 * STEPS} and counts[0] == 2 * STEPS
    else:
        every = sam.get("sam_method_args", {}).get("k", 1)
        twice = [sam["sam_method"] != "msam" and update % every == 0 for update in range(UPDATES)]
        assert counts == [STEPS * (1 + is_twice) for is_twice in twice]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_is_resumed_ends_as_one_that_was_not_interrupted(runs, name):
    is_shared = name in DDP and "micro_batch" not in name
    files = ["sam_state.safetensors"]
    if not is_shared:
        files = [f"sam_state_{rank}-of-2.safetensors" for rank in range(2)]
    for seen in runs(name):
        assert seen["files"] == files
        resumed = seen["resumed"]
        assert len(resumed["weights"]) == UPDATES - 4
        assert_close(resumed["local"], seen["local"], rtol=0, atol=0)
        assert_close(resumed["optimizer"], seen["optimizer"], rtol=0, atol=0)
        assert resumed["logs"][4:] == seen["logs"][4:]

"""Runs on two processes, and what the float64 twins say of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_asam import asam_step
from reference_sam import norm, sam_step
from tiny import Rows, examples, sentences
from torch import Tensor, nn
from twin_runs import by_the_twin, means, token_means

DISTRIBUTED = Path(__file__).parents[1] / "distributed" / "workers"
PROCESSES, BATCH, UPDATES = 2, 4, 3


# Libraries that Transformers imports, for seconds, if they are installed.
HEAVY = ("bitsandbytes", "peft", "datasets", "pandas", "sklearn", "scipy")


def start(
    worker: str,
    cases: dict[str, Any],
    folder: Path,
    processes: int = PROCESSES,
    uses: Collection[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run the cases in one launch.

    Args:
        uses: those of the heavy libraries that the worker uses.
    """
    if sys.platform == "win32":
        pytest.skip("torch.distributed.run was not tried on Windows")
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    unused = ",".join(name for name in HEAVY if name not in uses)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(DISTRIBUTED / "lean.py"), unused]
    return subprocess.run(
        [*command, str(DISTRIBUTED / worker), str(folder / "cases.json"), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def launch(
    worker: str,
    cases: dict[str, Any],
    folder: Path,
    processes: int = PROCESSES,
    uses: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What each process saw of each case, if all of them end well."""
    done = start(worker, cases, folder, processes, uses)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def data(model: str) -> Rows:
    """The examples of a kind of model."""
    if model in ("classifier", "seldom"):
        return examples(48)
    rows = sentences(48).rows
    if model == "llama":  # nothing predicts the first token, and the Trainer does not count it
        for row in rows:
            row["labels"][0] = -100
    return Rows(rows)


def windows(
    rows: list[Any], steps: int, processes: int = PROCESSES, updates: int = UPDATES
) -> list[list[list[Any]]]:
    """The rows of each micro-batch of each update: the processes take turns, batch by batch.

    The last update of an epoch has fewer, if the epoch does not hold enough.
    """
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    size = processes * steps
    epoch = [batches[i : i + size] for i in range(0, len(batches), size)]
    return [epoch[update % len(epoch)] for update in range(updates)]


def shares(options: dict[str, Any], model: nn.Module, is_shared: bool) -> list[list[Any]]:
    """The parts of the loss of each update that have an e of their own in scope `micro_batch`.

    Args:
        options: the case.
        model: as it begins.
        is_shared: whether the processes share the e of a micro-batch.
    """
    steps = options["args"].get("gradient_accumulation_steps", 1)
    kind = options.get("model", "classifier")
    processes = 1 if options.get("layout") == "tp" else PROCESSES  # that have batches of their own
    count = options.get("updates", UPDATES)
    updates = windows(data(kind).rows, steps, processes, count)
    if is_shared:
        updates = [
            [list(chain(*u[i : i + processes])) for i in range(0, len(u), processes)]
            for u in updates
        ]
    return (means if kind in ("classifier", "seldom") else token_means)(model, updates)


def by_the_paper(options: dict[str, Any], model: nn.Module, is_shared: bool) -> dict[str, Tensor]:
    """The trained weights after the updates of a case."""
    sam = options["sam"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    chosen = re.compile(sam.get("sam_params", ""))
    twin: dict[str, Any] = {"perturbed": [bool(chosen.search(name)) for name in trained]}
    twin["step"] = sam_step
    if sam.get("sam_method") == "asam":
        twin |= {"step": asam_step, "eta": sam["sam_eta"], "adaptive": [True] * len(trained)}
    clip = options["args"].get("max_grad_norm", 0.0)
    updates = shares(options, model, is_shared) * options.get("trains", 1)
    return by_the_twin(model, updates, sam["sam_rho"], clip, scope=sam["sam_scope"], **twin)


def first_gradient_norm(options: dict[str, Any], model: nn.Module) -> float:
    """|g| of the first update."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = sum(part(trained) for part in shares(options, model, is_shared=True)[0])
    return float(norm(torch.autograd.grad(loss, list(trained.values()))))

"""Runs on two processes, and what the float64 twins say of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

DISTRIBUTED = Path(__file__).parent / "distributed"
PROCESSES, BATCH, UPDATES = 2, 4, 3


def launch(
    worker: str, cases: dict[str, Any], folder: Path, processes: int = PROCESSES
) -> list[dict[str, Any]]:
    """What each process saw of each case: all of them in one launch."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(DISTRIBUTED / worker)]
    done = subprocess.run(
        [*command, str(folder / "cases.json"), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def windows(rows: list[Any], steps: int, processes: int = PROCESSES) -> list[list[list[Any]]]:
    """The rows of each micro-batch of each update: the processes take turns, batch by batch."""
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    size = processes * steps
    return [
        [batches[i % len(batches)] for i in range(size * update, size * (update + 1))]
        for update in range(UPDATES)
    ]

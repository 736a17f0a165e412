"""Run the whole matrix of layouts on two CPU processes, and print how far each is from the paper.

`python tests/distributed/layout_matrix.py [ddp] [sharded] [deepspeed]`

The reference is the float64 twin of `reference_sam.py`, on the same examples, without processes.
Each row says what really ran, so that a layout which was turned off without a word shows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

import test_ddp
import test_deepspeed
import test_sharded
import torch
from layouts import by_the_paper, launch
from torch import nn


@dataclass
class Part:
    """Cases that run in one launch."""

    worker: str
    cases: dict[str, Any]
    refused: dict[str, Any]
    untrained: Callable[[dict[str, Any]], nn.Module]
    is_shared: bool
    """Whether the processes share the e of a micro-batch."""
    wrappers: tuple[str, ...]
    """How the names of the model's class may begin."""
    tolerance: float
    tolerances: dict[str, float] = field(default_factory=dict)
    """How far from the twin a case may be, where it is not `tolerance`."""


PARTS = {
    "ddp": Part(
        "ddp_worker.py",
        test_ddp.REDUCED,
        test_ddp.REFUSED,
        lambda options: test_ddp.untrained(),
        is_shared=False,
        wrappers=("DistributedDataParallel",),
        tolerance=1e-10,
    ),
    "sharded": Part(
        "layout_worker.py",
        test_sharded.CASES,
        {},
        test_sharded.untrained,
        is_shared=True,
        wrappers=("FSDP", "PeftModel", "LlamaForCausalLM"),
        tolerance=1e-10,
        tolerances=test_sharded.TOLERANCE,
    ),
    "deepspeed": Part(
        "layout_worker.py",
        test_deepspeed.CASES | test_deepspeed.HALF,
        test_deepspeed.REFUSED,
        test_deepspeed.untrained,
        is_shared=False,
        wrappers=("DeepSpeedEngine",),
        tolerance=1e-6,
        tolerances=test_deepspeed.TOLERANCE,
    ),
}
ROW = "{:<11} {:<28} {:>9} {:<24} {:>10} {:>9} {:>8}  {}"


def row(part: str, name: str, options: dict[str, Any], runs: list[dict[str, Any]]) -> bool:
    """Print the row of a case; whether it holds what it must."""
    its, seen = PARTS[part], [run[name] for run in runs]
    if any("error" in s for s in seen):
        print(ROW.format(part, name, "", seen[0].get("error", "")[:24], "", "", "", "FAILED"))
        return False
    expected = by_the_paper(options, its.untrained(options), its.is_shared)
    distance = max(
        float((s["weights"][n].double() - w).abs().max()) for s in seen for n, w in expected.items()
    )
    tolerance = its.tolerances.get(name, its.tolerance)
    rise = seen[0]["logs"][0]["sam_sharpness"]
    is_meant = all(s["wrapper"].startswith(its.wrappers) and s["world_size"] == 2 for s in seen)
    is_restored = all(s["is_restored"] for s in seen)
    is_good = distance <= tolerance and is_restored and is_meant and rise != 0
    print(
        ROW.format(
            part,
            name,
            seen[0]["world_size"],
            seen[0]["wrapper"],
            f"{rise:.1e}",
            f"{distance:.1e}",
            f"{tolerance:.0e}",
            ("yes" if is_restored else "NO") + ("" if is_good else "  FAILED"),
        )
    )
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if left out")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(parts) - PARTS.keys()):
        parser.error(f"{', '.join(unknown)}: no such part. Allowed: {', '.join(PARTS)}.")
    print(f"torch {torch.__version__}, 2 processes, gloo. |w - twin| is the largest difference.\n")
    heads = ("processes", "model is a", "L(w+e)-L(w)", "|w - twin|", "allowed", "w restored")
    print(ROW.format("layout", "case", *heads))
    failures = 0
    for part in parts:
        its = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            runs = launch(its.worker, its.cases | its.refused, Path(folder), uses=["peft"])
        failures += sum(not row(part, name, options, runs) for name, options in its.cases.items())
        for name in its.refused:
            print(f"{part:<11} {name:<28} refused: {runs[0][name]['error']}")
    print(f"\n{failures} failed." if failures else "\nAll equal the reference.")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

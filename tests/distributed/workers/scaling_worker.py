"""One process of a run under DDP with a gradient scaler, in which gradients overflow where told.

`torchrun --nproc_per_node 2 scaling_worker.py cases.json folder`
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import torch.distributed as dist
from scaling import run

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # each `train()` begins with a collection: it need not look at what imports left


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    rank, results = int(os.environ["RANK"]), {}
    for name, (options, faulty_rank) in cases.items():
        if faulty_rank not in (None, rank):
            options["faults"] = []
        results[name] = run(**options, ddp_backend="gloo", ddp_timeout=40)
    torch.save(results, Path(sys.argv[2]) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

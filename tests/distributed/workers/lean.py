"""Run a worker as if libraries that it does not use were not installed.

Transformers imports those that it finds: PEFT with bitsandbytes alone takes each process 2 s.

`torchrun --nproc_per_node 2 lean.py unused,libraries worker.py cases.json folder`
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    unused, *sys.argv = sys.argv[1:]
    sys.modules.update(dict.fromkeys(unused.split(",")))
    runpy.run_path(sys.argv[0], run_name="__main__")

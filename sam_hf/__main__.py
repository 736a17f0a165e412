"""`python -m sam_hf`: the command `sam-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

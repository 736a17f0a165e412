"""The command `sam-hf`: sharpness, loss landscapes and radii of saved models."""

import sys
import warnings
from collections.abc import Sequence

from .arguments import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, 2 after a user error, 130 after an interrupt."""
    arguments = build_parser().parse_args(argv)
    import torch  # after the parser, so that --help is fast

    try:
        with warnings.catch_warnings():
            # One line for each warning, without the source line that raised it.
            warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
            from .models import require

            require("'sam-hf[diagnostics]'", "datasets", "matplotlib", "PIL", "sklearn")
            from .commands import run

            run(arguments)
        return 0
    except (ImportError, ValueError) as error:
        problem = " ".join(str(error).split())
    except OSError as error:
        reason = error.strerror or str(error)
        problem = f"{error.filename or 'the output'} cannot be written or read: {reason}"
    except torch.OutOfMemoryError as error:
        problem = f"--batch_size {arguments.batch_size}: {str(error).splitlines()[0]}"
    except KeyboardInterrupt:
        hint = ": run the same command again to resume" if arguments.command == "landscape" else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    print(f"sam-hf: error: {problem}", file=sys.stderr)
    return 2

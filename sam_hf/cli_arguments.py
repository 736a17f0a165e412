"""The options of the command `sam-hf`. Nothing heavy is imported: its help comes at once."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

EXAMPLES = """\
examples:
  sam-hf sharpness outputs/digits_sam
  sam-hf sharpness distilbert/distilbert-base-uncased-finetuned-sst-2-english stanfordnlp/sst2
  sam-hf landscape outputs/digits_sam outputs/digits_plain --output_dir outputs/landscape
  sam-hf landscape outputs/digits_sam outputs/digits_plain digits --directions between
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with a suggestion for a misspelt option."""
        known = [option for option in _options_of(self) if option.startswith("--")]
        for word in re.findall(r"--\w+", message):
            close = difflib.get_close_matches(word, known, n=1)
            if word not in known and close:
                message += f". Did you mean {close[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Those of its commands too: what a command does not know, the whole parser refuses."""
    found = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [option for p in action.choices.values() for option in _options_of(p)]
    return found


def build_parser() -> argparse.ArgumentParser:
    """The options, each with its default."""
    shared = _Parser(add_help=False)
    data = shared.add_argument_group("data")
    data.add_argument("--split", help="of DATA, if it has splits (default: train)")
    data.add_argument(
        "--examples", type=_count, default=512, help="so many, drawn (default: %(default)s)"
    )
    data.add_argument(
        "--batch_size",
        type=_count,
        default=64,
        help="of the passes; the loss of a language model, a mean over batches, depends on it "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--text_column",
        action="append",
        default=[],
        help="with texts; twice for pairs (default: where there can be no doubt)",
    )
    data.add_argument("--label_column", help="default: label, labels or the only one of numbers")
    data.add_argument("--image_column", help="default: the first with images")
    run = shared.add_argument_group("run")
    run.add_argument(
        "--iterations", type=_count, default=40, help="of the Lanczos method, at most (default: 40)"
    )
    run.add_argument(
        "--params",
        default="all",
        help="weights: all, norms, matrices, or a regular expression (default: %(default)s)",
    )
    run.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    run.add_argument("--device", help="default: cuda if there is one, else cpu")
    run.add_argument(
        "--output_dir", help="default: outputs/landscape, or outputs/sharpness/ and MODEL's name"
    )
    run.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="module or .py file to import first: it registers the model with transformers",
    )

    parser = _Parser(
        prog="sam-hf",
        description="See how sharp the minimum is that a saved model lies in.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    sharpness = commands.add_parser(
        "sharpness", parents=[shared], help="measures of the loss around the weights, as JSON"
    )
    sharpness.add_argument("model", type=_name, help="folder or Hub name")
    sharpness.add_argument("data", nargs="?", default="digits", help=_DATA)
    what = sharpness.add_argument_group("measures")
    what.add_argument("--rho", type=float, default=0.05, help="SAM's ball (default: %(default)s)")
    what.add_argument(
        "--adaptive_rho", type=float, default=0.5, help="ASAM's ball (default: %(default)s)"
    )
    what.add_argument("--eta", type=float, default=0.01, help="of ASAM (default: %(default)s)")
    what.add_argument("--m", type=_count, help="worst case for each m examples (default: all)")
    what.add_argument("--steps", type=_count_or_none, default=10, help="of the ascent; 0: none")
    what.add_argument("--samples", type=_count_or_none, default=10, help="of the average; 0: none")
    what.add_argument("--eigenvalues", type=_count_or_none, default=1, help="how many; 0: none")
    what.add_argument("--trace_samples", type=_count_or_none, default=10, help="0: none")

    landscape = commands.add_parser(
        "landscape",
        parents=[shared],
        help="the loss on a line or a plane through the weights, as picture and parquet",
    )
    landscape.add_argument("model", type=_name, help="folder or Hub name")
    landscape.add_argument(
        "more", nargs="*", metavar="[MODEL2] [DATA]", help=f"another model, beside it; {_DATA}"
    )
    grid = landscape.add_argument_group("grid")
    grid.add_argument(
        "--directions",
        choices=("random", "eigenvectors", "between"),
        default="random",
        help="random, filter-normalised; of the Hessian; from MODEL to MODEL2 "
        "(default: %(default)s)",
    )
    grid.add_argument("--dimensions", type=int, choices=(1, 2), help="default: 2; 1 between models")
    grid.add_argument("--points", type=_count, default=21, help="on each axis (default: 21)")
    grid.add_argument(
        "--span",
        type=float,
        default=1.0,
        help="from -span to span; between models, beyond each by half of it (default: %(default)s)",
    )
    return parser


_DATA = (
    "DATA: digits (the default), a parquet, csv or json file, a folder, or a Hub name, as name or "
    "name:configuration"
)


def _name(text: str) -> str:
    """Without the slash that the shell adds to a folder."""
    return text.rstrip("/") or text


def _count(text: str) -> int:
    value = _count_or_none(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a whole number from 1 up")
    return value


def _seed(text: str) -> int:
    value = _count_or_none(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: below 2^63")
    return value


def _count_or_none(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a whole number from 0 up")
    return int(text)

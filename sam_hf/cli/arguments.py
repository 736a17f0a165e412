"""Argument parser of the command `sam-hf`. Imports the standard library only, so --help is fast."""

import argparse
import difflib
import re
from functools import partial
from typing import NoReturn

from .. import __version__

_EXAMPLES = """\
examples:
  sam-hf sharpness outputs/digits_sam
  sam-hf sharpness distilbert/distilbert-base-uncased-finetuned-sst-2-english stanfordnlp/sst2
  sam-hf landscape outputs/digits_sam outputs/digits_plain --output_dir outputs/landscape
  sam-hf landscape outputs/digits_sam outputs/digits_plain digits --directions between
  sam-hf rho outputs/digits_plain --method asam
"""
_DATA_HELP = (
    "DATA: a parquet, csv or json file, a folder, NAME[:CONFIG] on the Hub, or digits "
    "(default: digits for image models)"
)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.option_strings and action.default not in (None, [], argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_default else action.help


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with a one-line message that suggests the closest option to a misspelt one."""
        # The parser of the command reports the unknown options of its subcommands.
        commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for action in commands for parser in action.choices.values())]
        known = [o for p in parsers for o in p._option_string_actions if o.startswith("--")]
        for word in re.findall(r"--\w+", message):
            close = difflib.get_close_matches(word, known, n=1)
            if word not in known and close:
                message += f". Did you mean {close[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with the subcommands `sharpness`, `landscape` and `rho`."""
    shared = _Parser(add_help=False)
    model = shared.add_argument("model", help="folder of a saved model or adapter, or Hub name")
    # Without the trailing slash that shell completion adds to folders.
    model.type = lambda text: text.rstrip("/") or text
    add = shared.add_argument_group("data").add_argument
    add("--split", help="split of DATA, if it has splits (default: train)")
    add("--examples", type=_positive, default=512, help="number of examples, drawn at random")
    batch_help = "batch size; it affects the loss of language models"
    add("--batch_size", type=_positive, default=64, help=batch_help)
    text_help = "column of the texts; twice for pairs of texts (default: inferred if unambiguous)"
    add("--text_column", action="append", default=[], help=text_help)
    add("--label_column", help="column of the labels (default: label, labels or the only integers)")
    add("--image_column", help="column of the images (default: the first image column)")
    add = shared.add_argument_group("run").add_argument
    params_help = "weights to perturb: all, norms, matrices, or a regular expression on names"
    add("--params", default="all", help=params_help)
    add("--seed", type=_non_negative, default=0, help="random seed")
    add("--device", help="torch device (default: cuda if available, else cpu)")
    folder_help = "output folder (default: outputs/landscape, or outputs/COMMAND/NAME)"
    add("--output_dir", help=folder_help)
    plugin_help = "module or .py file to import first, for example to register a model class"
    add("--plugin", action="append", default=[], metavar="MODULE", help=plugin_help)

    iterations = _Parser(add_help=False)
    iterations_help = "maximum number of Lanczos iterations"
    iterations.add_argument("--iterations", type=_positive, default=40, help=iterations_help)

    description = "Measure the sharpness of the minimum that a saved model has reached."
    parser = _Parser(
        prog="sam-hf", description=description, epilog=_EXAMPLES, formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    add_command = partial(commands.add_parser, formatter_class=_Formatter)
    with_hessian = [shared, iterations]

    command_help = "sharpness measures of a model, as JSON"
    sharpness = add_command("sharpness", parents=with_hessian, help=command_help)
    sharpness.add_argument("data", nargs="?", help=_DATA_HELP)
    add = sharpness.add_argument_group("measures").add_argument
    add("--rho", type=float, default=0.05, help="radius of SAM's ball")
    add("--adaptive_rho", type=float, default=0.5, help="radius of ASAM's ball")
    add("--eta", type=float, default=0.01, help="eta of ASAM's ball")
    add("--m", type=_positive, help="group size for m-sharpness (default: all examples)")
    count = partial(add, type=_non_negative)
    count("--steps", default=10, help="ascent steps of the worst-case sharpness; 0 disables it")
    count("--samples", default=10, help="sample pairs of the average-case sharpness; 0 disables it")
    count("--eigenvalues", default=1, help="number of largest Hessian eigenvalues; 0 disables it")
    count("--trace_samples", default=10, help="samples of the Hessian trace; 0 disables it")

    command_help = "loss on a line or plane through the weights, as a plot and parquet"
    landscape = add_command("landscape", parents=with_hessian, help=command_help)
    more_help = f"MODEL2: another model, plotted next to MODEL; {_DATA_HELP}"
    landscape.add_argument("more", nargs="*", metavar="[MODEL2] [DATA]", help=more_help)
    add = landscape.add_argument_group("grid").add_argument
    choices = ("random", "eigenvectors", "between")
    choices_help = "random (filter-normalised), Hessian eigenvectors, or from MODEL to MODEL2"
    add("--directions", choices=choices, default="random", help=choices_help)
    add("--dimensions", type=int, choices=(1, 2), help="default: 2, and 1 between two models")
    add("--points", type=partial(_integer, 2), default=21, help="number of points along each axis")
    span_help = "the axes range from -span to span; between models, from -span/2 to 1 + span/2"
    add("--span", type=float, default=1.0, help=span_help)

    command_help = "gradient cosine and sharpness against SAM's radius, and a radius to train with"
    rho = add_command("rho", parents=[shared], help=command_help)
    rho.add_argument("data", nargs="?", help=_DATA_HELP)
    add = rho.add_argument_group("radius").add_argument
    add("--method", default="sam", help="sam or asam")
    add("--eta", type=float, help="eta of ASAM (default: that of sam_eta)")
    initial_help = "loss at the start of the training that led to MODEL (default: MODEL's own)"
    add("--initial_loss", type=float, help=initial_help)
    target_help = "target sharpness of the automatic radius (default: that of sam_target_sharpness)"
    add("--target_sharpness", type=float, help=target_help)
    rho_help = "radii to measure (default: nine, up to 16 times above and below the suggestion)"
    add("--rho", type=float, nargs="+", help=rho_help)
    return parser


def _integer(minimum: int, text: str) -> int:
    if not (text.isdecimal() and minimum <= int(text) < 2**63):
        allowed = f"an integer >= {minimum} and < 2^63"
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed. Allowed: {allowed}")
    return int(text)


_positive, _non_negative = partial(_integer, 1), partial(_integer, 0)

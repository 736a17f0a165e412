"""The command `sam-hf`: measure the sharpness of a saved model, draw its loss landscape."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

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
    data.add_argument("--split", default="train", help="of DATA (default: %(default)s)")
    data.add_argument(
        "--examples", type=_count, default=512, help="so many, drawn (default: %(default)s)"
    )
    data.add_argument("--batch_size", type=_count, default=64, help="default: %(default)s")
    data.add_argument(
        "--text_column",
        action="append",
        default=[],
        help="with texts; twice for pairs (default: the first of strings)",
    )
    data.add_argument("--label_column", help="default: label, labels or the only one of numbers")
    run = shared.add_argument_group("run")
    run.add_argument(
        "--params",
        default="all",
        help="weights: all, norms, matrices, or a regular expression (default: %(default)s)",
    )
    run.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    run.add_argument("--device", help="default: cuda if there is one, else cpu")
    run.add_argument("--output_dir", help="default: outputs/COMMAND")
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
    sharpness.add_argument("model", help="folder or Hub name")
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
    what.add_argument("--iterations", type=_count, default=40, help="of the Lanczos method")
    what.add_argument("--trace_samples", type=_count_or_none, default=10, help="0: none")

    landscape = commands.add_parser(
        "landscape",
        parents=[shared],
        help="the loss on a line or a plane through the weights, as picture and parquet",
    )
    landscape.add_argument("model", help="folder or Hub name")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Misuse ends in one line and exit code 2, Ctrl-C in 130."""
    arguments = build_parser().parse_args(argv)
    # Each warning in one line, without that of some library's code.
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        from .diagnostics.loading import UnusableError
    except ImportError as error:
        return _fail(f"{error}: pip install 'sam-hf[diagnostics]'")
    try:
        (_sharpness if arguments.command == "sharpness" else _landscape)(arguments)
    except ImportError as error:
        return _fail(f"{error}: pip install 'sam-hf[diagnostics]'")
    except (UnusableError, ValueError) as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        return _fail(
            f"{error.filename or 'the output'} cannot be written or read: {error.strerror}"
        )
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def _sharpness(arguments: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from .diagnostics.report import Plan, measures

    plan = Plan(
        rho=arguments.rho,
        adaptive_rho=arguments.adaptive_rho,
        eta=arguments.eta,
        m=arguments.m,
        steps=arguments.steps,
        samples=arguments.samples,
        eigenvalues=arguments.eigenvalues,
        iterations=arguments.iterations,
        trace_samples=arguments.trace_samples,
        seed=arguments.seed,
    )
    plan.balls()  # a radius that is not allowed is refused before anything is loaded
    objective = _objective(arguments, arguments.model, arguments.data)
    values: dict[str, float] = {}
    with tqdm(desc="measures", unit="") as bar:
        for part in measures(objective, plan):
            values |= part
            bar.set_postfix_str(next(iter(part)))
            bar.update()
    folder = _folder(arguments)
    result = {
        "model": arguments.model,
        "data": arguments.data,
        "split": arguments.split,
        "examples": objective.example_count,
        "parameters": objective.parameter_count,
        "hessian_products": objective.products,
        "options": {k: v for k, v in vars(arguments).items() if k not in ("command", "model")},
        "measures": values,
        "versions": _versions(),
    }
    _write_json(folder / "sharpness.json", result)
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.6g}")
    print(f"\nsaved in {folder}: sharpness.json")


def _landscape(arguments: argparse.Namespace) -> None:
    from .diagnostics.landscape import connecting_plane, eigenvector_plane, random_plane, scan
    from .diagnostics.plots import plot_landscapes

    names, data = _models_and_data([arguments.model, *arguments.more])
    is_between = arguments.directions == "between"
    if is_between and len(names) != 2:
        raise ValueError(f"--directions between needs two models, got {len(names)}: {names}")
    if is_between and arguments.dimensions == 2:
        raise ValueError("--dimensions 2 is not allowed with --directions between: it is a line")
    if not arguments.span > 0:
        raise ValueError(f"--span {arguments.span} is not allowed. Allowed: above 0")
    if arguments.points < 2:
        raise ValueError(f"--points {arguments.points} is not allowed. Allowed: 2 and more")
    dimensions = arguments.dimensions or (1 if is_between else 2)
    folder = _folder(arguments)
    span, points = arguments.span, arguments.points
    low, high = (-span / 2, 1 + span / 2) if is_between else (-span, span)
    axis = [low + (high - low) * i / (points - 1) for i in range(points)]
    landscapes = []
    labels = _short_names(names)
    for number, name in enumerate(names[:1] if is_between else names):
        objective = _objective(arguments, name, data)
        if is_between:
            from .diagnostics.loading import load_model

            plane = connecting_plane(objective, load_model(names[1]))
            plane = replace(plane, labels=[f"from {labels[0]} (0) to {labels[1]} (1)"])
        elif arguments.directions == "eigenvectors":
            plane = eigenvector_plane(objective, dimensions, seed=arguments.seed)
        else:
            plane = random_plane(objective, dimensions, seed=arguments.seed)
        label = " to ".join(labels) if is_between else labels[number]
        file = folder / f"landscape_{arguments.directions}_{dimensions}d_{number + 1}.parquet"
        landscapes.append(scan(objective, plane, [axis] * dimensions, name=label, path=file))
    picture = folder / f"landscape_{arguments.directions}_{dimensions}d"
    files = plot_landscapes(landscapes, picture)
    print(f"saved in {folder}: {', '.join(f.name for f in files)} and the losses as parquet")


def _models_and_data(words: Sequence[str]) -> tuple[list[str], str]:
    """MODEL [MODEL2] [DATA]: of two words, the second is a model if its folder is one."""
    if len(words) > 3:
        raise ValueError(f"MODEL [MODEL2] [DATA] are three names at most, got {len(words)}")
    if len(words) == 3:
        return list(words[:2]), words[2]
    if len(words) == 2 and not (Path(words[1]) / "config.json").exists():
        return [words[0]], words[1]
    return list(words), "digits"


def _short_names(names: Sequence[str]) -> list[str]:
    """The last parts of the paths, more of them where they are the same."""
    parts = [Path(name).parts for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def _objective(arguments: argparse.Namespace, name: str, data: str) -> Any:
    import torch

    from .diagnostics.loading import (
        DataOptions,
        UnusableError,
        import_plugin,
        load_batches,
        load_model,
    )
    from .diagnostics.objective import Objective

    for plugin in arguments.plugin:
        import_plugin(plugin)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(name)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UnusableError(f"--device {device}: {str(error).splitlines()[0]}") from error
    options = DataOptions(
        data,
        arguments.split,
        arguments.examples,
        arguments.batch_size,
        arguments.seed,
        arguments.text_column,
        arguments.label_column,
    )
    batches = load_batches(options, model, name)
    return Objective(model, batches, params=arguments.params)


def _folder(arguments: argparse.Namespace) -> Path:
    folder = Path(arguments.output_dir or f"outputs/{arguments.command}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: Path, content: Any) -> None:
    from .options_file import replacing

    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from . import __version__

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sam_hf": __version__,
    }


def _count(text: str) -> int:
    value = _count_or_none(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a whole number from 1 up")
    return value


def _count_or_none(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a whole number from 0 up")
    return int(text)


def _fail(message: str) -> int:
    print(f"sam-hf: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""The command `sam-hf`: measure the sharpness of a saved model, draw its loss landscape."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cli_arguments import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Misuse ends in one line and exit code 2, Ctrl-C in 130."""
    arguments = build_parser().parse_args(argv)
    try:
        import torch

        from .diagnostics.inputs import UnusableError
    except ImportError as error:
        return _fail(f"{error}: pip install 'sam-hf[diagnostics]'")
    shown = warnings.showwarning
    # Each warning in one line, without that of some library's code.
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        (_sharpness if arguments.command == "sharpness" else _landscape)(arguments)
    except ImportError as error:
        return _fail(f"{error}: pip install 'sam-hf[diagnostics]'")
    except (UnusableError, ValueError) as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        why = error.strerror or str(error)
        return _fail(f"{error.filename or 'the output'} cannot be written or read: {why}")
    except torch.OutOfMemoryError as error:
        return _fail(f"--batch_size {arguments.batch_size}: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        goes_on = arguments.command == "landscape"
        how = ": the same command goes on where it was" if goes_on else ""
        print(f"\ninterrupted{how}", file=sys.stderr)
        return 130
    finally:
        warnings.showwarning = shown
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
    objective = _objective(arguments, arguments.model, arguments.data)
    folder = _folder(arguments, f"outputs/sharpness/{Path(arguments.model).name}")
    _refuse_other_model(folder / "sharpness.json", arguments)
    values: dict[str, float] = {}
    result = {
        "model": arguments.model,
        "data": arguments.data,
        "examples": objective.example_count,
        "parameters": objective.parameter_count,
        "options": {k: v for k, v in vars(arguments).items() if k not in ("command", "model")},
        "versions": _versions(),
    }
    with tqdm(desc="measures", unit="") as bar:
        for part in measures(objective, plan):
            values |= part
            result |= {"hessian_products": objective.products, "measures": values}
            _write_json(folder / "sharpness.json", result)  # an interrupt loses nothing
            bar.set_postfix_str(next(iter(part)))
            bar.update()
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value:.6g}")
    print(f"\nsaved in {folder}: sharpness.json")


def _refuse_other_model(path: Path, arguments: argparse.Namespace) -> None:
    """Folders are named by the last part of a model's name, which others may share."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(found, dict):
        return
    for key in ("model", "data"):
        before, now = found.get(key), getattr(arguments, key)
        if before != now:
            raise ValueError(
                f"{path} holds the measures of {key} {before!r}, and now it is {now!r}: choose "
                "another --output_dir, or delete it"
            )


def _landscape(arguments: argparse.Namespace) -> None:
    from .diagnostics.landscape import scan
    from .diagnostics.planes import connecting_plane, eigenvector_plane, random_plane
    from .diagnostics.plots import plot_landscapes

    names, data = _models_and_data([arguments.model, *arguments.more])
    is_between = arguments.directions == "between"
    if is_between and len(names) != 2:
        raise ValueError(f"--directions between needs two models, got {len(names)}: {names}")
    if is_between and arguments.dimensions == 2:
        raise ValueError("--dimensions 2 is not allowed with --directions between: it is a line")
    if not 0 < arguments.span < math.inf:
        raise ValueError(f"--span {arguments.span} is not allowed. Allowed: finite, above 0")
    if arguments.points < 2:
        raise ValueError(f"--points {arguments.points} is not allowed. Allowed: 2 and more")
    dimensions = arguments.dimensions or (1 if is_between else 2)
    folder = _folder(arguments, "outputs/landscape")
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
            plane = eigenvector_plane(
                objective, dimensions, iterations=arguments.iterations, seed=arguments.seed
            )
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

    from .diagnostics.inputs import DataOptions, UnusableError
    from .diagnostics.loading import import_plugin, load_batches, load_model
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
        arguments.image_column,
    )
    batches = load_batches(options, model, name)
    return Objective(model, batches, params=arguments.params)


def _folder(arguments: argparse.Namespace, usual: str) -> Path:
    folder = Path(arguments.output_dir or usual)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: Path, content: Any) -> None:
    from .options_file import replacing

    with replacing(path) as partial:
        partial.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from . import __version__

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sam_hf": __version__,
    }


def _fail(message: str) -> int:
    print(f"sam-hf: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

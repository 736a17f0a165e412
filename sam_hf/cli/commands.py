"""The subcommands of `sam-hf`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from .. import __version__
from ..config import SAMConfig
from ..config.checks import check_choice, check_number
from ..config.file import replacing
from ..diagnostics.landscape import scan
from ..diagnostics.objective import Objective
from ..diagnostics.planes import connecting_plane, eigenvector_plane, random_plane
from ..diagnostics.plots import plot_landscapes, plot_radius_curve
from ..diagnostics.radius import METHODS, check_radii, count_passes, radius_curve
from ..diagnostics.report import Plan, iter_measures
from .data import DataOptions, load_batches
from .models import default_data, import_plugin, is_saved_model, load_model
from .output import radius_table, suggestion, table


def run(arguments: argparse.Namespace) -> None:
    """Import the plugins and run the subcommand."""
    for plugin in arguments.plugin:
        import_plugin(plugin)
    commands = {"sharpness": _sharpness, "landscape": _landscape, "rho": _rho}
    commands[arguments.command](arguments)


def _sharpness(arguments: argparse.Namespace) -> None:
    plan = Plan(**_fields_of(Plan, arguments))
    arguments.data = arguments.data or default_data(arguments.model)
    objective = _objective(arguments, arguments.model)
    file, result = _result(arguments, objective)
    measures: dict[str, float] = {}
    with tqdm(desc="measures", unit="") as bar:
        for part in iter_measures(objective, plan):
            measures |= part
            result |= {"hessian_products": objective.products, "measures": measures}
            _write(result, file)  # after each measure, so that an interrupt loses none
            bar.set_postfix_str(next(iter(part)))
            bar.update()
    print(table(measures, vars(arguments), objective.example_count))
    print(f"\nsaved in {file.parent}: {file.name}")


def _rho(arguments: argparse.Namespace) -> None:
    config = _sam_config(arguments)
    arguments.data = arguments.data or default_data(arguments.model)
    objective = _objective(arguments, arguments.model)
    file, result = _result(arguments, objective)
    batches, radii = len(objective.batches), arguments.rho
    passes = count_passes(batches, radii)
    limit = f"up to {passes} forward-backward passes, each over one of {batches} batches"
    print(f"rho: {limit}", file=sys.stderr)
    with tqdm(desc="rho", total=passes, unit="pass") as bar:
        objective.on_batch = lambda work: bar.update()
        curve = radius_curve(objective, config, radii, arguments.initial_loss)
        bar.total = bar.n  # the search for the radii may take fewer
    _write(result | asdict(curve), file)
    name = Path(arguments.model).name
    title = f"{name}: {config.sam_method.upper()}, {objective.example_count} examples"
    plots = plot_radius_curve(curve, file.with_suffix(""), title=title)
    print(radius_table(curve))
    print(f"\nsaved in {file.parent}: {', '.join(f.name for f in (file, *plots))}")
    print(suggestion(curve, vars(arguments)))


def _sam_config(arguments: argparse.Namespace) -> SAMConfig:
    """The options of `sam-hf rho` that are SAM's; errors name those of the command line."""
    check_choice("--method", arguments.method, METHODS)
    check_radii("--rho", arguments.rho or ())
    if arguments.initial_loss is not None:
        check_number("--initial_loss", arguments.initial_loss)
    given = {name: getattr(arguments, name) for name in ("method", "eta", "target_sharpness")}
    options = {f"sam_{name}": value for name, value in given.items() if value is not None}
    try:
        return SAMConfig(sam_rho=None, **options)
    except ValueError as error:
        raise ValueError(str(error).replace("sam_", "--", 1)) from error


def _result(arguments: argparse.Namespace, objective: Objective) -> tuple[Path, dict[str, Any]]:
    """Path of the JSON file of a command, and what is known before measuring.

    Raises a ValueError if the file holds the measures of another model or of other data.
    """
    command = arguments.command
    folder = Path(arguments.output_dir or f"outputs/{command}/{Path(arguments.model).name}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{command}.json"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {
        "model": arguments.model,
        "data": arguments.data,
        "examples": objective.example_count,
        "parameters": objective.parameter_count,
        "options": {k: v for k, v in vars(arguments).items() if k not in ("command", "model")},
        "versions": versions | {"sam_hf": __version__},
    }
    try:
        existing = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        existing = result
    for key in ("model", "data"):  # the name of another model may end like this one's
        if existing.get(key) != result[key]:
            found = f"holds the measures of {key} {existing.get(key)!r}, not {result[key]!r}"
            raise ValueError(f"{file} {found}: choose another --output_dir, or delete it")
    return file, result


def _write(result: Any, file: Path) -> None:
    """Write JSON, with null for numbers that are not finite; the file is replaced atomically."""
    with replacing(file) as partial:
        partial.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Nested dictionaries and lists with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _landscape(arguments: argparse.Namespace) -> None:
    names, data = _models_and_data([arguments.model, *arguments.more])
    span, points, seed = arguments.span, arguments.points, arguments.seed
    is_between = arguments.directions == "between"
    if is_between and len(names) != 2:
        raise ValueError(f"--directions between needs two models, got {len(names)}: {names}")
    if is_between and arguments.dimensions == 2:
        raise ValueError("--dimensions 2 is not allowed with --directions between. Allowed: 1")
    if not 0 < span < math.inf:
        raise ValueError(f"--span {span} is not allowed. Allowed: a finite number > 0")
    dimensions = arguments.dimensions or (1 if is_between else 2)
    low, high = (-span / 2, 1 + span / 2) if is_between else (-span, span)
    arguments.data = data or default_data(names[0])
    axis = [low + (high - low) * i / (points - 1) for i in range(points)]
    folder = Path(arguments.output_dir or "outputs/landscape")
    folder.mkdir(parents=True, exist_ok=True)
    plot = folder / f"landscape_{arguments.directions}_{dimensions}d"
    landscapes = []
    labels = _short_names(names)
    for number, name in enumerate(names[:1] if is_between else names):
        objective, label = _objective(arguments, name), labels[number]
        if is_between:
            label = " to ".join(labels)
            plane = connecting_plane(objective, load_model(names[1]))
            plane = replace(plane, labels=[f"from {labels[0]} (0) to {labels[1]} (1)"])
        elif arguments.directions == "eigenvectors":
            iterations = arguments.iterations
            plane = eigenvector_plane(objective, dimensions, iterations=iterations, seed=seed)
        else:
            plane = random_plane(objective, dimensions, seed=seed)
        file = plot.with_name(f"{plot.name}_{number + 1}.parquet")
        landscapes.append(scan(objective, plane, [axis] * dimensions, name=label, path=file))
    files = plot_landscapes(landscapes, plot)
    print(f"saved in {folder}: {', '.join(f.name for f in files)} and the losses as parquet")


def _models_and_data(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Split MODEL [MODEL2] [DATA]. The second of two is a model if it is a saved model's folder."""
    if len(words) > 3:
        raise ValueError(f"expected MODEL [MODEL2] [DATA], got {len(words)} names: {list(words)}")
    has_data = len(words) == 3 or not is_saved_model(words[-1])
    return (list(words[:-1]), words[-1]) if len(words) > 1 and has_data else (list(words), None)


def _short_names(names: Sequence[str]) -> list[str]:
    """Shortest trailing parts of the paths that distinguish them."""
    parts = [Path(name).parts for name in names]
    lengths = range(1, max(map(len, parts)) + 1)
    candidates = (["/".join(part[-length:]) for part in parts] for length in lengths)
    return next((short for short in candidates if len(set(short)) == len(short)), list(names))


def _objective(arguments: argparse.Namespace, name: str) -> Objective:
    """Objective of the named model, with the data and the device of the arguments."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = DataOptions(**_fields_of(DataOptions, arguments))
    model = load_model(name)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return Objective(model, load_batches(options, model), params=arguments.params)


def _fields_of(dataclass: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are fields of a dataclass."""
    return {f.name: getattr(arguments, f.name) for f in fields(dataclass) if f.name in arguments}

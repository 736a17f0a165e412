"""Loss landscapes: the loss on lines and planes through the weights, and its file."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..config.file import replacing
from ..distributed.processes import from_main_process, is_main_process
from .evaluation import deterministic_evaluation
from .objective import Objective
from .planes import Plane

_SECONDS_BETWEEN_WRITES = 5.0
_METADATA_KEY = b"sam_hf.landscape"
# Facts that must match between a file and a scan that resumes from it.
_IDENTITY = ("weights_and_data", "directions", "seed", "iterations", "second_model", "params")


@dataclass
class Landscape:
    """Losses on a one- or two-dimensional grid of perturbations of the weights.

    Args:
        name: name of the model.
        labels: axis labels, one for each axis.
        coordinates: coordinates along each axis, ascending.
        losses: float64 tensor with one dimension for each axis; NaN where not yet computed.
        facts: metadata: the loss at the weights, the number of examples, how the directions were
            computed, and a fingerprint of weights and data.
    """

    name: str
    labels: list[str]
    coordinates: list[list[float]]
    losses: Tensor
    facts: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether the loss at every grid point has been computed."""
        return not bool(self.losses.isnan().any())

    def at(self, point: Sequence[int]) -> list[float]:
        """Coordinates of the grid point with the given index along each axis."""
        return [axis[i] for axis, i in zip(self.coordinates, point, strict=True)]


def scan(
    objective: Objective,
    plane: Plane,
    coordinates: Sequence[Sequence[float]],
    *,
    name: str = "model",
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Landscape:
    r"""Compute the loss :math:`L(w + \sum_i a_i d_i)` for all coordinates a of a grid.

    Losses that are NaN become infinity. Cost: one forward pass for each point.

    Args:
        plane: the directions :math:`d_i`, along one or two axes.
        coordinates: the values of :math:`a_i` along each axis, ascending.
        name: name of the model in the file and in plots.
        path: a parquet file that is updated during the scan (see `write_landscape`). If it holds
            a landscape of the same weights, data, directions and grid, the scan resumes from it.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: `coordinates` do not ascend or do not fit the plane, or the file does not match.
    """
    axes = [[float(a) for a in axis] for axis in coordinates]
    if len(axes) != len(plane.directions) or len(axes) > 2:
        allowed = f"as many as the plane, {len(plane.directions)}, and at most 2"
        raise ValueError(f"coordinates has {len(axes)} axes. Allowed: {allowed}")
    for axis in axes:
        if not axis or axis != sorted(set(axis)):
            raise ValueError(f"coordinates {axis} are not allowed. Allowed: ascending numbers")
    facts = plane.facts | {
        "weights_and_data": objective.fingerprint(),
        "params": objective.params,
        "examples": objective.example_count,
        "loss_at_weights": objective.value(),
    }
    losses = torch.full([len(axis) for axis in axes], math.nan, dtype=torch.float64)
    landscape = Landscape(name, plane.labels, axes, losses, facts)
    if path is not None:
        _resume(objective, plane, landscape, Path(path))
    points = [tuple(i) for i in losses.isnan().nonzero().tolist()]
    title, total, is_main = f"landscape of {name}", losses.numel(), is_main_process()
    known, hidden = total - len(points), not (progress and is_main)
    bar = tqdm(points, title, total=total, initial=known, unit="point", disable=hidden)
    target = Path(path) if path is not None and is_main else None
    last_write = time.monotonic()
    try:
        for point in bar:
            losses[point] = _loss_at(objective, plane, landscape.at(point))
            if target is not None and time.monotonic() - last_write > _SECONDS_BETWEEN_WRITES:
                write_landscape(landscape, target)
                last_write = time.monotonic()
    finally:  # also on an interrupt, so that the scan can be resumed
        if target is not None:
            write_landscape(landscape, target)
    return landscape


def _loss_at(objective: Objective, plane: Plane, coordinates: Sequence[float]) -> float:
    offset = [torch.zeros_like(w) for w in objective.weights]
    for a, direction in zip(coordinates, plane.directions, strict=True):
        torch._foreach_add_(offset, direction, alpha=a)
    model, device = objective.model, objective.weights[0].device
    with deterministic_evaluation(model, device), objective.perturbed(offset):  # restores buffers
        for name, change in plane.buffers.items():
            # Without extrapolation, which could make a running variance negative.
            model.get_buffer(name).add_(min(max(coordinates[0], 0.0), 1.0) * change)
        loss = objective.value()
    return math.inf if math.isnan(loss) else loss


def write_landscape(landscape: Landscape, path: Path) -> None:
    """Write a landscape to a parquet file, which is replaced atomically.

    Columns: "a" and, in two dimensions, "b" (coordinates), and "loss". Name, labels and facts are
    stored as JSON in the schema metadata.
    """
    import pyarrow
    from pyarrow import parquet

    axes = [torch.tensor(axis, dtype=torch.float64) for axis in landscape.coordinates]
    grids = torch.meshgrid(axes, indexing="ij")
    columns = {name: grid.flatten().numpy() for name, grid in zip("ab", grids, strict=False)}
    columns["loss"] = landscape.losses.flatten().numpy()
    metadata = {"name": landscape.name, "labels": landscape.labels, "facts": landscape.facts}
    table = pyarrow.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        parquet.write_table(table, partial)


def read_landscape(path: Path) -> Landscape:
    """Read a landscape from a parquet file that `write_landscape` or `scan` wrote.

    Raises:
        ValueError: the file is not a landscape.
    """
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
        metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is not a landscape file: {error}") from error
    axes = [axis for axis in "ab" if axis in table.column_names]
    coordinates = [sorted(set(table[axis].to_pylist())) for axis in axes]
    losses = torch.tensor(table["loss"].to_pylist(), dtype=torch.float64)
    losses = losses.reshape([len(c) for c in coordinates])
    return Landscape(metadata["name"], metadata["labels"], coordinates, losses, metadata["facts"])


def _resume(objective: Objective, plane: Plane, landscape: Landscape, path: Path) -> None:
    """Copy the losses of an earlier scan of the same landscape from its file, if there is one.

    Rank 0 reads the file, which other processes may not see. All processes raise together.
    """
    losses, problem = landscape.losses, ""
    if is_main_process() and path.exists():
        try:
            found = read_landscape(path)
            losses, ours, theirs = found.losses, landscape.facts, found.facts
            loss = theirs.get("loss_at_weights", math.nan)
            if (
                found.coordinates != landscape.coordinates
                or any(ours.get(key) != theirs.get(key) for key in _IDENTITY)
                or not math.isclose(ours["loss_at_weights"], loss, rel_tol=1e-3, abs_tol=1e-9)
            ):
                problem = f"{path} holds a landscape of other weights, data, directions or points"
        except ValueError as error:
            problem = str(error)
    losses, problem = from_main_process((losses, problem), objective.weights[0].device)
    known = [tuple(i) for i in (~losses.isnan()).nonzero().tolist()]
    if known and not problem:
        # The Lanczos method may converge to other eigenvectors on another device or with another
        # version of PyTorch: the known loss farthest from the origin is recomputed.
        farthest = max(known, key=lambda point: sum(a * a for a in landscape.at(point)))
        coordinates, stored = landscape.at(farthest), float(losses[farthest])
        computed = _loss_at(objective, plane, coordinates)
        if not math.isclose(stored, computed, rel_tol=1e-2, abs_tol=1e-6):
            change = f"the stored loss is {stored:.6g}, and the recomputed one {computed:.6g}"
            problem = f"{path} was computed along other directions: at {coordinates} {change}"
    if problem:
        raise ValueError(f"{problem}: choose another folder, or delete it")
    landscape.losses.copy_(losses)

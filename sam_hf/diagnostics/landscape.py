"""The loss on lines and planes through the weights."""

from __future__ import annotations

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

from ..backends.processes import from_main_process_, is_main_process
from ..options_file import replacing
from .objective import Objective
from .planes import Plane

_SECONDS_BETWEEN_WRITES = 5.0


@dataclass
class Landscape:
    """Losses on a grid.

    Args:
        name: of the model.
        labels: of the axes.
        coordinates: along each axis.
        losses: indexed as the coordinates; NaN where nothing was computed yet.
        facts: the loss at w, how the directions were made, what it was computed from.
    """

    name: str
    labels: list[str]
    coordinates: list[list[float]]
    losses: Tensor
    facts: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        return not bool(self.losses.isnan().any())


def scan(
    objective: Objective,
    plane: Plane,
    coordinates: Sequence[Sequence[float]],
    *,
    name: str = "model",
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Landscape:
    """The loss at w + Σ a_i d_i for all a of a grid.

    Args:
        plane: the directions d_i, along one or two axes.
        coordinates: a_i along each axis.
        name: of the model, in the file and in pictures.
        path: a parquet file that is written as the scan goes on (a column for each coordinate, and
            `loss`). If it is there already, and is of the same model, data and grid, what it holds
            is not computed again.
        progress: show a bar.

    Returns:
        Losses that overflow are infinite.

    Raises:
        ValueError: the numbers of axes differ, or the file is of something else.
    """
    axes = [[float(a) for a in axis] for axis in coordinates]
    file = None if path is None else Path(path)
    if len(axes) not in (1, 2):
        raise ValueError(f"coordinates has {len(axes)} axes. Allowed: 1 and 2")
    if len(axes) != len(plane.directions):
        raise ValueError(f"coordinates has {len(axes)} axes, and the plane {len(plane.directions)}")
    for axis in axes:
        if not axis or axis != sorted(set(axis)):
            raise ValueError(f"coordinates {axis} are not allowed. Allowed: rising numbers")
    facts = plane.facts | {"weights_and_data": objective.fingerprint()}
    facts["params"] = objective.params
    facts |= {"examples": objective.example_count, "loss_at_weights": objective.value()}
    losses = torch.full([len(axis) for axis in axes], math.nan, dtype=torch.float64)
    landscape = Landscape(name, plane.labels, axes, losses, facts)
    if file is not None:
        _take_over(landscape, file, objective.weights[0].device)
        _refuse_other_directions(objective, plane, landscape, file)
    points = [tuple(i) for i in losses.isnan().nonzero().tolist()]
    bar = tqdm(
        total=losses.numel(),
        initial=losses.numel() - len(points),
        desc=f"landscape of {name}",
        unit="point",
        disable=not (progress and is_main_process()),
    )

    def write() -> None:
        if file is not None and is_main_process():
            write_landscape(landscape, file)

    written = time.monotonic()
    try:
        for point in points:
            at = [axis[i] for axis, i in zip(landscape.coordinates, point, strict=True)]
            losses[point] = _loss_at(objective, plane, at)
            bar.update()
            if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                write()
                written = time.monotonic()
    finally:  # an interrupted scan goes on where it was
        bar.close()
        write()
    return landscape


def _loss_at(objective: Objective, plane: Plane, at: Sequence[float]) -> float:
    offset = [torch.zeros_like(w) for w in objective.weights]
    for a, direction in zip(at, plane.directions, strict=True):
        torch._foreach_add_(offset, direction, alpha=a)
    buffers = dict(objective.model.named_buffers())
    saved = {name: buffers[name].clone() for name in plane.buffers}
    try:
        with objective.moved(offset):
            for name, change in plane.buffers.items():
                # Not beyond the two models: a running variance would become negative.
                buffers[name].copy_(saved[name] + min(max(at[0], 0.0), 1.0) * change)
            loss = objective.value()
    finally:
        for name, value in saved.items():
            buffers[name].copy_(value)
    return math.inf if math.isnan(loss) else loss


# ------------------------------------------------------------------------------------- the file

_KEY = b"sam_hf.landscape"


def write_landscape(landscape: Landscape, path: Path) -> None:
    """Write a parquet file: a column for each coordinate and `loss`; the rest in its metadata."""
    import pyarrow
    from pyarrow import parquet

    grids = torch.meshgrid(
        *(torch.tensor(c, dtype=torch.float64) for c in landscape.coordinates), indexing="ij"
    )
    columns = {name: grid.flatten().numpy() for name, grid in zip("ab", grids, strict=False)}
    columns["loss"] = landscape.losses.flatten().numpy()
    facts = {"name": landscape.name, "labels": landscape.labels, "facts": landscape.facts}
    table = pyarrow.table(columns).replace_schema_metadata({_KEY: json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        parquet.write_table(table, partial)


def read_landscape(path: Path) -> Landscape:
    """Read what `write_landscape` wrote.

    Raises:
        ValueError: the file is something else.
    """
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
        known = json.loads((table.schema.metadata or {})[_KEY])
    except (ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is no landscape: {error}") from error
    coordinates = [
        sorted(set(table[axis].to_pylist())) for axis in "ab" if axis in table.column_names
    ]
    losses = torch.tensor(table["loss"].to_pylist(), dtype=torch.float64)
    shaped = losses.reshape([len(c) for c in coordinates])
    return Landscape(known["name"], known["labels"], coordinates, shaped, known["facts"])


_SAME = ("weights_and_data", "directions", "seed", "iterations", "second_model", "params")


def _take_over(landscape: Landscape, path: Path, device: torch.device) -> None:
    """Take what the file of an earlier scan holds, if there is one and it is of the same thing.

    The first process reads it, since the others may not see its disk, and all raise together.
    """
    trouble = ""
    if is_main_process() and path.exists():
        try:
            found = read_landscape(path)
        except ValueError as error:
            trouble = str(error)
        else:
            if _is_same(landscape, found):
                landscape.losses.copy_(found.losses)
            else:
                trouble = f"{path} holds a landscape of other weights, data, directions or points"
    is_refused = torch.tensor(bool(trouble))
    from_main_process_(is_refused, device)
    if is_refused:
        raise ValueError(
            f"{trouble or f'{path} cannot be gone on with'}: choose another folder, or delete it"
        )
    from_main_process_(landscape.losses, device)


def _refuse_other_directions(
    objective: Objective, plane: Plane, landscape: Landscape, path: Path
) -> None:
    """Compute again the farthest point that the file holds.

    Eigenvectors converge differently on another device or with another version of torch.
    """
    known = [tuple(i) for i in (~landscape.losses.isnan()).nonzero().tolist()]
    if not known:
        return

    def place(point: tuple[int, ...]) -> list[float]:
        return [axis[i] for axis, i in zip(landscape.coordinates, point, strict=True)]

    farthest = max(known, key=lambda point: sum(a * a for a in place(point)))
    before, now = float(landscape.losses[farthest]), _loss_at(objective, plane, place(farthest))
    if not math.isclose(before, now, rel_tol=1e-2, abs_tol=1e-6):
        raise ValueError(
            f"{path} was made along other directions: at {place(farthest)} its loss is "
            f"{before:.6g}, and now it is {now:.6g}: choose another folder, or delete it"
        )


def _is_same(ours: Landscape, theirs: Landscape) -> bool:
    at_w = theirs.facts.get("loss_at_weights", math.nan)  # another loss has another value there
    return (
        ours.coordinates == theirs.coordinates
        and all(ours.facts.get(key) == theirs.facts.get(key) for key in _SAME)
        and math.isclose(ours.facts["loss_at_weights"], at_w, rel_tol=1e-3, abs_tol=1e-9)
    )

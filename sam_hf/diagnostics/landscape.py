"""The loss on lines and planes through the weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backends.processes import is_main_process, unwrap
from ..options_file import replacing
from .hessian import top_eigenpairs
from .objective import Objective
from .vectors import norm

DIRECTIONS = ("random", "eigenvectors")
_SECONDS_BETWEEN_WRITES = 5.0


@dataclass(frozen=True)
class Plane:
    """One or two directions in the space of the weights, and how far to go along them.

    Args:
        directions: each has one tensor for each of the objective's `names`.
        labels: what stands at the axes.
        buffers: changes of the model's buffers along the first direction, by name.
        facts: what else is known of the directions, for the file.
    """

    directions: list[list[Tensor]]
    labels: list[str]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def random_plane(objective: Objective, dimensions: int = 2, *, seed: int = 0) -> Plane:
    r"""Gaussian directions, each filter as long as the weights' own.

    .. math:: d_{i} \leftarrow d_{i} \, \|w_{i}\| / \|d_{i}\|

    for each filter i: what a matrix or a convolution makes one output of, a row of an embedding.
    Tensors with fewer than two dimensions (biases, norms) stay. Li, Xu, Taylor, Studer, Goldstein,
    "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, https://arxiv.org/abs/1712.09913,
    section 4.

    Since a network's function often does not change when its filters are rescaled, only so are
    pictures of two networks comparable. One unit is as far as the weights are long.

    Args:
        seed: the same one gives two models of one architecture the same directions, up to the
            lengths of their filters.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for _ in range(dimensions):
        direction = objective.random_vector(generator)
        for d, w in zip(direction, objective.weights, strict=True):
            if d.ndim < 2:
                d.zero_()
                continue
            rows, own = d.flatten(1), w.detach().flatten(1)
            lengths = rows.norm(dim=1, keepdim=True)
            rows.mul_(own.norm(dim=1, keepdim=True) / lengths.clamp_min(1e-30))
        directions.append(direction)
    labels = ["random direction, filter-normalised", "another random direction"][:dimensions]
    return Plane(directions, labels, facts={"directions": "random", "seed": seed})


def eigenvector_plane(
    objective: Objective, dimensions: int = 2, *, iterations: int = 40, seed: int = 0
) -> Plane:
    """The eigenvectors of the Hessian's largest eigenvalues, of length 1: the sharpest directions.

    One unit is a Euclidean distance of 1 in the space of the weights.
    """
    pairs = top_eigenpairs(objective, dimensions, iterations=iterations, seed=seed)
    if len(pairs.values) < dimensions:
        raise ValueError(
            f"dimensions={dimensions} is not allowed: the Hessian has {len(pairs.values)} "
            "different eigenvalues. Allowed: no more"
        )
    labels = [f"eigenvector of λ = {value:.3g}" for value in pairs.values]
    facts = {"directions": "eigenvectors", "seed": seed, "eigenvalues": pairs.values}
    facts["residuals"] = pairs.residuals
    return Plane(pairs.vectors, labels, facts=facts)


def connecting_plane(objective: Objective, other: nn.Module) -> Plane:
    """The line from a model (at 0) to another one of the same architecture (at 1).

    Buffers with fractions, such as running statistics, move along with the weights. Those of
    BatchNorm are not those of the weights in between: there the loss is higher than it need be.

    Raises:
        ValueError: the other model has other weights.
    """
    theirs = unwrap(other).state_dict()
    ours = objective.model.state_dict()
    shapes = {name: tuple(x.shape) for name, x in ours.items()}
    if shapes != {name: tuple(x.shape) for name, x in theirs.items()}:
        differing = sorted(
            {n for n in {*ours, *theirs} if n not in theirs or n not in ours}
            | {n for n in ours if n in theirs and shapes[n] != tuple(theirs[n].shape)}
        )
        raise ValueError(
            f"no line joins {type(objective.model).__name__} and {type(other).__name__}: they "
            f"differ in {', '.join(differing[:3])}. Allowed: two checkpoints of one architecture"
        )
    theirs = {name: x.to(ours[name].device) for name, x in theirs.items()}
    by_name = dict(unwrap(other).named_parameters())
    own_names = {id(p): name for name, p in objective.model.named_parameters()}
    with torch.no_grad():
        direction = [by_name[own_names[id(w)]].to(w.device, w.dtype) - w for w in objective.weights]
        moved = {
            name: theirs[name].to(x.dtype) - x
            for name, x in objective.model.named_buffers()
            if name in theirs and x.is_floating_point() and not torch.equal(x, theirs[name])
        }
    facts = {"directions": "between two models", "distance": norm(direction)}
    return Plane([direction], ["from the first model (0) to the second (1)"], moved, facts)


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
    path: Path | None = None,
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
    if path is not None and path.exists():
        _take_over(landscape, read_landscape(path), path)
    points = [tuple(i) for i in losses.isnan().nonzero().tolist()]
    bar = tqdm(
        total=losses.numel(),
        initial=losses.numel() - len(points),
        desc=f"landscape of {name}",
        unit="point",
        disable=not (progress and is_main_process()),
    )

    def write() -> None:
        if path is not None and is_main_process():
            write_landscape(landscape, path)

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
                buffers[name].copy_(saved[name] + at[0] * change)
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


def _take_over(landscape: Landscape, found: Landscape, path: Path) -> None:
    """Take what the file holds, if it is of the same thing."""
    is_same = landscape.coordinates == found.coordinates and all(
        landscape.facts.get(key) == found.facts.get(key)
        for key in ("weights_and_data", "directions", "seed", "params")
    )
    if not is_same:
        raise ValueError(
            f"{path} holds a landscape of other weights, data, directions or points: choose "
            "another folder, or delete it"
        )
    landscape.losses.copy_(found.losses)

"""The loss on lines and planes through the weights."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from tqdm.auto import tqdm

from ..backends.processes import from_main_process_, is_main_process, unwrap
from ..options_file import replacing
from .batches import add_to_hash
from .hessian import top_eigenpairs
from .objective import Objective
from .vectors import norm

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
    outputs = _output_dimensions(objective.model)
    directions = []
    for _ in range(dimensions):
        direction = objective.random_vector(generator)
        for d, w in zip(direction, objective.weights, strict=True):
            if d.ndim < 2:
                d.zero_()
                continue
            others = [i for i in range(d.ndim) if i != outputs.get(id(w), 0)]
            own, drawn = (vector_norm(x, dim=others, keepdim=True) for x in (w.detach(), d))
            d.mul_(own / drawn.clamp_min(1e-30))
        directions.append(direction)
    labels = ["random direction, filter-normalised", "another random direction"][:dimensions]
    return Plane(directions, labels, facts={"directions": "random", "seed": seed})


def _output_dimensions(model: nn.Module) -> dict[int, int]:
    """The dimension that counts the filters, where it is not the first one, by the weight's id."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {
        id(module.weight): 1
        for module in model.modules()
        if isinstance(module, transposed) or type(module).__name__ == "Conv1D"  # of GPT-2
    }


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
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        if residual > 0.1 * abs(value):
            warnings.warn(
                f"the eigenvalue {value:.3g} is known to ±{residual:.2g}, and its vector less "
                f"well: iterations={iterations} are too few",
                stacklevel=2,
            )
    labels = [f"eigenvector of λ = {value:.3g}" for value in pairs.values]
    facts = {"directions": "eigenvectors", "seed": seed, "iterations": iterations}
    facts |= {"eigenvalues": pairs.values, "residuals": pairs.residuals}
    return Plane(pairs.vectors, labels, facts=facts)


def connecting_plane(objective: Objective, other: nn.Module) -> Plane:
    """The line from a model (at 0) to another one of the same architecture (at 1).

    Buffers with fractions, such as running statistics, move along with the weights. Those of
    BatchNorm are not those of the weights in between: there the loss is higher than it need be.

    Raises:
        ValueError: the other model has weights of other shapes, or differs in weights that the
            objective does not move.
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
    moved_names = {own_names[id(w)] for w in objective.weights}
    for name, parameter in objective.model.named_parameters():
        if name not in moved_names and not torch.equal(parameter, theirs[name]):
            raise ValueError(
                f"the line would not end at the second model: {name} differs, and "
                f"params={objective.params!r} leaves it where it is. Allowed: 'all', with no "
                "frozen weights that differ"
            )
    digest = hashlib.sha256()
    add_to_hash(digest, theirs)
    with torch.no_grad():
        direction = [by_name[own_names[id(w)]].to(w.device, w.dtype) - w for w in objective.weights]
        moved = {
            name: theirs[name].to(x.dtype) - x
            for name, x in objective.model.named_buffers()
            if name in theirs and x.is_floating_point() and not torch.equal(x, theirs[name])
        }
    facts = {"directions": "between two models", "distance": norm(direction)}
    facts["second_model"] = digest.hexdigest()[:16]
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
    if path is not None:
        _take_over(landscape, path)
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


_SAME = ("weights_and_data", "directions", "seed", "iterations", "second_model", "params")


def _take_over(landscape: Landscape, path: Path) -> None:
    """Take what the file of an earlier scan holds, if there is one and it is of the same thing.

    The first process reads it: the others may not see its disk.
    """
    state = torch.zeros((), dtype=torch.long)  # 0: nothing there, 1: taken, 2: of something else
    if is_main_process() and path.exists():
        found = read_landscape(path)
        ours, theirs = landscape.facts, found.facts
        is_same = landscape.coordinates == found.coordinates and all(
            ours.get(key) == theirs.get(key) for key in _SAME
        )
        at_w = theirs.get("loss_at_weights", math.nan)  # another loss has another value there
        is_same &= math.isclose(ours["loss_at_weights"], at_w, rel_tol=1e-3, abs_tol=1e-9)
        state.fill_(1 if is_same else 2)
        if is_same:
            landscape.losses.copy_(found.losses)
    from_main_process_(state)
    if int(state) == 2:
        raise ValueError(
            f"{path} holds a landscape of other weights, data, directions or points: choose "
            "another folder, or delete it"
        )
    from_main_process_(landscape.losses)

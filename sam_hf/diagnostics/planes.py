"""Directions in the space of the weights: random ones, the sharpest ones, and to another model."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from ..backends.processes import unwrap
from .batches import add_to_hash
from .hessian import top_eigenpairs
from .objective import Objective
from .vectors import norm


@dataclass(frozen=True)
class Plane:
    """One or two directions in the space of the weights, and how far to go along them.

    Args:
        directions: each has one tensor for each of the objective's `names`.
        labels: what stands at the axes.
        buffers: changes of the model's buffers from 0 to 1 on the first direction, by name.
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
        dimensions: 1 or 2.
        seed: the same one gives two models of one architecture the same directions, up to the
            lengths of their filters.

    Raises:
        ValueError: `dimensions` is neither, or no weight of the objective has filters.
    """
    _check_dimensions(dimensions)
    if all(w.ndim < 2 for w in objective.weights):
        raise ValueError(
            f"params={objective.params!r} selects no weight of two dimensions or more, and random "
            "directions move those alone. Allowed: eigenvectors, or other params"
        )
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


def _check_dimensions(dimensions: int) -> None:
    if dimensions not in (1, 2):
        raise ValueError(f"dimensions={dimensions!r} is not allowed. Allowed: 1 and 2")


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

    One unit is a Euclidean distance of 1 in the space of the weights. Of v and -v, both of which
    are eigenvectors, it is the one whose largest component is positive.
    """
    _check_dimensions(dimensions)
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
    for vector in pairs.vectors:
        parts = torch.stack([v.flatten()[v.abs().argmax()] for v in vector])
        torch._foreach_mul_(vector, float(parts[parts.abs().argmax()].sign()))
    labels = [f"eigenvector of λ = {value:.3g}" for value in pairs.values]
    facts = {"directions": "eigenvectors", "seed": seed, "iterations": iterations}
    facts |= {"eigenvalues": pairs.values, "residuals": pairs.residuals}
    return Plane(pairs.vectors, labels, facts=facts)


def connecting_plane(objective: Objective, other: nn.Module) -> Plane:
    """The line from a model (at 0) to another one of the same architecture (at 1).

    Buffers with fractions, such as running statistics, move along with the weights from 0 to 1 and
    stay beyond, where variances would become negative. Those of BatchNorm are not those of the
    weights in between: there the loss is higher than it need be.

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
    own_names = {id(p): name for name, p in objective.model.named_parameters()}
    moved_names = {own_names[id(w)] for w in objective.weights}
    for name, parameter in objective.model.named_parameters(remove_duplicate=False):
        shared = own_names[id(parameter)]  # where the weight is tied, the first of its names
        if shared not in moved_names and not torch.equal(parameter, theirs[name]):
            raise ValueError(
                f"the line would not end at the second model: {name} differs, and "
                f"params={objective.params!r} leaves it where it is. Allowed: 'all', with no "
                "frozen weights that differ"
            )
        if name != shared and not torch.equal(theirs[name], theirs[shared]):
            raise ValueError(
                f"the line would not end at the second model: {name} is tied to {shared} in the "
                "first one, and differs from it in the second. Allowed: begin at the second"
            )
    digest = hashlib.sha256()
    add_to_hash(digest, theirs)
    with torch.no_grad():
        direction = [theirs[own_names[id(w)]].to(w.dtype) - w for w in objective.weights]
        moved = {
            name: theirs[name].to(x.dtype) - x
            for name, x in objective.model.named_buffers()
            if name in theirs and x.is_floating_point() and not torch.equal(x, theirs[name])
        }
    facts = {"directions": "between two models", "distance": norm(direction)}
    facts["second_model"] = digest.hexdigest()[:16]
    return Plane([direction], ["from the first model (0) to the second (1)"], moved, facts)

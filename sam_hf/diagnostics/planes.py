"""Directions in weight space: random, Hessian eigenvectors, and from one model to another."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from transformers.pytorch_utils import Conv1D

from ..distributed.processes import unwrap
from .hessian import top_eigenpairs
from .numerics import norm
from .objective import Objective, content_hash


@dataclass(frozen=True)
class Plane:
    """One or two directions in weight space along which a loss landscape is scanned.

    Args:
        directions: each with one tensor for each of the objective's `names`.
        labels: axis labels, one for each direction.
        buffers: changes of floating-point buffers from coordinate 0 to 1 of the first direction,
            by buffer name.
        facts: metadata of the directions, stored in the landscape's file.
    """

    directions: list[list[Tensor]]
    labels: list[str]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def random_plane(objective: Objective, dimensions: int = 2, *, seed: int = 0) -> Plane:
    r"""Random Gaussian directions with filter normalisation.

    .. math:: d_{i} \leftarrow d_{i} \, \|w_{i}\| / \|d_{i}\|

    for each filter i: the weights of one output of a matrix or a convolution, or a row of an
    embedding (Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018,
    https://arxiv.org/abs/1712.09913, section 4). Tensors with fewer than two dimensions (biases,
    norms) are not moved. Coordinate 1 is a perturbation as long as the weights.

    Raises:
        ValueError: `dimensions` is not 1 or 2, or no weight of the objective has two dimensions.
    """
    _check_dimensions(dimensions)
    if all(w.ndim < 2 for w in objective.weights):
        raise ValueError(
            f"params={objective.params!r} selects no weight with two or more dimensions, and no "
            "other is moved by random directions. Allowed: eigenvectors, or other params"
        )
    generator = torch.Generator().manual_seed(seed)
    # Weights whose filters are along dimension 1, not dimension 0.
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, Conv1D)
    swapped = {id(m.weight) for m in objective.model.modules() if isinstance(m, transposed)}
    directions = [objective.random_vector(generator) for _ in range(dimensions)]
    for direction in directions:
        for d, w in zip(direction, objective.weights, strict=True):
            if d.ndim < 2:
                d.zero_()
                continue
            others = [i for i in range(d.ndim) if i != int(id(w) in swapped)]
            target, actual = (vector_norm(x, dim=others, keepdim=True) for x in (w.detach(), d))
            d.mul_(target / actual.clamp_min(1e-30))
    labels = ["random direction, filter-normalised", "another random direction"][:dimensions]
    return Plane(directions, labels, facts={"directions": "random", "seed": seed})


def _check_dimensions(dimensions: int) -> None:
    if dimensions not in (1, 2):
        raise ValueError(f"dimensions={dimensions!r} is not allowed. Allowed: 1 and 2")


def eigenvector_plane(
    objective: Objective, dimensions: int = 2, *, iterations: int = 40, seed: int = 0
) -> Plane:
    """Unit eigenvectors of the largest eigenvalues of the Hessian: the sharpest directions.

    Coordinate 1 is a Euclidean distance of 1 in weight space. The sign of each eigenvector is such
    that its largest component is positive. For `iterations` and `seed`, see `top_eigenpairs`.

    Raises:
        ValueError: `dimensions` is not 1 or 2, or the Hessian has fewer distinct eigenvalues.
    """
    _check_dimensions(dimensions)
    pairs = top_eigenpairs(objective, dimensions, iterations=iterations, seed=seed)
    if len(pairs.values) < dimensions:
        found = f"the Hessian has {len(pairs.values)} distinct eigenvalues"
        problem = f"dimensions={dimensions} is not allowed: {found}"
        raise ValueError(f"{problem}. Allowed: at most that many dimensions")
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        if residual > 0.1 * abs(value):
            found = f"the eigenvalue {value:.3g} has converged only to ±{residual:.2g}"
            reason = f"iterations={iterations} are too few"
            warnings.warn(f"{found}, and its eigenvector less: {reason}", stacklevel=2)
    for vector in pairs.vectors:
        extremes = torch.stack([v.flatten()[v.abs().argmax()] for v in vector])
        torch._foreach_mul_(vector, float(extremes[extremes.abs().argmax()].sign()))
    labels = [f"eigenvector of λ = {value:.3g}" for value in pairs.values]
    facts = {"directions": "eigenvectors", "seed": seed, "iterations": iterations}
    facts |= {"eigenvalues": pairs.values, "residuals": pairs.residuals}
    return Plane(pairs.vectors, labels, facts=facts)


def connecting_plane(objective: Objective, other: nn.Module) -> Plane:
    """The line from the objective's model (coordinate 0) to `other` (coordinate 1).

    Linear interpolation (Goodfellow, Vinyals, Saxe, ICLR 2015, https://arxiv.org/abs/1412.6544).
    Floating-point buffers, such as running statistics, are interpolated between 0 and 1 and kept
    constant outside, where variances could become negative. Interpolated BatchNorm statistics are
    not those of the interpolated weights: the loss between the models is overestimated.

    Raises:
        ValueError: the models differ in the shapes of their weights, or in weights that are frozen
            or not selected by `params`.
    """
    ours, theirs = objective.model.state_dict(), unwrap(other).state_dict()
    shapes, their_shapes = ({(n, x.shape) for n, x in s.items()} for s in (ours, theirs))
    if differing := sorted({name for name, _ in shapes ^ their_shapes}):
        raise ValueError(
            f"{type(objective.model).__name__} and {type(other).__name__} cannot be interpolated: "
            f"they differ in {', '.join(differing[:3])}. Allowed: models of one architecture"
        )
    theirs = {name: x.to(ours[name].device) for name, x in theirs.items()}
    moved = {id(w) for w in objective.weights}
    ends: dict[int, tuple[str, Tensor]] = {}  # first name of each weight, and its value at 1
    for name, parameter in objective.model.named_parameters(remove_duplicate=False):
        end = theirs[name] if id(parameter) in moved else parameter
        first, end = ends.setdefault(id(parameter), (name, end))
        if not torch.equal(end, theirs[name]):
            reason = f"differs, but it is frozen or not selected by params={objective.params!r}"
            remedy = "'all', with equal frozen weights"
            if name != first:
                reason = f"is tied to {first} in the first model, but not in the second"
                remedy = "swap the two models"
            problem = f"the line would not end at the second model: {name} {reason}"
            raise ValueError(f"{problem}. Allowed: {remedy}")
    with torch.no_grad():
        direction = [ends[id(w)][1].to(w.dtype) - w for w in objective.weights]
        buffers = {
            name: theirs[name].to(x.dtype) - x
            for name, x in objective.model.named_buffers()
            if name in theirs and x.is_floating_point() and not torch.equal(x, theirs[name])
        }
    facts = {"directions": "between two models", "distance": norm(direction)}
    facts["second_model"] = content_hash(theirs)[:16]
    return Plane([direction], ["from the first model (0) to the second (1)"], buffers, facts)

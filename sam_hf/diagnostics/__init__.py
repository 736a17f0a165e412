"""How sharp a minimum is: measures of the loss around the weights, and pictures of it.

    from sam_hf.diagnostics import Objective, measure

    objective = Objective(model, dataloader)
    measure(objective)  # {"loss": ..., "worst_sharpness": ..., "hessian_eigenvalue": ..., ...}

Everything is a function of an `Objective`: a model and fixed examples. No Trainer is needed; with
one, `SharpnessCallback` measures while it trains.
"""

from __future__ import annotations

from .callback import SharpnessCallback
from .estimates import Estimate
from .gradients import GradientNoise, gradient_noise, perturbation_budget
from .hessian import Eigenpairs, hessian_trace, top_eigenpairs
from .landscape import Landscape, read_landscape, scan, write_landscape
from .objective import Objective
from .planes import Plane, connecting_plane, eigenvector_plane, random_plane
from .plots import plot_history, plot_landscapes
from .report import Plan, measure
from .sharpness import Ball, average_sharpness, worst_sharpness

__all__ = [
    "Ball",
    "Eigenpairs",
    "Estimate",
    "GradientNoise",
    "Landscape",
    "Objective",
    "Plan",
    "Plane",
    "SharpnessCallback",
    "average_sharpness",
    "connecting_plane",
    "eigenvector_plane",
    "gradient_noise",
    "hessian_trace",
    "measure",
    "perturbation_budget",
    "plot_history",
    "plot_landscapes",
    "random_plane",
    "read_landscape",
    "scan",
    "top_eigenpairs",
    "worst_sharpness",
    "write_landscape",
]

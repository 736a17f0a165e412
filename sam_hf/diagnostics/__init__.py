"""Sharpness measures of a trained model, and plots of its loss landscape.

    from sam_hf.diagnostics import Objective, measure

    objective = Objective(model, dataloader)
    measure(objective)  # {"loss": ..., "worst_sharpness": ..., "hessian_eigenvalue": ..., ...}

Every measure takes an `Objective`: a model together with a fixed set of examples. No Trainer is
needed. With a Trainer, `SharpnessCallback` takes the measures during training.

Everywhere, `objective` is the loss, `seed` that of all random vectors, and `ball` by default SAM's
with ρ = 0.05. Vectors in weight space have one tensor for each of the objective's `names`.
"""

from .callback import SharpnessCallback
from .gradients import GradientNoise, gradient_noise, perturbation_budget
from .hessian import Eigenpairs, hessian_trace, top_eigenpairs
from .landscape import Landscape, read_landscape, scan, write_landscape
from .numerics import Estimate
from .objective import Objective
from .planes import Plane, connecting_plane, eigenvector_plane, random_plane
from .plots import plot_history, plot_landscapes, plot_radius_curve
from .radius import RadiusCurve, RadiusReading, radius_curve
from .report import Plan, measure
from .sharpness import Ball, average_sharpness, worst_sharpness

__all__ = ["Ball", "Eigenpairs", "Estimate", "GradientNoise", "Landscape", "Objective", "Plan"]
__all__ += ["Plane", "RadiusCurve", "RadiusReading", "SharpnessCallback", "average_sharpness"]
__all__ += ["connecting_plane", "eigenvector_plane", "gradient_noise", "hessian_trace", "measure"]
__all__ += ["perturbation_budget", "plot_history", "plot_landscapes", "plot_radius_curve"]
__all__ += ["radius_curve", "random_plane", "read_landscape", "scan", "top_eigenpairs"]
__all__ += ["worst_sharpness", "write_landscape"]

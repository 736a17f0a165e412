"""The twins of the methods that move the weights for a pass, written from the papers.

A new method needs its rows here: with its default options, and with others.
"""

from __future__ import annotations

from applied import LR, RHO, Twin, TwinInputs
from reference_asam import asam_step
from reference_esam import esam_perturbation
from reference_friendly_sam import friendly_sam_step
from reference_gsam import gsam_step
from reference_looksam import looksam_step
from reference_msam import msam_gradient
from reference_sam import sam_step, value_and_grad
from reference_vasso import vasso_step
from reference_wsam import wsam_coupled, wsam_decoupled_sgd_step


def esam_step(x: TwinInputs, beta: float):
    e = esam_perturbation(x.g, RHO, beta, x.chosen, norm_over="selected")
    w = [a if b is None else a + b for a, b in zip(x.w, e, strict=True)]
    return value_and_grad(lambda w: sum(loss(w) for loss in x.losses), w)[1], x.state


def wsam_move(x: TwinInputs, gamma: float):
    w, _ = wsam_decoupled_sgd_step(x.w, x.losses, {}, RHO, gamma, LR)
    return [
        None if g is None else (a - b) / LR for a, b, g in zip(x.w, w, x.g, strict=True)
    ], x.state


def asam_gradient(x: TwinInputs, eta: float, adaptive: list[bool] | None = None):
    return asam_step(x.w, x.losses, RHO, eta, adaptive=adaptive)[0], x.state


TWINS: dict[str, list[Twin]] = {
    "sam": [Twin(lambda x: (sam_step(x.w, x.losses, RHO)[0], x.state))],
    "asam": [
        Twin(lambda x: asam_gradient(x, 0.01)),
        Twin(lambda x: asam_gradient(x, 0.2), {"sam_eta": 0.2}),
        Twin(
            lambda x: asam_gradient(x, 0.01, [True, False, True]),
            {"sam_adaptive_scope": "weights"},
        ),
    ],
    "gsam": [
        Twin(lambda x: (gsam_step(x.w, x.losses, RHO, 0.6)[0], x.state)),
        Twin(
            lambda x: (gsam_step(x.w, x.losses, RHO, 0.2)[0], x.state),
            {"sam_method_args": {"alpha": 0.2}},
        ),
    ],
    "looksam": [
        Twin(lambda x: looksam_step(x.w, x.losses, RHO, 0.7, 5, x.t, x.state)),
        Twin(
            lambda x: looksam_step(x.w, x.losses, RHO, 0.3, 2, x.t, x.state),
            {"sam_method_args": {"alpha": 0.3, "k": 2}},
        ),
    ],
    "wsam": [
        Twin(lambda x: wsam_move(x, 0.9)),
        Twin(lambda x: wsam_move(x, 0.3), {"sam_method_args": {"gamma": 0.3}}),
        Twin(
            lambda x: (wsam_coupled(x.w, x.losses, RHO, 0.8), x.state),
            {"sam_method_args": {"gamma": 0.8, "decoupled": False}},
        ),
    ],
    "friendly_sam": [
        Twin(lambda x: friendly_sam_step(x.w, x.losses, RHO, 1.0, 0.9, x.state)),
        Twin(
            lambda x: friendly_sam_step(x.w, x.losses, RHO, 0.5, 0.6, x.state),
            {"sam_method_args": {"sigma": 0.5, "ema_decay": 0.6}},
        ),
    ],
    "vasso": [
        Twin(lambda x: vasso_step(x.w, x.losses, RHO, 0.9, x.state)),
        Twin(
            lambda x: vasso_step(x.w, x.losses, RHO, 0.2, x.state),
            {"sam_method_args": {"theta": 0.2}},
        ),
    ],
    "msam": [Twin(lambda x: (msam_gradient(x.w, x.g, x.losses, RHO), x.state))],
    "esam": [
        Twin(lambda x: esam_step(x, 0.6)),
        Twin(lambda x: esam_step(x, 0.3), {"sam_method_args": {"beta": 0.3}}),
    ],
}

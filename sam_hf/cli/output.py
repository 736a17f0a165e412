"""The measures of `sam-hf sharpness` and `sam-hf rho` as tables."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ..diagnostics.radius import RadiusCurve

# Relative rounding of the loss in float32, with a margin.
_ROUNDING = 1e-6
_MEANINGS = {
    "loss": "mean loss of {examples} examples",
    "worst_sharpness": "largest rise of the loss found within {distance}{groups}",
    "average_sharpness": "mean rise of the loss in random directions at {distance}",
    "share": "share of {method}'s squared perturbation on {group}",
    "hessian_eigenvalue": "second derivative of the loss along its eigenvector",
    "hessian_trace": "sum of all Hessian eigenvalues",
    "gradient_noise": "trace of the covariance of the gradients of single examples",
    "gradient_noise_scale": "batch size in examples below which noise dominates the gradient",
    "squared_gradient_norm": "squared length of the gradient, estimated without its noise",
}


def table(measures: Mapping[str, float], options: Mapping[str, Any], examples: int) -> str:
    """One line for each measure: name, value ± error, and what it means.

    Values that are not finite, below the rounding of the loss or below their noise are shown in
    words, with the option to change.
    """
    rounding = _ROUNDING * max(1.0, abs(measures["loss"]))
    rows = []
    for name, x in measures.items():
        if name.endswith(("_error", "_residual")):
            continue
        method = "ASAM" if name.startswith("adaptive_") else "SAM"
        option = "adaptive_rho" if method == "ASAM" else "rho"
        distance = f"distance {options[option]:g}"
        if method == "ASAM":
            distance = f"{distance} relative to the weights (ASAM)"
        kind, _, rest = name.removeprefix("adaptive_").partition("share_")
        kind = "share" if rest else re.sub(r"_\d+$", "", kind)  # hessian_eigenvalue_2
        meaning = _MEANINGS[kind].format(
            examples=examples,
            distance=distance,
            groups=f", mean over groups of {options['m']}" if options["m"] else "",
            method=method,
            group=rest,
        )
        error = measures.get(f"{name}_error", measures.get(f"{name}_residual"))
        value = f"{x:.4g}" if error is None else f"{x:.4g} ± {error:.2g}"
        is_rise = kind.endswith("_sharpness")
        if kind in ("gradient_noise_scale", "squared_gradient_norm") and (x < 0 or x == math.inf):
            value, meaning = "unknown", "the squared gradient is below its noise: raise --examples"
        elif not math.isfinite(x):
            remedy = f"in the ball: lower --{option}" if is_rise else "in the derivatives"
            value, meaning = "not finite", f"an overflow {remedy}"
        elif is_rise and abs(x) < rounding:
            value, meaning = "about 0", f"below the rounding of the loss: raise --{option}"
        rows.append((name, value, meaning))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {m}" for n, v, m in rows)


def radius_table(curve: RadiusCurve) -> str:
    """Loss at w, one line for each radius, and how to read the cosine."""
    rounding = _ROUNDING * max(1.0, abs(curve.loss))
    rows = [("rho", "cosine", "sharpness", "sharpness / loss")]
    for r in curve.readings:
        share = r.sharpness / curve.loss if curve.loss else math.nan
        is_rounding = abs(r.sharpness) < rounding
        rises = ("about 0",) * 2 if is_rounding else map(_number, (r.sharpness, share))
        rows.append((f"{r.rho:.3g}", _number(r.cosine), *rises))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    reading = "cosine near 1: e changes nothing; 0.7 to 0.95: usual; near 0: e breaks the updates"
    return "\n".join([f"loss at w: {curve.loss:.4g}\n", *lines, f"\n{reading}"])


def suggestion(curve: RadiusCurve, options: Mapping[str, Any]) -> str:
    """One line: the options with the radius at which the automatic rule would settle."""
    start = options["initial_loss"]
    case = f"a sharpness of {curve.goal:.3g}, the goal of the automatic radius "
    case += (
        "at the start of training (its minimum: see --initial_loss)"
        if start is None
        else f"after an initial loss of {start:g}"
    )
    if curve.suggestion is None:
        return f"no suggestion for {case}: {curve.reason}"
    method = f"--sam_method {options['method']}"
    if options["method"] == "asam" and options["eta"] is not None:
        method += f" --sam_eta {options['eta']:g}"
    return f"suggestion for {case}: {method} --sam_rho {curve.suggestion:.3g}"


def _number(x: float) -> str:
    return f"{x:.4g}" if math.isfinite(x) else "not finite"

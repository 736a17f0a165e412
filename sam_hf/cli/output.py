"""The measures of `sam-hf sharpness` as a table: value, uncertainty and meaning."""

import math
import re
from collections.abc import Mapping
from typing import Any

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

    Values that are not finite, below the rounding of the loss or below their noise are told in
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
            value, meaning = "unknown", "the squared gradient is below its noise: more --examples"
        elif not math.isfinite(x):
            remedy = f"in the ball: lower --{option}" if is_rise else "in the derivatives"
            value, meaning = "not finite", f"an overflow {remedy}"
        elif is_rise and abs(x) < rounding:
            value, meaning = "about 0", f"below the rounding of the loss: raise --{option}"
        rows.append((name, value, meaning))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {m}" for n, v, m in rows)

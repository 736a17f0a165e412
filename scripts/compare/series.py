"""The table of forecasts: several series and horizons, with published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compare.comparison import Comparison
from compare.recipes import PLAIN
from compare.report import markdown

SHOWN = {"auto": "SAM", "auto, last quarter": "SAM, last quarter", "sam": "SAM, rho 0.7"}
# Test MSE of the SAMformer paper's table 1, https://arxiv.org/abs/2402.10198, by series and steps:
# without SAM ("Transformer") and with it. None: not known to us at first or second hand.
PUBLISHED = {
    ("ETTh1", "96 steps"): (0.509, 0.381),
    ("ETTh1", "192 steps"): (None, 0.409),
    ("ETTh1", "336 steps"): (None, 0.423),
    ("ETTh1", "720 steps"): (0.601, 0.427),
}


def table(contents: Sequence[dict[str, Any]], metric: str) -> str:
    """A line for each series, model and horizon; gains in percent of plain training's MSE.

    Args:
        contents: of results files.
        metric: `mse`, of the last epoch, or `selected_mse`, of the validated one.
    """
    head = ["series", "model", "horizon", "plain", "plain, equal compute", *SHOWN.values()]
    head += ["gain of SAM, %", "gain, %, equal compute", "published, plain", "published, SAM"]
    lines = []
    for content in contents:
        found = Comparison(content, "auto", list(SHOWN), metric=metric)
        series, model = found.settings["file"], found.settings["model"]["name"]
        for level in found.levels:
            at = {name: found.contrast(name, level) for name in found.names}
            line = [series, model, level, at[PLAIN].value.show(), at["auto"].longer.show()]
            line += [at[name].value.show() if name in at else "-" for name in SHOWN]
            line += [at["auto"].gain.show_signed(), at["auto"].equal_gain.show_signed()]
            is_same = model == "samformer"
            known = PUBLISHED.get((series, level), (None, None)) if is_same else (None, None)
            lines.append([*line, *("-" if x is None else f"{x:.3f}" for x in known)])
    return markdown(head, lines)

"""What the tests of an ascent on a part of the examples share."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

HALF = {"sam_ascent_fraction": 0.5}


class WholeBatches(Trainer):
    """Its loss may need all examples of a micro-batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


def rows_taken(passes: Any, data: Any, name: str = "x") -> list[list[list[int]]]:
    """For each update and each forward pass: the numbers of its rows in the data."""
    numbers = {tuple(row[name].tolist()): i for i, row in enumerate(data.rows)}
    return [
        [[numbers[tuple(row.tolist())] for row in x] for x in update] for update in passes.inputs
    ]

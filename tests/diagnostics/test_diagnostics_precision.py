"""TF32 is put off while something is measured, and all settings are as they were afterwards."""

from __future__ import annotations

import multiprocessing
import sys

import pytest
import torch
from torch import nn

from sam_hf.diagnostics.evaluation import full_precision

BACKENDS = torch.backends
GPU = torch.device("cuda")  # the settings are there without one
CHANGES = {
    "nothing": [],
    "--tf32 true": [(BACKENDS, "fp32_precision", "tf32")],
    "--tf32 false": [(BACKENDS, "fp32_precision", "ieee")],
    "old names": [
        (BACKENDS.cudnn, "allow_tf32", True),
        (BACKENDS.cuda.matmul, "allow_tf32", True),
    ],
    "convolutions": [(BACKENDS.cudnn.conv, "fp32_precision", "ieee")],
    "products": [(BACKENDS.cuda.matmul, "fp32_precision", "tf32")],
}


def read() -> list[object]:
    conv, rnn = BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cudnn.rnn.fp32_precision
    return [conv, rnn, BACKENDS.cuda.matmul.fp32_precision, BACKENDS.cudnn.enabled]


def change(name: str) -> None:
    for setting, attribute, value in CHANGES[name]:
        setattr(setting, attribute, value)


def settings(before: str, after: str, model: nn.Module | None) -> list[list[object]]:
    """What they are in the end and, where something is measured, within it."""
    change(before)
    within = []
    if model is not None:
        with full_precision(model, GPU):
            within.append(read())
    change(after)
    return [read(), *within]


def in_a_process(*args: object) -> list[list[object]]:
    """torch's defaults cannot be set again once they were changed."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(settings, args)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
@pytest.mark.parametrize("before", CHANGES)
@pytest.mark.parametrize("after", ["nothing", "--tf32 true", "--tf32 false"])
def test_a_measure_leaves_the_settings_and_what_follows_them(before, after):
    seen, within = in_a_process(before, after, nn.Linear(2, 2))
    assert within == ["ieee", "ieee", "ieee", True]
    assert [seen] == in_a_process(before, after, None)


def test_recurrent_layers_are_computed_without_cudnn():
    seen, within = in_a_process("nothing", "nothing", nn.Sequential(nn.LSTM(2, 2)))
    assert within == ["ieee", "ieee", "ieee", False] and seen[-1] is True


def test_nothing_is_changed_for_a_cpu():
    expected = read()
    with full_precision(nn.LSTM(2, 2), torch.device("cpu")):
        assert read() == expected

"""The command that runs the whole matrix: a row that does not hold is said to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import layout_matrix
import pytest
import test_ddp
from layouts import by_the_paper

NAME = "micro_batch-2"


def seen(**changed):
    weights = by_the_paper(test_ddp.CASES[NAME], test_ddp.untrained(), is_shared=False)
    logs = [{"sam_sharpness": 0.3}]
    good = {
        "weights": weights,
        "logs": logs,
        "is_restored": True,
        "world_size": 2,
        "wrapper": "DistributedDataParallel",
    }
    return [{NAME: good}, {NAME: good | changed}]


@pytest.mark.parametrize(
    ("changed", "is_good"),
    [
        ({}, True),
        ({"is_restored": False}, False),
        ({"wrapper": "Classifier"}, False),
        ({"world_size": 1}, False),
        ({"error": "ValueError: no"}, False),
        ({"weights": {n: w * (1 + 1e-8) for n, w in seen()[0][NAME]["weights"].items()}}, False),
    ],
)
def test_a_row_fails_where_any_process_differs(changed, is_good, capsys):
    assert layout_matrix.row("ddp", NAME, test_ddp.CASES[NAME], seen(**changed)) is is_good
    assert ("FAILED" in capsys.readouterr().out) is not is_good


def test_a_second_pass_that_saw_no_other_weights_fails():
    runs = seen()
    runs[0][NAME]["logs"][0]["sam_sharpness"] = 0.0
    assert not layout_matrix.row("ddp", NAME, test_ddp.CASES[NAME], runs)


@pytest.mark.slow
def test_an_unknown_part_is_told_in_one_line():
    command = [sys.executable, str(Path(layout_matrix.__file__)), "fsdp9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "fsdp9: no such part. Allowed: ddp, sharded, deepspeed." in done.stderr

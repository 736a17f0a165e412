"""Two processes with half of the examples each measure what one measures with all of them."""

from __future__ import annotations

import sys

import pytest
import torch
from curved import batches
from layouts import DISTRIBUTED, launch
from tiny import examples

from sam_hf.diagnostics import read_landscape

sys.path.append(str(DISTRIBUTED))

import diagnostics_worker as worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("diagnostics")


@pytest.fixture(scope="module")
def ranks(folder):
    return launch("diagnostics_worker.py", {}, folder, uses=["pandas"])  # by pyarrow


def test_under_ddp_the_measures_are_those_over_all_examples(ranks, folder):
    alone = worker.measured(batches(examples(worker.N), worker.SIZE), None)
    for rank in ranks:
        assert rank["examples"] == worker.N and rank["same"]
        assert rank["measures"] == pytest.approx(alone["measures"], rel=1e-9)
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-12, atol=0)
    read = read_landscape(folder / "landscape.parquet")
    assert torch.equal(read.losses, ranks[0]["losses"])


def test_processes_with_different_numbers_of_batches_measure_the_same(ranks):
    assert ranks[0]["uneven"] == ranks[1]["uneven"]
    assert "gradient_noise" in ranks[0]["uneven"]
    alone = worker.measure(worker.Objective(worker.model(), batches(examples(15), 4)), worker.PLAN)
    for name in ("loss", "worst_sharpness", "hessian_eigenvalue"):
        assert ranks[0]["uneven"][name] == pytest.approx(alone[name], rel=1e-9)


def test_the_callback_under_ddp_logs_the_same_on_both_processes(ranks):
    assert len(ranks[0]["logs"]) == 2 and ranks[0]["logs"] == ranks[1]["logs"]
    assert ranks[0]["logs"][0].keys() == {f"sharpness/{k}" for k in ranks[0]["measures"]}


def test_shards_and_groups_over_processes_are_refused_with_the_way_out(ranks):
    for rank in ranks:
        assert "sharded weights" in rank["refusals"]["shards"]
        assert "choose another folder, or delete it" in rank["refusals"]["file"]
        assert "FSDP1" in rank["refusals"]["flat"]
        assert "sam-hf sharpness FOLDER" in rank["refusals"]["shards"]
        assert "m=4 is not allowed with several processes" in rank["refusals"]["m"]

"""One process with several devices: `nn.DataParallel` and models that `device_map` has split.

There is one device here. `DataParallel` without any calls the module as it is, and a split model
is one that says so: what is tested is what the Trainer does differently then.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny import Classifier, examples, sam_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from twin_runs import assert_weights, by_the_twin, means

from sam_hf.backends import Backend
from sam_hf.perturbation import Perturbation

DEVICES = 2


class Gathered(Classifier):
    """Gives the loss of each device's part of the batch, as `DataParallel` gathers them."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)["logits"]
        parts = zip(logits.chunk(DEVICES), labels.chunk(DEVICES), strict=True)
        return {"loss": torch.stack([cross_entropy(*part) for part in parts])}


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("steps", [1, 2])
def test_data_parallel_equals_the_twin_on_the_examples_of_all_devices(scope, steps):
    model, sam = Gathered(), {"sam_rho": 0.3, "sam_scope": scope}
    rows = examples(48).rows
    batches = [rows[i : i + 4 * DEVICES] for i in range(0, len(rows), 4 * DEVICES)]
    windows = [
        [batches[i % len(batches)] for i in range(steps * update, steps * (update + 1))]
        for update in range(3)
    ]
    plain = Classifier()
    plain.load_state_dict(model.state_dict())
    expected = by_the_twin(plain, means(plain, windows), 0.3, scope=scope)
    trainer = sam_trainer(model, examples(48), sam=sam, gradient_accumulation_steps=steps)
    trainer.args._n_gpu = DEVICES
    trainer._train_batch_size = trainer.args.train_batch_size
    trainer.train()
    assert type(trainer.model_wrapped) is nn.DataParallel
    assert_weights(model, expected)
    assert trainer.state.log_history[0]["sam_sharpness"] > 1e-3


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_model_that_device_map_has_split_equals_the_twin(scope):
    model = Classifier()
    model.hf_device_map = {"first": 0, "second": 1}
    rows = examples(12).rows
    windows = [[rows[i : i + 4]] for i in (0, 4, 8)]
    expected = by_the_twin(model, means(model, windows), 0.3, scope=scope)
    trainer = sam_trainer(model, examples(12), sam={"sam_rho": 0.3, "sam_scope": scope})
    assert trainer.is_model_parallel
    trainer.train()
    assert_weights(model, expected)


@pytest.mark.parametrize("waits", [False, True])
def test_each_device_is_written_with_the_scale_on_it(waits, monkeypatch):
    """The meta device stands for a second one: it refuses tensors of another device."""
    if waits:
        monkeypatch.setattr("sam_hf.perturbation.reading_is_free", lambda number: False)
    here, there = torch.randn(3), torch.empty(3, device="meta")
    before = here.clone()
    perturbation = Perturbation([there, here, there.clone()])
    perturbation.apply(
        [torch.ones(3, device="meta"), torch.full((3,), 2.0), torch.ones(3, device="meta")],
        torch.tensor(0.5),
    )
    assert torch.equal(here, before + 1.0)
    perturbation.restore()
    assert torch.equal(here, before)


def test_the_random_state_of_every_device_of_data_parallel_is_put_back():
    weight = nn.Parameter(torch.empty(1, device="meta"))
    devices = Backend([weight], Accelerator(), n_devices=3).rng_devices
    assert {device.index for device in devices} == {None, 0, 1, 2}

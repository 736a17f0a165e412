"""One process with several devices: `nn.DataParallel` and models that `device_map` has split.

There is one device here. `DataParallel` without any calls the module as it is, and a split model
is one that says so: what is tested is what the Trainer does differently then.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Classifier, examples, sam_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from twin_runs import assert_weights, by_the_twin, means

from sam_hf.distributed import DDPLayout
from sam_hf.engine.perturbation import Perturbation

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
    fused = torch._fused_sgd_

    def fused_on_one_device(some, added, *args, found_inf, **kwargs):
        assert {x.device for x in (*some, *added)} == {found_inf.device}
        if found_inf.device.type != "meta":  # which has no such kernel
            fused(some, added, *args, found_inf=found_inf, **kwargs)

    monkeypatch.setattr(torch, "_fused_sgd_", fused_on_one_device)
    if waits:
        for module in ("sam_hf.engine.perturbation", "sam_hf.methods.lists"):
            monkeypatch.setattr(f"{module}.reading_is_free", lambda number: False)
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


class Elsewhere:
    """Stands for an accelerator whose passes run on a device that is not here."""

    num_processes, ddp_handler, scaler = 1, None, None
    sync_gradients = True

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def rng_devices(device: str, *, weights: str = "cpu", n_devices: int = 1) -> set[torch.device]:
    """Whose random state is put back, for weights on one device and passes on another."""
    model = nn.ParameterList([nn.Parameter(torch.empty(1, device=weights))])
    accelerator: Any = Elsewhere(device)
    layout = DDPLayout(list(model), model, model, accelerator, n_devices=n_devices)
    return layout.rng_devices


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu:0"])
def test_with_weights_on_the_cpu_the_random_state_of_the_device_of_the_passes_is_put_back(device):
    """FSDP2 that offloads weights to the CPU draws its dropout masks on the device."""
    assert rng_devices(device) == {torch.device(device)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_an_accelerator_there_is_no_other_random_state_than_the_cpus(device):
    assert rng_devices(device) == set()


def test_the_random_state_of_every_device_of_data_parallel_is_put_back():
    devices = rng_devices("cuda", n_devices=3)
    assert {device.index for device in devices} == {None, 0, 1, 2}
    assert {device.type for device in devices} == {"cuda"}


def test_the_random_state_of_a_device_that_holds_no_perturbed_weight_is_put_back():
    class Here(nn.Module):
        def parameters(self, recurse=True):
            yield from (one, other)

    # A split model: the second part draws masks too.
    one, other = (Bag(torch.device("cuda", i)) for i in range(2))
    accelerator: Any = Elsewhere("cuda:0")
    weight = nn.Parameter(torch.empty(1))
    layout = DDPLayout([weight], Here(), Here(), accelerator)
    assert layout.rng_devices == {torch.device("cuda", 0), torch.device("cuda", 1)}


class Bag:
    def __init__(self, device: torch.device) -> None:
        self.device = device

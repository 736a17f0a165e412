"""The logs: the twins' numbers, at the Trainer's logging steps, without waiting in between."""

from __future__ import annotations

import pytest
import torch
from combinations import every_method_and_scope, has_two_passes
from reference_asam import asam_step
from reference_sam import sam_step
from tiny import CLASSES, Classifier, Rows, examples, sam_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, ViTConfig, ViTForImageClassification
from twin_runs import collate, loss_of

from sam_hf import SAMTrainer
from sam_hf.engine import update as engine_update
from sam_hf.engine.metrics import Metrics
from sam_hf.engine.parameters import parameter_groups
from sam_hf.methods import METHODS

RHO = 0.4


def train(sam=None, data=None, model=None, **args):
    """A run that does not move: every update sees the same weights."""
    model = model or Classifier()
    trainer = sam_trainer(
        model, data or examples(24), sam={"sam_rho": RHO, **(sam or {})}, learning_rate=0.0, **args
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def twin_readings(model, batches, sam):
    names = [name for name, _ in model.named_parameters()]
    w = [p.detach().clone() for p in model.parameters()]
    losses = [loss_of(model, names, b, 1 / len(batches)) for b in batches]
    if sam.get("sam_method") == "asam":
        return asam_step(w, losses, RHO, 0.01)[1][0]
    return sam_step(w, losses, RHO)[1][0]


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_the_readings_equal_the_twins(method):
    sam = {"sam_method": method}
    trainer, logs = train(
        sam,
        examples(24),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        logging_steps=3,
    )
    rows = trainer.train_dataset.rows
    twins = [
        twin_readings(trainer.model, [collate(rows[i : i + 2]), collate(rows[i + 2 : i + 4])], sam)
        for i in range(0, 24, 4)
    ]
    assert [entry["step"] for entry in logs] == [3, 6]
    for entry, window in zip(logs, (twins[:3], twins[3:]), strict=True):
        mean = sum(t.sharpness for t in window) / 3
        assert entry["sam_sharpness"] == pytest.approx(mean, abs=1e-12)
        # the Trainer sums its losses in fp32
        assert entry["loss"] == pytest.approx(sum(t.loss for t in window) / 3, abs=6e-5)
        last = window[-1]
        assert entry["sam_perturbation_norm"] == pytest.approx(last.e_norm, abs=1e-12)
        assert entry["sam_ascent_grad_norm"] == pytest.approx(last.g_norm, abs=1e-12)
        assert entry["sam_grad_cosine"] == pytest.approx(last.cosine, abs=1e-10)
        groups = parameter_groups(trainer.model)
        for group in ("norms", "biases", "embeddings", "matrices"):
            share = sum(
                (e * e).sum().item()
                for e, its_group in zip(last.e, groups.values(), strict=True)
                if its_group == group
            )
            if method == "asam" and share:
                assert entry[f"sam_share_{group}"] == pytest.approx(share / last.e_norm**2)
            else:
                assert f"sam_share_{group}" not in entry


def test_each_micro_batch_has_its_own_sharpness_in_scope_micro_batch():
    trainer, logs = train(
        {"sam_scope": "micro_batch"},
        examples(4),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    rows = trainer.train_dataset.rows
    twins = [twin_readings(trainer.model, [collate(rows[i : i + 2])], {}) for i in (0, 2)]
    # the loss of an update is the mean over its micro-batches, and each has half of it
    assert logs[0]["sam_sharpness"] == pytest.approx(sum(t.sharpness for t in twins) / 2, abs=1e-12)
    assert logs[0]["sam_ascent_grad_norm"] == pytest.approx(twins[1].g_norm / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("args", "sam", "expected"),
    [
        ({"logging_steps": 2, "max_steps": 4}, {}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True, "max_steps": 4}, {}, [1, 3]),
        # the update before the log is a plain one: the last perturbed one is read
        ({"logging_steps": 2, "max_steps": 4}, {"sam_interval": 2}, [2, 4]),
        ({"logging_strategy": "epoch", "max_steps": 6}, {}, [3, 6]),
        ({"logging_strategy": "epoch", "max_steps": 6}, {"sam_interval": 2}, [3, 6]),
    ],
)
def test_every_training_log_holds_every_reading(args, sam, expected):
    _, logs = train(sam, examples(12), **args)
    assert [entry["step"] for entry in logs] == expected
    for entry in logs:
        for name in ("sharpness", "perturbation_norm", "ascent_grad_norm", "grad_cosine"):
            assert f"sam_{name}" in entry


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"logging_steps": 4}, [3, 7]),
        ({"logging_steps": 4, "gradient_accumulation_steps": 2}, [3, 7]),
        ({"logging_strategy": "no"}, []),
    ],
)
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_readings_are_measured_only_where_a_log_shows_them(scope, args, expected, monkeypatch):
    measured = []
    real = engine_update.measure
    monkeypatch.setattr(
        engine_update, "measure", lambda *a: measured.append(trainer.state.global_step) or real(*a)
    )
    sam = {"sam_scope": scope}
    trainer = sam_trainer(Classifier(), examples(16), sam=sam, max_steps=8, **args)
    trainer.train()
    assert measured == expected


class CountsReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rho", [0.05, None])
@every_method_and_scope(lambda method: method.perturbs)
def test_the_host_reads_no_number_from_the_device_in_an_update(method, scope, rho, monkeypatch):
    if rho is None and METHODS[method].along_momentum:
        pytest.skip("has no automatic radius")
    for module in ("engine.perturbation", "engine.radius", "methods.lists"):
        module = f"sam_hf.{module}"
        monkeypatch.setattr(f"{module}.reading_is_free", lambda number: False)

    class CountingSAM(SAMTrainer):
        reads: tuple = ()

        def training_step(self, *args, **kwargs):
            with CountsReads() as counter:
                loss = super().training_step(*args, **kwargs)
            self.reads += (counter.reads,)
            return loss

    trainer = sam_trainer(
        Classifier(dropout=0.1),
        examples(16),
        CountingSAM,
        sam={"sam_method": method, "sam_scope": scope, "sam_rho": rho},
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=2,
        optim="adamw_torch" if METHODS[method].along_momentum else "sgd",
    )
    trainer.train()
    # but for the one check of the loss's scale, in the first update with two passes
    first, later = (2, 6) if scope == "batch" else (1, 7)
    is_checked = has_two_passes(METHODS[method])
    assert sum(trainer.reads[:first]) == 2 * is_checked and trainer.reads[first:] == (0,) * later


def test_a_non_finite_sharpness_does_not_spoil_the_mean():
    readings = Metrics()
    for value in (1.0, float("nan"), 3.0, float("inf")):
        readings.add_sharpness(torch.tensor(value))
    readings.set(grad_cosine=torch.tensor(float("nan")), perturbation_norm=torch.tensor(0.5))
    assert readings.pop(torch.stack) == {"sam_sharpness": 2.0, "sam_perturbation_norm": 0.5}
    assert readings.pop(torch.stack) == {}


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_the_mean_over_any_number_of_updates_is_that_of_all_of_them(count):
    readings = Metrics()
    for i in range(count):
        readings.add_sharpness(torch.tensor(2.0 * i))
        readings.add_passes(1 + i % 2)
    expected = sum(2.0 * i for i in range(count)) / count
    assert readings.pop(torch.stack) == {
        "sam_sharpness": pytest.approx(expected),
        "sam_passes_per_update": pytest.approx(1 + (count // 2) / count),
    }
    assert readings.pop(torch.stack) == {}


def test_readings_are_means_over_the_processes_that_have_any():
    first, second = Metrics(), Metrics()
    first.add_sharpness(torch.tensor(1.0))
    for value in (2.0, 6.0, float("nan")):
        second.add_sharpness(torch.tensor(value))
    second.set(perturbation_norm=torch.tensor(0.5))
    said: list[torch.Tensor] = []

    def say(numbers):
        said.append(torch.stack(numbers))
        return said[-1]

    first.pop(say)
    both = second.pop(lambda numbers: said[0] + torch.stack(numbers))
    assert both == {"sam_perturbation_norm": 0.5, "sam_sharpness": 3.0}


def test_total_flos_counts_the_passes_that_were_made():
    def flos(trainer_class=None, **sam):
        config = ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=4,
            patch_size=2,
            num_labels=CLASSES,
        )
        g = torch.Generator().manual_seed(0)
        data = Rows(
            [
                {"pixel_values": torch.randn(3, 4, 4, generator=g), "labels": torch.tensor(i % 3)}
                for i in range(16)
            ]
        )
        kwargs = {"trainer_class": Trainer} if trainer_class else {"sam": sam}
        trainer = sam_trainer(
            ViTForImageClassification(config),
            data,
            **kwargs,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
        )
        trainer.train()
        return trainer.state.total_flos

    plain = flos(Trainer)
    assert plain > 0
    assert flos(sam_rho=0.05) == 2 * plain
    assert flos(sam_scope="micro_batch") == 2 * plain
    assert flos(sam_interval=2) == 1.5 * plain
    assert flos(sam_rho=0.0) == plain


def test_a_log_call_inside_compute_loss_is_made_once():
    class Logs(SAMTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            self.log({"mine": 1.0})
            return loss

    class Reports(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(logs)

    # The history is put back after the second pass: what a callback has reported is not.
    reported = []
    options = {"max_steps": 2, "trainer_kwargs": {"callbacks": [Reports()]}}
    trainer = sam_trainer(Classifier(), examples(8), Logs, **options)
    trainer.train()
    for logs in (trainer.state.log_history, reported):
        assert sum("mine" in entry for entry in logs) == 2


def test_losses_in_half_precision_are_summed_in_full_precision():
    class Notes(SAMTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            losses[self.is_in_descent_pass].append(loss.item())
            return loss

    losses = {False: [], True: []}
    model, data = Classifier(dtype=torch.bfloat16), examples(16, dtype=torch.bfloat16)
    options = {"gradient_accumulation_steps": 4, "learning_rate": 0.0, "max_steps": 1}
    trainer = sam_trainer(model, data, Notes, sam={"sam_rho": RHO}, **options)
    trainer.train()
    at_w, at_e = (sum(values) / 4 for values in losses.values())
    assert trainer.state.log_history[0]["sam_sharpness"] == pytest.approx(at_e - at_w, rel=1e-5)


def test_the_grad_norms_of_fp16_are_those_without_the_loss_scale():
    class Scaled(SAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    readings = []
    for trainer_class in (Scaled, SAMTrainer):
        torch.manual_seed(0)
        model = Classifier(dtype=torch.float32)
        trainer = sam_trainer(
            model, examples(8, dtype=torch.float32), trainer_class, max_steps=1, learning_rate=0.0
        )
        trainer.train()
        readings.append(trainer.state.log_history[0])
    for name in ("sam_ascent_grad_norm", "sam_perturbation_norm", "sam_grad_cosine"):
        assert readings[0][name] == pytest.approx(readings[1][name], rel=1e-4)

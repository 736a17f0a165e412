"""How far the weights are perturbed and when, and what that costs: said, counted and logged."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from layouts import DISTRIBUTED
from method_twins import METHODS, RHO, Passes, TwinRun, trained
from reference_gsam import gsam_rho
from tiny import Classifier, examples, sam_trainer
from transformers import Trainer
from twin_runs import means

from sam_hf import SAMConfig, SAMTrainer, with_sam
from sam_hf.engine.schedule import describe_cost, expected_passes, learning_rate_share, rho_at

sys.path.insert(0, str(DISTRIBUTED))

from sharded_models import ShardedClassifier, TinyConfig

HIGH, LOW, TOTAL = 0.8, 0.2, 40


def at(update: int, share: float = 1.0, **sam: Any) -> float:
    config = SAMConfig(sam_rho=HIGH, **({"sam_rho_min": LOW} | sam))
    return rho_at(config, update, TOTAL, share)


# ---- rho ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:sam_rho_min=.* has no effect")
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_rho_follows_the_closed_forms_of_its_schedules(start):
    first = int(start * TOTAL)
    for update in range(first, TOTAL):
        done = (update - first) / (TOTAL - first)
        options = {"sam_start_ratio": start}
        assert at(update, **options) == HIGH
        linear = LOW + (HIGH - LOW) * (1 - done)
        assert at(update, sam_rho_schedule="linear", **options) == pytest.approx(linear, rel=1e-14)
        cosine = LOW + (HIGH - LOW) * (1 + math.cos(math.pi * done)) / 2
        assert at(update, sam_rho_schedule="cosine", **options) == pytest.approx(cosine, rel=1e-14)
    for schedule in ("linear", "cosine"):
        options = {"sam_rho_schedule": schedule, "sam_start_ratio": start}
        assert at(first, **options) == HIGH
        middle = first + (TOTAL - first) // 2
        assert at(middle, **options) == pytest.approx((HIGH + LOW) / 2, rel=1e-14)
        assert at(TOTAL, **options) == pytest.approx(LOW, rel=1e-14)


@pytest.mark.filterwarnings("ignore:sam_rho_min=.* has no effect")
@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_begins_at_0_and_what_follows_takes_the_rest_of_the_run(schedule, start):
    first, long = int(start * TOTAL), 0.2
    options = {
        "sam_rho_schedule": schedule,
        "sam_start_ratio": start,
        "sam_rho_warmup_ratio": long,
    }
    top = first + int(long * (TOTAL - first))
    assert at(first, **options) == 0
    half = at((first + top) // 2, **options)
    assert half == pytest.approx(HIGH / 2, rel=1e-12)
    assert at(top, **options) == pytest.approx(HIGH, rel=1e-12)
    rises = [at(update, **options) for update in range(first, top + 1)]
    assert rises == sorted(rises) and len(set(rises)) == len(rises)
    middle = (top + TOTAL) // 2
    expected = HIGH if schedule == "constant" else (HIGH + LOW) / 2
    assert at(middle, **options) == pytest.approx(expected, rel=1e-12)
    expected = HIGH if schedule == "constant" else LOW
    assert at(TOTAL, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("method", ["gsam", "vasso", "msam"])
def test_a_rho_that_follows_the_learning_rate_is_that_of_gsam(scheduler, method):
    updates, rate = 7, 0.1
    model, data, sam = Classifier(), examples(28), METHODS[method]
    twin = TwinRun(model, sam, mu=0.9)
    trainer, spy, _ = trained(
        model,
        data,
        sam | {"sam_rho": HIGH, "sam_rho_min": LOW, "sam_rho_schedule": "learning_rate"},
        lr_scheduler_type=scheduler,
        warmup_steps=0 if scheduler == "constant" else 2,
        max_steps=updates,
        learning_rate=rate,
        optim_args="momentum=0.9",
    )
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in entries]
    assert (rates[0] < rate) == (scheduler != "constant")
    batches = [[data.rows[i : i + 4]] for i in range(0, 28, 4)]
    for i, (lr, shares) in enumerate(zip(rates, means(model, batches), strict=True)):
        rho = gsam_rho(HIGH, LOW, lr, rate)
        if method != "msam" or i:
            assert entries[i]["sam_perturbation_norm"] == pytest.approx(rho, rel=1e-12)
        twin.update(shares, rho=rho, schedule=lr / rate)
        twin.assert_equals(spy.weights[i])


def test_a_schedule_moves_rho_from_update_to_update_of_a_run():
    sam = {"sam_rho": 0.6, "sam_rho_schedule": "linear", "sam_start_ratio": 0.25}
    sam |= {"sam_rho_warmup_ratio": 1 / 3, "sam_rho_min": 0.1}
    trainer, _, passes = trained(Classifier(), examples(32), sam, max_steps=8)
    norms = [e.get("sam_perturbation_norm") for e in trainer.state.log_history if "loss" in e]
    # Two updates without, two of the warm-up (the first one at 0), then down to 0.1 at the end.
    assert passes.counts == [1, 1, 1, 2, 2, 2, 2, 2]
    assert norms[:3] == [None] * 3
    expected = [0.3, 0.6, 0.475, 0.35, 0.225]
    assert norms[3:] == pytest.approx(expected, rel=1e-9)


# ---- The cost -----------------------------------------------------------------------------------

COSTS = [
    {"sam_method": "sam"},
    {"sam_method": "sam", "sam_interval": 3},
    {"sam_method": "sam", "sam_start_ratio": 0.35},
    {"sam_method": "sam", "sam_interval": 2, "sam_start_ratio": 0.35, "sam_ascent_fraction": 0.25},
    {"sam_method": "sam", "sam_ascent_fraction": 0.5, "sam_scope": "micro_batch"},
    {"sam_method": "sam", "sam_params": "norms", "sam_interval": 4},
    {"sam_method": "looksam", "sam_method_args": {"k": 3}},
    {"sam_method": "looksam", "sam_method_args": {"k": 4}, "sam_start_ratio": 0.2},
    {"sam_method": "looksam", "sam_method_args": {"k": 4}, "sam_start_ratio": 1.0},
    {"sam_method": "looksam", "sam_method_args": {"k": 20}},
    {"sam_method": "msam"},
    {"sam_method": "msam", "sam_start_ratio": 0.5},
    {"sam_method": "esam", "sam_start_ratio": 0.5},
    {"sam_method": "wsam", "sam_interval": 2},
    {"sam_method": "sam", "sam_rho": 0.0},
    {"sam_method": "sam", "sam_rho_warmup_ratio": 0.5},
    {"sam_method": "sam", "sam_rho_warmup_ratio": 0.5, "sam_interval": 3},
    {"sam_method": "sam", "sam_rho_warmup_ratio": 0.5, "sam_start_ratio": 0.35},
    {"sam_method": "looksam", "sam_method_args": {"k": 3}, "sam_rho_warmup_ratio": 0.5},
]


@pytest.mark.parametrize("sam", COSTS, ids=lambda sam: "-".join(map(str, sam.values())))
def test_the_passes_that_are_expected_are_those_that_are_made_and_logged(sam):
    updates, steps, size = 11, 2, 4
    trainer, _, passes = trained(
        Classifier(),
        examples(size * steps * updates),
        sam,
        gradient_accumulation_steps=steps,
        max_steps=updates,
        optim_args="momentum=0.9",
    )
    made = [sum(len(x) for x in update) / (size * steps) for update in passes.inputs]
    config = SAMConfig(**{"sam_rho": RHO} | sam)
    assert expected_passes(config, updates) == pytest.approx(sum(made) / updates, rel=1e-12)
    line = describe_cost(config, updates)
    assert f"{expected_passes(config, updates):.4g} forward" in line and "\n" not in line
    if config.sam_rho:
        logged = [e["sam_passes_per_update"] for e in trainer.state.log_history if "loss" in e]
        assert logged == pytest.approx(made, rel=1e-6)


def test_the_passes_in_the_log_are_the_mean_since_the_last_log():
    sam = {"sam_method": "looksam", "sam_method_args": {"k": 3}}
    trainer, _, _ = trained(Classifier(), examples(16), sam, max_steps=8, logging_steps=4)
    logged = [e["sam_passes_per_update"] for e in trainer.state.log_history if "loss" in e]
    assert logged == [6 / 4, 5 / 4]


class Halves(Trainer):
    """Makes a training step of two calls of compute_loss, each on half of the examples."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        losses = []
        for part in (slice(0, 2), slice(2, 4)):
            half = {name: value[part] for name, value in inputs.items()}
            losses.append(self.compute_loss(model, half))
            self.accelerator.backward(losses[-1])
        return sum(losses).detach()


def test_a_pass_over_a_micro_batch_is_one_also_where_it_is_made_in_parts():
    trainer, _, passes = trained(Classifier(), examples(8), {}, with_sam(Halves), max_steps=2)
    assert passes.counts == [4, 4]
    logged = [e["sam_passes_per_update"] for e in trainer.state.log_history if "loss" in e]
    assert logged == [2, 2]


# ---- Floating-point operations ------------------------------------------------------------------


def operations(sam: dict[str, Any] | None) -> tuple[float, Passes, Any]:
    model = ShardedClassifier(TinyConfig()).double()
    passes = Passes(model)
    trainer = sam_trainer(
        model,
        examples(48),
        Trainer if sam is None else SAMTrainer,
        {"callbacks": [passes]},
        None if sam is None else {"sam_rho": RHO, **sam},
        gradient_accumulation_steps=2,
        max_steps=6,
        optim_args="momentum=0.9",
    )
    trainer.train()
    return trainer.state.total_flos, passes, model


def numbers(passes: Passes) -> int:
    """How many numbers went forward through the model."""
    return sum(x.numel() for update in passes.inputs for x in update)


WHOLE = [
    {"sam_method": "sam"},
    {"sam_method": "asam", "sam_scope": "micro_batch"},
    {"sam_method": "sam", "sam_interval": 2},
    {"sam_method": "sam", "sam_ascent_fraction": 0.5},
    {"sam_method": "looksam", "sam_method_args": {"k": 3}},
    {"sam_method": "gsam", "sam_params": "norms"},  # needs the whole g
    {"sam_method": "msam"},
    {"sam_method": "sam", "sam_trigger": "gradient_norm", "sam_params": "norms"},
]


@pytest.mark.parametrize("sam", WHOLE, ids=lambda sam: "-".join(map(str, sam.values())))
def test_operations_are_six_for_each_parameter_and_number_that_goes_through(sam):
    total, passes, model = operations(sam)
    assert total == 6 * model.num_parameters() * numbers(passes)
    plain, plain_passes, _ = operations(None)
    assert (total == plain) == (sam["sam_method"] == "msam")
    assert plain == 6 * model.num_parameters() * numbers(plain_passes)


def test_without_perturbation_the_operations_are_the_plain_trainers():
    assert operations({"sam_rho": 0.0})[0] == operations(None)[0]
    assert operations({"sam_start_ratio": 1.0})[0] == operations(None)[0]


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("params", ["norms", "^second"])
def test_an_ascent_that_leaves_out_gradients_of_weights_costs_so_much_less(scope, fraction, params):
    sam = {"sam_params": params, "sam_scope": scope, "sam_ascent_fraction": fraction}
    total, passes, model = operations(sam)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    chosen = [n for n in sizes if n.startswith("layer_norm" if params == "norms" else "second")]
    share = sum(sizes[n] for n in chosen) / sum(sizes.values())
    full, _, _ = operations(None)
    ascent = 6 * model.num_parameters() * numbers(passes) - full
    assert ascent == full * fraction
    assert total == pytest.approx(full + (4 + 2 * share) / 6 * ascent, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "steps", "share"),
    [(1, 4, 0.25), (2, 4, 0.25), (3, 1, 1 / 3), (1, 1, 1.0), (8, 2, 0.25)],
)
def test_small_micro_batches_are_left_out_whole_and_the_line_says_what_is_taken(
    size, steps, share, capfd
):
    sam = {"sam_method": "sam", "sam_ascent_fraction": 0.25}
    _, _, passes = trained(
        Classifier(),
        examples(size * steps * 4),
        sam,
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=size,
        max_steps=4,
    )
    made = [sum(len(x) for x in update) / (size * steps) for update in passes.inputs]
    assert made == pytest.approx([1 + share] * 4)
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "forward-backward" in x]
    assert f"of {1 + share:.4g} forward" in line
    assert ("sam_ascent_fraction=0.25 is rounded up to" in line) == (share > 0.25)


def test_a_learning_rate_that_warms_up_from_0_leaves_the_first_update_plain(capfd):
    sam = {"sam_method": "sam", "sam_rho_schedule": "learning_rate"}
    _, _, passes = trained(
        Classifier(), examples(64), sam, max_steps=8, warmup_steps=4, lr_scheduler_type="linear"
    )
    made = [sum(len(x) for x in update) / 4 for update in passes.inputs]
    assert made[0] == 1 and made[1:] == [2] * 7
    assert "of 1.875 forward-backward passes" in capfd.readouterr().err


def test_the_share_of_the_learning_rate_is_that_of_a_group_that_learns():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": weights[:1], "lr": 0.0}, {"params": weights[1:]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert learning_rate_share(optimizer) == 1.0
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        plateau.step(1.0)
    assert learning_rate_share(optimizer) == 0.25
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.step()
    assert learning_rate_share(optimizer) == 0.5

"""An ascent on a part of the examples: which ones, at what loss, and to what effect."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from method_twins import METHODS, RHO, Passes, TwinRun, trained, windows
from sampled import HALF, WholeBatches, rows_taken
from tiny import (
    HAS_SAMPLING,
    Classifier,
    LanguageModel,
    Rows,
    examples,
    sam_trainer,
    sentences,
)
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import set_seed
from twin_runs import assert_same_run, losses, means, share, token_means

from sam_hf import SAMTrainer, with_sam

# ---- Which examples -----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize(("fraction", "size", "taken"), [(0.5, 4, 2), (0.3, 7, 3), (0.1, 5, 1)])
def test_the_ascent_sees_a_part_of_each_micro_batch_and_the_descent_all_of_it(
    scope, fraction, size, taken
):
    steps, updates, data = 3, 6, examples(3 * 6 * 7)
    sam = {"sam_ascent_fraction": fraction, "sam_scope": scope}
    _, _, passes = trained(
        Classifier(),
        data,
        sam,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=updates,
    )
    places = []
    for update, rows in enumerate(rows_taken(passes, data)):
        batches = [[(update * steps + i) * size + j for j in range(size)] for i in range(steps)]
        ascents = rows[:steps] if scope == "batch" else rows[::2]
        descents = rows[steps:] if scope == "batch" else rows[1::2]
        assert descents == batches
        for part, batch in zip(ascents, batches, strict=True):
            assert len(part) == taken == math.ceil(fraction * size)
            assert set(part) <= set(batch) and part == sorted(set(part))
            places.append(tuple(batch.index(row) for row in part))
    # Another draw for each micro-batch of each update, in which no place is preferred.
    assert len(set(places)) >= min(5, math.comb(size, taken) - 1)
    assert {place for draw in places for place in draw} == set(range(size))


def test_a_run_that_is_resumed_draws_the_same_and_the_data_come_as_in_the_full_run(tmp_path):
    whole = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    _, passes = run_for(4, HALF, **whole)
    _, resumed = run_for(4, HALF, str(tmp_path / "checkpoint-2"))
    draws, again = (rows_taken(p, examples(32)) for p in (passes, resumed))
    assert again == draws[2:]
    _, full = run_for(4, {})
    assert [u[2:] for u in draws] == [u[2:] for u in rows_taken(full, examples(32))]


def run_for(updates: int, sam: dict[str, Any], resume: str | None = None, **args: Any) -> Any:
    """A run on shuffled data, from its beginning or from a checkpoint."""
    set_seed(0)
    model = Classifier(dropout=args.pop("dropout", 0.2))
    passes = Passes(model)
    trainer = sam_trainer(
        model,
        examples(32),
        trainer_kwargs={"callbacks": [passes]},
        sam={"sam_rho": RHO, **sam},
        train_sampling_strategy="random",
        gradient_accumulation_steps=2,
        max_steps=updates,
        **args,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, passes


# ---- The random state ---------------------------------------------------------------------------


def test_the_draw_leaves_the_global_random_state_alone():
    states = []
    for sam in ({}, HALF):
        run_for(4, sam, dropout=0.0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Notes:
    """What is seen in both passes: an object that SAM does not take for state of the model."""

    def __init__(self) -> None:
        self.seen: list[dict[float, list[bool]]] = []
        self.marker = object()


class Masks(Classifier):
    """Remembers the dropout mask of each row that passes, by the row's first number."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.notes = Notes()
        self.dropout.register_forward_hook(self.look)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.firsts = x[:, 0].tolist()
        return super().forward(x, labels)

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        masks = (output != 0).tolist()
        self.notes.seen.append(dict(zip(self.firsts, masks, strict=True)))


def masks(
    sam: dict[str, Any], trainer_class: type = SAMTrainer
) -> tuple[list[dict[float, list[bool]]], Tensor]:
    """Those of the passes over whole micro-batches, and the random state at the end."""
    set_seed(0)
    model = Masks()
    trained(model, examples(32), sam, trainer_class, gradient_accumulation_steps=4, max_steps=2)
    return [each for each in model.notes.seen if len(each) == 4], torch.get_rng_state()


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_the_descent_has_the_dropout_masks_of_the_full_run(scope):
    part, after = masks(HALF | {"sam_scope": scope})
    full, after_all = masks({"sam_scope": scope})
    descents = full[1::2] if scope == "micro_batch" else [*full[4:8], *full[12:]]
    assert len(part) == 8
    assert part[0] == descents[0]
    assert part == descents
    assert torch.equal(after, after_all)


def test_micro_batches_that_are_put_off_have_the_dropout_masks_of_the_full_run():
    part, after = masks(HALF, with_sam(WholeBatches))
    full, after_all = masks({})
    assert len(part) == 12
    assert [*part[2:6], *part[8:]] == [*full[4:8], *full[12:]]
    assert torch.equal(after, after_all)
    rows = [tuple(mask) for each in part[2:6] for mask in each.values()]
    assert len(set(rows)) > 12  # of 16 draws of seven bits, few are equal by chance


# ---- The loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "tokens", "micro-batches"])
def test_the_logged_loss_is_an_unbiased_estimate_of_the_loss_of_all_examples(kind):
    if kind == "micro-batches" and not HAS_SAMPLING:
        pytest.skip("this Trainer is made to take examples in order")
    updates, steps = 200, 2
    if kind == "tokens":
        model, data, of = LanguageModel(), sentences(16), token_means
    else:
        model, data, of = Classifier(), examples(16), means
    # A number of examples that is no multiple of the rest, sorted so that places are not alike.
    rows = sorted(data.rows, key=lambda row: int((row["labels"] != -100).sum()))
    data = Rows(rows)
    trainer, _, _ = trained(
        model,
        data,
        HALF,
        with_sam(WholeBatches) if kind == "micro-batches" else SAMTrainer,
        name="input_ids" if kind == "tokens" else "x",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=steps,
        learning_rate=0.0,
        max_steps=updates,
        train_sampling_strategy="random" if kind == "micro-batches" else "sequential",
    )
    parameters = dict(model.named_parameters())
    (shares,) = of(model, windows(rows, 8, steps, 1))
    full = sum(part(parameters) for part in shares).item()
    seen = losses(trainer)
    error = statistics.stdev(seen) / math.sqrt(updates)
    assert 0 < error < 0.02
    assert abs(statistics.mean(seen) - full) < 3 * error
    # The sharpness is the difference to a loss of the same examples: it is biased by no more.
    sharpness = [e["sam_sharpness"] for e in trainer.state.log_history if "sam_sharpness" in e]
    assert statistics.mean(sharpness) > 0


# ---- The weights --------------------------------------------------------------------------------


def part_of_means(model: nn.Module, batches: list[list[Any]]) -> list[Any]:
    """The parts of an ascent's loss that is a mean over the examples that are there."""
    (shares,) = means(model, [batches])
    return shares


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("chosen", ["all", "^first|norm"])
def test_e_is_that_of_the_rows_that_were_taken_and_g_s_that_of_all(steps, chosen):
    model, data, updates = Classifier(), examples(48), 5
    twin = TwinRun(model, {"sam_method": "sam", "sam_params": "" if chosen == "all" else chosen})
    _, spy, passes = trained(
        model,
        data,
        HALF | {"sam_params": chosen},
        gradient_accumulation_steps=steps,
        max_steps=updates,
    )
    taken = rows_taken(passes, data)
    for update, shares in enumerate(means(model, windows(data.rows, 4, steps, updates))):
        parts = [[data.rows[i] for i in rows] for rows in taken[update][:steps]]
        assert all(len(part) == 2 for part in parts)
        twin.update(shares, ascent=part_of_means(model, parts))
        twin.assert_equals(spy.weights[update])


def test_with_token_counts_the_parts_weigh_as_if_they_were_their_micro_batches():
    model, data, updates, steps = LanguageModel(), sentences(40), 5, 2
    twin = TwinRun(model, {"sam_method": "sam"})
    _, spy, passes = trained(
        model,
        data,
        {"sam_ascent_fraction": 0.25},
        name="input_ids",
        gradient_accumulation_steps=steps,
        max_steps=updates,
    )
    taken, loss = rows_taken(passes, data, "input_ids"), share(model)
    batches = windows(data.rows, 4, steps, updates)
    for update, shares in enumerate(token_means(model, batches)):
        count = sum(int((row["labels"] != -100).sum()) for b in batches[update] for row in b)
        ascent = [
            lambda w, rows=rows, n=count / 4: loss(
                w, default_collate([data.rows[i] for i in rows]), num_items_in_batch=n
            )
            for rows in taken[update][:steps]
        ]
        assert all(len(rows) == 1 for rows in taken[update][:steps])
        twin.update(shares, ascent=ascent)
        twin.assert_equals(spy.weights[update])


@pytest.mark.parametrize("kind", ["mean", "tokens"])
def test_where_whole_micro_batches_are_needed_the_ascent_takes_two_of_four(kind):
    steps, updates = 4, 4
    if kind == "mean":
        model, data, of, name = Classifier(), examples(64), means, "x"
    else:
        model, data, of, name = LanguageModel(), sentences(64), token_means, "input_ids"
    twin = TwinRun(model, {"sam_method": "sam"})
    _, spy, passes = trained(
        model,
        data,
        HALF,
        with_sam(WholeBatches),
        name=name,
        gradient_accumulation_steps=steps,
        max_steps=updates,
    )
    assert passes.counts == [6] * updates
    for update, shares in enumerate(of(model, windows(data.rows, 4, steps, updates))):
        rows = rows_taken(passes, data, name)[update]
        assert rows[:2] == rows[2:4] and rows[4] != rows[5]
        twin.update(shares, ascent=shares[:2])
        twin.assert_equals(spy.weights[update])


@pytest.mark.parametrize("name", ["friendly_sam", "vasso", "esam", "asam"])
def test_a_fraction_that_rounds_up_to_all_examples_is_the_full_run_to_the_last_bit(name):
    sam = METHODS.get(name, {"sam_method": name})
    runs = []
    for fraction in (1.0, 0.9):
        set_seed(0)
        options = sam | {"sam_ascent_fraction": fraction}
        trainer, _, _ = trained(Classifier(dropout=0.3), examples(16), options, max_steps=4)
        runs.append(trainer)
    assert_same_run(*runs)


def test_the_sharpness_does_not_depend_on_how_many_micro_batches_the_ascent_leaves_out():
    rows = examples(4).rows
    readings = []
    for fraction in (1.0, 0.5, 0.25):
        torch.manual_seed(0)
        trainer = sam_trainer(
            Classifier(),
            Rows(rows * 4),  # so that all micro-batches have one loss
            with_sam(WholeBatches),
            sam={"sam_rho": RHO, "sam_ascent_fraction": fraction},
            gradient_accumulation_steps=4,
            max_steps=1,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["sam_passes_per_update"] == 1 + fraction
        readings.append(log["sam_sharpness"])
    assert readings[1:] == pytest.approx([readings[0]] * 2, rel=1e-6) and readings[0] > 1e-3

"""Loops with `SAM` against the float64 twins of the papers, after every update."""

from __future__ import annotations

import functools

import pytest
import torch
from loops import KINDS, Loop
from method_twins import METHODS, RHO, TwinRun, windows
from reference_asam import asam_step
from reference_sam import sam_step, value_and_grad
from tiny import Classifier, arguments, examples, weights
from torch.utils.data import default_collate
from twin_runs import by_the_twin, means

from sam_hf import SAMConfig, SAMTrainer

UPDATES = 7
ALL = {"sam": {}, **METHODS}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_the_weights_are_those_of_the_paper_after_every_update(name, steps, kind):
    model, rows = Classifier(), examples(36).rows
    twin = TwinRun(model, ALL[name] | {"sam_method": ALL[name].get("sam_method", "sam")}, mu=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = Loop(kind, model, ALL[name], steps, optimizer)
    for window in windows(rows, 3, steps, UPDATES):
        shares = means(model, [window])[0]
        expected = [loss(twin.w).item() * len(window) for loss in twin.losses(shares)]
        losses = loop.update(window)
        twin.update(shares, selected=loop.selected)
        twin.assert_equals(loop.weights())
        if name != "msam":  # which is never at w
            assert losses == pytest.approx(expected, rel=1e-12)


@every_kind
@pytest.mark.parametrize("name", ["sam", "friendly_sam", "vasso", "esam"])
def test_with_an_e_for_each_micro_batch_they_are_too(name, kind):
    model, rows = Classifier(), examples(36).rows
    options = {"sam_method": "sam", **ALL[name], "sam_scope": "micro_batch"}
    twin, loop = TwinRun(model, options), Loop(kind, model, options, 3)
    for window in windows(rows, 3, 3, UPDATES):
        loop.update(window)
        twin.update(means(model, [window])[0], selected=loop.selected)
        twin.assert_equals(loop.weights())


@every_kind
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("eta", [0.01, 0.2])
def test_asam_is_that_of_the_paper(kind, steps, eta):
    model, rows = Classifier(), examples(36).rows
    updates = windows(rows, 3, steps, UPDATES)
    step = functools.partial(asam_step, eta=eta)
    expected = by_the_twin(model, means(model, updates), 0.7, step=step)
    sam = {"sam_method": "asam", "sam_rho": 0.7, "sam_eta": eta}
    loop = Loop(kind, model, sam, steps)
    for window in updates:
        loop.update(window)
    torch.testing.assert_close(loop.weights(), expected, rtol=0, atol=1e-10)


def weighted(loss, factor, w):
    return factor * loss(w)


def test_an_accumulation_that_ends_early_is_an_update_of_its_own():
    model, rows = Classifier(), examples(30).rows
    updates = windows(rows, 6, 3, 4)  # of 3 and of 2 micro-batches
    assert sorted({len(window) for window in updates}) == [2, 3]
    loop = Loop("plain", model, steps=3)
    expected = by_the_twin(model, means(model, updates))
    for window in updates:
        loop.update(window)
    torch.testing.assert_close(loop.weights(), expected, rtol=0, atol=1e-10)


def test_the_last_micro_batches_of_a_loader_are_an_update_divided_as_accelerate_does():
    """Accelerate divides by `gradient_accumulation_steps`, also where fewer are left."""
    model, rows = Classifier(), examples(20).rows
    loop = Loop("accelerate", model, steps=3)
    loader = loop.accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4))
    window = windows(rows, 4, 3, 2)
    shares = [
        [functools.partial(weighted, f, len(u) / 3) for f in means(model, [u])[0]] for u in window
    ]
    expected = by_the_twin(model, shares)
    for batch in loader:
        with loop.accelerator.accumulate(loop.model):
            loop.sam.backward(lambda: loop.model(**batch)["loss"])  # noqa: B023
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    torch.testing.assert_close(loop.weights(), expected, rtol=0, atol=1e-10)


@every_kind
@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "friendly_sam"])
@pytest.mark.parametrize("steps", [1, 2])
def test_trainer_and_loop_make_the_same_updates(name, steps, kind):
    sam = {"sam_rho": RHO, **({"sam_method": "asam"} if name == "asam" else ALL[name])}
    rows = examples(24)
    trainer = SAMTrainer(
        model=Classifier(),
        args=arguments(max_steps=6, gradient_accumulation_steps=steps, learning_rate=0.1),
        train_dataset=rows,
        sam_config=SAMConfig(**sam),
    )
    torch.manual_seed(0)
    model = Classifier()
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    loop = Loop(kind, model, sam, steps)
    updates = windows(rows.rows, trainer.args.per_device_train_batch_size, steps, 6)
    for window in updates:
        loop.update(window)
    torch.testing.assert_close(loop.weights(), weights(trainer.model), rtol=0, atol=1e-10)


@every_kind
def test_a_penalty_s_gradient_takes_no_part_in_e_and_is_added_to_g_s(kind):
    model, rows = Classifier(), examples(8).rows
    [shares] = means(model, [[rows]])
    trained = dict(model.named_parameters())
    names, w = list(trained), [p.detach().clone() for p in trained.values()]
    by_name = [lambda w, f=f: f(dict(zip(names, w, strict=True))) for f in shares]
    g_s, _ = sam_step(w, by_name, RHO)
    penalty = value_and_grad(lambda w: sum(x.square().sum() for x in w), w)[1]
    for order in ("before", "after"):
        other = Classifier()
        other.load_state_dict(model.state_dict())
        loop = Loop(kind, other)

        def add_penalty(module=other) -> None:
            sum(p.square().sum() for p in module.parameters()).backward()

        if order == "before":
            add_penalty()
        batch = default_collate(rows)
        loop.sam.backward(lambda m=other, b=batch: m(**b)["loss"])
        if order == "after":
            add_penalty()
        for p, a, b in zip(other.parameters(), g_s, penalty, strict=True):
            torch.testing.assert_close(p.grad, a + b, rtol=1e-10, atol=1e-12)


def test_the_ascent_may_leave_out_micro_batches_of_an_update():
    """Their losses are expected to be the mean of the others."""
    model, rows = Classifier(), examples(24).rows
    sam = {"sam_method": "sam", "sam_ascent_fraction": 0.5}
    twin, loop = TwinRun(model, sam), Loop("accelerate", model, sam, 2)
    for window in windows(rows, 3, 2, UPDATES):
        shares = means(model, [window])[0]
        expected = 2 * twin.losses(shares)[0](twin.w).item()
        assert loop.update(window) == pytest.approx([expected] * 2, rel=1e-12)
        twin.update(shares, ascent=shares[:1])
        twin.assert_equals(loop.weights())
    assert loop.sam.metrics()["sam_passes_per_update"] == 1.5


def test_an_accelerator_that_does_not_accumulate_leaves_it_to_the_loop():
    model, rows = Classifier(), examples(36).rows
    updates = windows(rows, 3, 3, UPDATES)
    expected = by_the_twin(model, means(model, updates))
    loop = Loop("accelerate", model)
    for window in updates:
        for number, rows in enumerate(window, 1):
            batch, is_end = default_collate(rows), number == len(window)
            loop.sam.backward(lambda: loop.model(**batch)["loss"] / 3, end_of_update=is_end)  # noqa: B023
            if is_end:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
    torch.testing.assert_close(loop.weights(), expected, rtol=0, atol=1e-10)


def test_layers_that_are_added_during_a_run_are_perturbed_too():
    torch.manual_seed(0)
    model, [rows] = Classifier(), [examples(8).rows]
    loop = Loop("plain", model)
    loop.update([rows])
    model.second = torch.nn.Sequential(model.second, torch.nn.Linear(3, 3, dtype=torch.float64))
    loop.optimizer.add_param_group({"params": model.second[1].parameters()})
    expected = by_the_twin(model, means(model, [[rows]]))
    loop.update([rows])
    torch.testing.assert_close(loop.weights(), expected, rtol=0, atol=1e-10)

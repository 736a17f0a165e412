"""Whole runs of each method: the weights equal the papers' after every update."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from method_twins import METHODS, TwinRun, trained, windows
from reference_aesam import aesam_decides
from safetensors.torch import load_file
from tiny import Classifier, LanguageModel, assert_same_bits, examples, sentences, weights
from torch.utils.data import default_collate
from transformers import TrainerCallback
from twin_runs import assert_same_run, means, token_means

UPDATES = 7
SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1}
OPTIMIZERS = {
    "sgd": (SGD, {"optimizer": "sgd", "mu": 0.9}),
    "adamw": (ADAMW, {"optimizer": "adamw", "rates": 0.01}),
}
SOME = "^first|norm"
every_method = pytest.mark.parametrize("name", METHODS)


def without_decay(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name != "weight_decay"}


# ---- Against the papers -------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    ("optimizer", "steps", "chosen"),
    [("sgd", 1, "all"), ("sgd", 2, SOME), ("adamw", 1, SOME), ("adamw", 2, "all")],
)
def test_the_weights_are_those_of_the_paper_after_every_update(name, optimizer, steps, chosen):
    model, data, sam = Classifier(), examples(36), METHODS[name] | {"sam_params": chosen}
    args, options = OPTIMIZERS[optimizer]
    twin = TwinRun(model, sam | {"sam_params": "" if chosen == "all" else chosen}, **options)
    updates = means(model, windows(data.rows, 3, steps))
    every = twin.method_args.get("k", 1)
    _, spy, passes = trained(
        model,
        data,
        sam,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=steps,
        max_steps=UPDATES,
        **without_decay(args),
    )
    for update, shares in enumerate(updates):
        at_w_plus_e = passes.selected[update][-1]
        twin.update(shares, selected=at_w_plus_e)
        twin.assert_equals(spy.weights[update])
        is_moved = update > 0 if name == "msam" else update % every == 0
        if name == "esam":
            assert at_w_plus_e and set(at_w_plus_e) <= set(twin.chosen)
        else:
            assert at_w_plus_e == (twin.chosen if is_moved else [])
        assert passes.counts[update] == steps * (1 if name == "msam" else 1 + is_moved)


@every_method
def test_with_two_learning_rates_a_schedule_clipping_and_decay_too(name):
    model, data, clip = Classifier(), examples(24), 0.05
    rates = {n: 0.1 if n.startswith("first") else 0.03 for n, _ in model.named_parameters()}
    groups = [
        {"params": [p for n, p in model.named_parameters() if rates[n] == rate], "lr": rate}
        for rate in (0.1, 0.03)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.8, weight_decay=0.05)
    twin = TwinRun(model, METHODS[name], "sgd", rates, clip, mu=0.8, weight_decay=0.05)
    _, spy, passes = trained(
        model,
        data,
        METHODS[name],
        kwargs={"optimizers": (optimizer, None)},
        lr_scheduler_type="linear",
        max_grad_norm=clip,
        max_steps=UPDATES,
    )
    for update, shares in enumerate(means(model, windows(data.rows, 4, 1))):
        schedule = 1 - update / UPDATES
        twin.update(shares, selected=passes.selected[update][-1], schedule=schedule)
        twin.assert_equals(spy.weights[update])


@every_method
def test_ragged_tokens_and_short_last_windows_count_as_in_the_paper(name):
    model, data = LanguageModel(), sentences(10)
    twin = TwinRun(model, METHODS[name], mu=0.9)
    trainer, spy, passes = trained(
        model,
        data,
        METHODS[name],
        name="input_ids",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=-1,
        num_train_epochs=2,
        **SGD,
    )
    assert trainer.state.global_step == 4
    for update, shares in enumerate(token_means(model, windows(data.rows, 2, 3, 4))):
        assert len(shares) == (2 if update % 2 else 3)
        twin.update(shares, selected=passes.selected[update][-1])
        twin.assert_equals(spy.weights[update])


@pytest.mark.parametrize("name", ["friendly_sam", "vasso", "esam"])
@pytest.mark.parametrize("rows", [24, 20])
def test_with_an_e_for_each_micro_batch_the_state_moves_with_each_of_them(name, rows):
    model, data = Classifier(), examples(rows)
    sam = METHODS[name] | {"sam_scope": "micro_batch"}
    twin = TwinRun(model, sam)
    _, spy, passes = trained(model, data, sam, gradient_accumulation_steps=2, max_steps=UPDATES)
    for update, shares in enumerate(means(model, windows(data.rows, 4, 2))):
        assert len(shares) == (1 if rows == 20 and update % 3 == 2 else 2)
        twin.update(shares, selected=passes.selected[update][-1])
        twin.assert_equals(spy.weights[update])


class Sometimes(Classifier):
    """Some batches use one parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, x, labels=None):
        return super().forward(x * self.extra if x[0, 0] > 0 else x, labels)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("msam", "esam")])
def test_a_parameter_that_comes_later_or_not_always_is_that_of_the_paper(name):
    model, data = Sometimes(), examples(28, seed=5)
    uses = [bool(row["x"][0] > 0) for row in data.rows[::4]]
    assert not uses[0] and any(uses) and not all(uses[uses.index(True) :])
    twin = TwinRun(model, METHODS[name])
    _, spy, _ = trained(model, data, METHODS[name], max_steps=UPDATES)
    for update, shares in enumerate(means(model, windows(data.rows, 4, 1))):
        twin.update(shares)
        twin.assert_equals(spy.weights[update])


# ---- Where a method is SAM ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "args", "expected"),
    [
        ("gsam", {"alpha": 0.0}, {}),
        ("looksam", {"k": 1}, {}),
        ("looksam", {"k": 3, "alpha": 0.0}, {"sam_interval": 3}),
        ("wsam", {"gamma": 0.5, "decoupled": False}, {}),
        ("wsam", {"gamma": 0.0, "decoupled": False}, {"sam_rho": 0.0}),
        ("wsam", {"gamma": 0.0}, {"sam_rho": 0.0}),
        ("friendly_sam", {"sigma": 0.0}, {}),
        ("vasso", {"theta": 1.0}, {}),
        ("esam", {"beta": 1.0}, {}),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(f"{v}" for v in part.values()),
)
@pytest.mark.parametrize("steps", [1, 2])
def test_at_its_limit_a_method_is_sam_or_plain_to_the_last_bit(method, args, expected, steps):
    model, sam = Classifier(dropout=0.2), {"sam_method": method, "sam_method_args": args}
    other = copy.deepcopy(model)
    runs = []
    for each, options in ((model, sam), (other, expected)):
        torch.manual_seed(1)
        trainer, _, _ = trained(
            each, examples(56), options, gradient_accumulation_steps=steps, max_steps=UPDATES, **SGD
        )
        runs.append((trainer, torch.get_rng_state()))
    assert_same_run(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


# ---- LookSAM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_looksam_that_starts_between_two_of_its_updates_has_two_passes_at_once(steps):
    model, data = Classifier(), examples(32)
    sam = METHODS["looksam"] | {"sam_start_ratio": 0.2}
    twin = TwinRun(model, sam)
    _, spy, passes = trained(model, data, sam, gradient_accumulation_steps=steps, max_steps=8)
    for update, shares in enumerate(means(model, windows(data.rows, 4, steps, 8))):
        twin.update(shares, is_plain=update < 2)
        twin.assert_equals(spy.weights[update])
    assert passes.counts == [steps * n for n in (1, 1, 2, 2, 1, 1, 2, 1)]


# ---- MSAM ---------------------------------------------------------------------------------------


def test_msam_has_one_pass_and_shows_w_to_callbacks_evaluations_and_checkpoints(tmp_path):
    seen: dict[str, list[dict[str, Any]]] = {}
    model, data, held_out = Classifier(), examples(24), examples(8, seed=5)

    class Looks(TrainerCallback):
        pass

    def look(event: str) -> Any:
        def handler(self, args, state, control, model, **_):
            seen.setdefault(event, []).append(weights(model))

        return handler

    events = ("step_begin", "substep_end", "pre_optimizer_step", "step_end", "log", "evaluate")
    for event in events:
        setattr(Looks, f"on_{event}", look(event))
    trainer, spy, passes = trained(
        model,
        data,
        METHODS["msam"],
        kwargs={"callbacks": [Looks()], "eval_dataset": held_out},
        gradient_accumulation_steps=2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        output_dir=str(tmp_path),
        **ADAMW,
    )
    assert passes.counts == [2, 2, 2]
    assert [len(names) for update in passes.selected for names in update] == [0, 0, 6, 6, 6, 6]
    start = seen["step_begin"][0]
    before = [start, *spy.weights[:-1]]
    for event, expected in (
        ("step_begin", before),
        ("substep_end", before),
        ("pre_optimizer_step", before),
        ("step_end", spy.weights),
        ("evaluate", spy.weights),
    ):
        assert len(seen[event]) >= 3, event
        for actual, w in zip(seen[event], expected, strict=True):
            assert all(torch.equal(actual[n], v) for n, v in w.items()), event
    for actual in seen["log"]:
        assert any(all(torch.equal(actual[n], w[n]) for n in w) for w in spy.weights)
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    for update, w in enumerate(spy.weights):
        saved = load_file(tmp_path / f"checkpoint-{update + 1}" / "model.safetensors")
        assert all(torch.equal(saved[n], v) for n, v in w.items())
        loss = torch.func.functional_call(model, w, kwargs=default_collate(held_out.rows))["loss"]
        assert evaluated[update] == pytest.approx(loss.item(), rel=1e-6)


def test_msam_without_a_momentum_is_refused_in_one_line():
    model = Classifier()
    start = weights(model)
    with pytest.raises(ValueError, match=r"sam_method='msam' needs the optimizer's mom.*SGD") as e:
        trained(model, examples(8), METHODS["msam"], optim="sgd")
    assert "\n" not in str(e.value) and "momentum=0.9" in str(e.value)
    assert_same_bits(model, start)


# ---- ESAM ---------------------------------------------------------------------------------------


def test_esam_draws_parameters_anew_for_each_update_with_probability_beta():
    model = Classifier()
    _, _, passes = trained(model, examples(8), METHODS["esam"], max_steps=60, learning_rate=0.0)
    draws = [tuple(update[-1]) for update in passes.selected]
    assert all(not update[0] for update in passes.selected)  # the ascent is at w
    assert len(set(draws)) > 20 and min(map(len, draws)) >= 1
    share = sum(map(len, draws)) / (60 * 6)
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 360))
    for name, _ in model.named_parameters():
        assert 10 < sum(name in draw for draw in draws) < 50


# ---- The trigger --------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters()})


TRIGGERED = ["gsam", "wsam-coupled", "wsam-decoupled", "friendly_sam", "vasso", "esam"]
RULES = {"sam_trigger_start": 0.6, "sam_trigger_end": -0.5}


@pytest.mark.parametrize("name", ["sam", *TRIGGERED])
@pytest.mark.parametrize("chosen", ["all", SOME])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_trigger_perturbs_the_updates_that_the_rule_says_and_the_others_are_plain(
    name, chosen, interval
):
    total, steps = 12 * interval, 2
    model, data = Classifier(), examples(2 * steps * total)
    rules = RULES if interval == 1 else dict.fromkeys(RULES, 0.3)  # as it counts those asked
    sam = METHODS.get(name, {"sam_method": "sam"}) | rules | {"sam_trigger": "gradient_norm"}
    sam |= {"sam_params": chosen, "sam_interval": interval}
    twin = TwinRun(model, sam | {"sam_params": "" if chosen == "all" else chosen})
    plain, gradients = copy.deepcopy(model), Gradients()
    _, spy, passes = trained(
        model,
        data,
        sam,
        kwargs={"callbacks": [gradients]},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=steps,
        max_steps=total,
    )
    norms, decisions = [], []
    batches = windows(data.rows, 2, steps, total)
    for update, shares in enumerate(means(model, batches)):
        decides = False
        if update % interval == 0:
            norms.append(twin.squared_norm(shares))
            c = (sam["sam_trigger_end"], sam["sam_trigger_start"])
            decides = aesam_decides(norms, total, 0.9, *c)[-1]
            decisions.append(decides)
        if not decides:
            state = spy.weights[update - 1]
            plain.load_state_dict(state)
            plain.zero_grad()
            for rows in batches[update]:
                (plain(**default_collate(rows))["loss"] / steps).backward()
            for n, p in plain.named_parameters():
                assert torch.equal(gradients.seen[update][n], p.grad)
        selected = passes.selected[update][-1]
        assert bool(selected) == decides
        assert passes.counts[update] == steps * (1 + decides)
        twin.update(shares, is_plain=not decides, selected=selected)
        twin.assert_equals(spy.weights[update])
    assert 2 < sum(decisions) < len(decisions) and decisions[0]

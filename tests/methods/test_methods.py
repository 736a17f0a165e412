"""The battery: what holds for every method of the registry that moves the weights for a pass.

A new method needs its rows in TWINS of `applied_twins.py`.
"""

from __future__ import annotations

import itertools
import re
import threading

import pytest
import torch
from applied import (
    NAMES,
    RHO,
    Applied,
    AppliedTwin,
    Inputs,
    NoReads,
    tensors,
)
from applied_twins import TWINS
from combinations import MOVING, WHOLE, every_method_and_scope, has_two_passes
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor

from sam_hf.methods import METHODS, Method

every_method = pytest.mark.parametrize("name", MOVING)
every_twin = pytest.mark.parametrize(
    ("name", "twin"),
    [
        pytest.param(
            name, twin, id="-".join([name, *(f"{k}={v}" for k, v in twin.options.items())])
        )
        for name, twins in TWINS.items()
        for twin in twins
    ],
)
every_bad_number = pytest.mark.parametrize("bad", [0.0, float("inf"), float("-inf"), float("nan")])

NUMBERS = range(12)


def inputs(number: int = 0) -> Inputs:
    """w, g, g_s of one update, in float64."""
    return Inputs(number, *(tensors(3 * number + i) for i in range(3)))


def all_inputs() -> list[Inputs]:
    """Those of a run, in which one parameter is without gradient for some time."""
    run = [inputs(number) for number in NUMBERS]
    for each in run[3:5]:
        each.g[2] = each.g_s[2] = None
    return run


def broken(given: Inputs, bad: float, *, ascent: bool = True, descent: bool = True) -> Inputs:
    """One number of the gradients is not finite; or all of them are zero."""

    def change(xs: list[Tensor]) -> list[Tensor]:
        changed = [torch.zeros_like(x) if bad == 0 else x.clone() for x in xs]
        changed[1][2] = bad
        return changed

    return Inputs(
        given.number,
        given.w,
        change(given.g) if ascent else given.g,
        change(given.g_s) if descent else given.g_s,
    )


def assert_all_close(actual, expected, *, rtol=1e-12, atol=1e-15) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def must_not_wait(monkeypatch) -> None:
    """Take the path of a device whose numbers cannot be read without waiting for it."""
    for module in ("sam_hf.engine.perturbation", "sam_hf.methods.lists"):
        monkeypatch.setattr(f"{module}.reading_is_free", lambda number: False)


def test_every_method_that_moves_the_weights_has_a_twin_written_from_its_paper():
    assert sorted(TWINS) == sorted(MOVING)
    assert all(not twins[0].options for twins in TWINS.values())


@pytest.mark.parametrize("name", METHODS)
def test_the_citation_is_that_of_the_paper_that_the_docstring_names(name):
    citation, docstring = METHODS[name].citation, METHODS[name].__doc__
    entry = dict(re.findall(r"^  (\w+) = \{(.*?)\},?$", citation, re.MULTILINE | re.DOTALL))
    assert entry["url"] in docstring and f"{entry['year']}," in docstring
    title = " ".join(re.sub("[{}]", "", entry["title"]).split())
    assert title in " ".join(docstring.split())
    for author in entry["author"].split(" and "):
        assert author.split(",")[0] in docstring
    assert citation.startswith("@") and citation.count("{") == citation.count("}")


# ---- The perturbation, and what the optimizer gets ---------------------------------------------


@every_twin
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_perturbation_and_the_gradient_equal_the_twin_in_every_update(name, twin, dtype):
    method, reference = Applied(name, twin.options), AppliedTwin(twin)
    is_exact = dtype == torch.float64
    for given in all_inputs():
        e, gradient = reference(given, method.chosen(given.number))
        outcome = method(given.mapped(lambda x: x.to(dtype), w=True))
        assert_all_close(outcome.e, e, rtol=0, atol=1e-14 if is_exact else 1e-6)
        assert_all_close(outcome.result, gradient, rtol=0, atol=1e-13 if is_exact else 3e-5)


@every_twin
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_small_gradients_get_the_perturbation_of_the_twin(
    name, twin, dtype
):
    method, reference = Applied(name, twin.options), AppliedTwin(twin)
    for number in NUMBERS:
        # T² g is far below what fp16 can hold
        full = inputs(number).mapped(lambda x: 1e-4 * x)
        half = Inputs(number, [0.02 * x for x in full.w], full.g, full.g_s).mapped(
            lambda x: x.to(dtype), w=True
        )
        e, gradient = reference(half.mapped(lambda x: x.double(), w=True), method.chosen(number))
        outcome = method(half)
        # what rounding w + e to the narrow type may cost
        assert_all_close(outcome.e, e, rtol=0.01, atol=0.1 * torch.finfo(dtype).eps)
        if not method.method.acts_on_step:  # such a step is swallowed by half precision
            assert_all_close(outcome.gradient, gradient, rtol=0.01, atol=2e-7)


@every_method
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**16])
def test_the_scale_of_the_gradient_does_not_matter(name, factor):
    plain, scaled = Applied(name), Applied(name)
    # Where gradients are remembered, they come without the loss scale, which changes.
    run = [inputs()] if METHODS[name].remembers_gradients else all_inputs()
    for given in run:
        one, other = plain(given), scaled(given.mapped(lambda x: x * factor))
        assert_all_close(other.e, one.e)
        back = [None if g is None else g / factor for g in other.gradient]
        assert_all_close(back, one.gradient, atol=1e-14)


@every_method
def test_the_perturbation_grows_in_proportion_to_rho_and_raises_the_loss_to_first_order(name):
    method, given = Applied(name), inputs()
    e, doubled = method(given).e, Applied(name, rho=2 * RHO)(given).e
    assert_all_close(doubled, [2 * x for x in e])
    raised = sum((x * y).sum() for x, y in zip(given.g, e, strict=True))
    # against the momentum, along which the loss has risen
    assert raised < 0 if METHODS[name].along_momentum else raised > 0


@every_method
def test_the_norm_is_that_of_all_parameters_together(name):
    """Cutting a tensor in two pieces changes nothing."""

    def cut(xs):
        return [xs[0][:1], xs[0][1:], *xs[1:]]

    whole = Applied(name, takes_all=True)
    pieces = Applied(name, names=["a.weight", "b.weight", *NAMES[1:]], takes_all=True)
    for given in map(inputs, NUMBERS):
        one, parts = (
            whole(given),
            pieces(Inputs(given.number, *map(cut, (given.w, given.g, given.g_s)))),
        )
        for xs, ys in ((one.e, parts.e), (one.result, parts.result)):
            assert_all_close([torch.cat(ys[:2]), *ys[2:]], xs, atol=1e-13)


@every_method
def test_the_norm_is_that_of_the_parts_on_all_processes(name):
    """Each of two processes holds a half of each tensor, and `dot` alone goes over both."""
    barrier, shares, outcomes = threading.Barrier(2, timeout=20), [None, None], [[], []]

    def halves(given: Inputs, rank: int) -> Inputs:
        w, g, g_s = ([x.chunk(2)[rank] for x in xs] for xs in (given.w, given.g, given.g_s))
        return Inputs(given.number, w, g, g_s)

    def process(rank: int) -> None:
        def dot(xs, ys):
            shares[rank] = sum((x * y).sum() for x, y in zip(xs, ys, strict=True))
            barrier.wait()
            total = shares[0] + shares[1]
            barrier.wait()
            return total

        method = Applied(name, dot=dot)
        outcomes[rank] = [method(halves(inputs(number), rank)) for number in NUMBERS]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    method = Applied(name)
    for number, first, second in zip(NUMBERS, *outcomes, strict=True):
        whole = method(inputs(number))
        for xs, *parts in (
            (whole.e, first.e, second.e),
            (whole.result, first.result, second.result),
        ):
            assert_all_close(map(torch.cat, zip(*parts, strict=True)), xs, atol=1e-13)


@every_method
def test_the_ascent_gradient_comes_back_from_the_perturbation(name):
    if METHODS[name].ascent_gradient is Method.ascent_gradient:
        # Then there is no `sam_grad_cosine`, and the docstring says so; but for one pass.
        assert not has_two_passes(METHODS[name]) or "sam_grad_cosine" in METHODS[name].__doc__
        return
    given, method = inputs(), Applied(name)
    e, chosen = method(given).e, method.chosen(0)
    names, w, g, e = (list(itertools.compress(xs, chosen)) for xs in (NAMES, given.w, given.g, e))
    back = method.method.ascent_gradient(names, w, e)
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (back, g))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - 1e-12


# ---- Gradients that are no direction ----------------------------------------------------------


@every_method
@every_bad_number
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("waits", [False, True])
def test_a_zero_or_non_finite_gradient_perturbs_nothing(name, bad, dtype, waits, monkeypatch):
    if waits:
        must_not_wait(monkeypatch)
    method = Applied(name, WHOLE.get(name))
    for given in (broken(inputs(), bad), inputs(1), broken(inputs(2), bad)):
        outcome = method(given.mapped(lambda x: x.to(dtype), w=True))
        if given.number != 1:
            assert all(torch.equal(e, torch.zeros_like(e)) for e in outcome.e)


@every_method
@every_bad_number
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("options", [{}, WHOLE], ids=["default", "whole"])
def test_after_a_zero_or_non_finite_gradient_all_is_as_if_it_had_never_come(
    name, bad, waits, options, monkeypatch
):
    if waits:
        must_not_wait(monkeypatch)
    numbers = (0, 5, 6, 7, 10)
    for position, number in enumerate(numbers):
        if position == 0 and METHODS[name].reuses and options is not WHOLE:
            continue  # the device alone knows that nothing is there to be reused
        disturbed, undisturbed = (Applied(name, options.get(name)) for _ in range(2))
        for each in numbers:
            if each == number:
                disturbed(broken(inputs(each), bad))
            else:
                ours, theirs = disturbed(inputs(each)), undisturbed(inputs(each))
                for xs, ys in ((ours.e, theirs.e), (ours.result, theirs.result)):
                    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
        for slot, kept in undisturbed.state.items():
            assert all(torch.equal(disturbed.state[slot][name], x) for name, x in kept.items())


@every_twin
@every_bad_number
@pytest.mark.parametrize("waits", [False, True])
def test_a_descent_gradient_that_is_zero_or_not_finite_is_survived_as_by_the_twin(
    name, twin, bad, waits, monkeypatch
):
    if waits:
        must_not_wait(monkeypatch)
    method, reference = Applied(name, twin.options), AppliedTwin(twin)
    for given in all_inputs():
        if given.number in (1, 5, 8):
            given = broken(given, bad, ascent=False)
        e, gradient = reference(given, method.chosen(given.number))
        outcome = method(given)
        assert_all_close(outcome.e, e, rtol=0, atol=1e-14)
        if all(g is None or g.isfinite().all() for g in gradient):
            assert_all_close(outcome.result, gradient, rtol=0, atol=1e-13)
        else:
            # A scaler must see it, or the optimizer would step.
            assert not all(g.isfinite().all() for g in outcome.gradient)
        assert all(x.isfinite().all() for slot in method.state.values() for x in slot.values())


# ---- On the device ----------------------------------------------------------------------------


@every_twin
def test_a_device_that_must_not_be_waited_for_gets_the_same_and_is_not_waited_for(
    name, twin, monkeypatch
):
    method = Applied(name, twin.options)
    expected = [method(given) for given in all_inputs()]
    must_not_wait(monkeypatch)
    method = Applied(name, twin.options, guard=NoReads)
    for given, outcome in zip(all_inputs(), expected, strict=True):
        actual = method(given)
        assert_all_close(actual.e, outcome.e)
        assert_all_close(actual.result, outcome.result, atol=1e-14)


# ---- Beside the optimizer's step --------------------------------------------------------------


def test_wsam_decoupled_leaves_the_gradient_at_w_to_the_optimizer():
    given = inputs()
    outcome = Applied("wsam")(given)
    assert all(torch.equal(x, y) for x, y in zip(outcome.gradient, given.g, strict=True))


# ---- In a training run ------------------------------------------------------------------------

moves = every_method_and_scope(lambda method: method.perturbs)


@moves
def test_a_training_run_never_shows_perturbed_weights(method, scope):
    model, data = Classifier(dropout=0.3), examples(16)
    trainer = sam_trainer(
        model,
        data,
        sam={"sam_method": method, "sam_scope": scope, "sam_rho": RHO},
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        optim="adamw_torch" if METHODS[method].along_momentum else "sgd",
    )
    before = weights(model)
    trainer.train()
    assert_same_bits(model, before)
    first, second = trainer.state.log_history[:2]
    if METHODS[method].along_momentum:  # which is there after the first step
        assert second["sam_perturbation_norm"] == pytest.approx(RHO)
    else:
        assert first["sam_sharpness"] != 0


@moves
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(method, scope, tmp_path):
    interval = 1 if METHODS[method].reuses else 2
    sam = {"sam_method": method, "sam_scope": scope, "sam_rho": RHO, "sam_interval": interval}

    def run(resume=None, **args):
        torch.manual_seed(3)
        trainer = sam_trainer(
            Classifier(dropout=0.3),
            examples(40),
            sam=sam,
            optim="adamw_torch",
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=6,
            output_dir=str(tmp_path),
            save_strategy="steps",
            save_steps=3,
            train_sampling_strategy="random",
            **args,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, torch.get_rng_state()

    straight, straight_rng = run()
    resumed, resumed_rng = run(resume=str(tmp_path / "checkpoint-3"))
    assert_same_bits(resumed.model, weights(straight.model))
    assert torch.equal(straight_rng, resumed_rng)

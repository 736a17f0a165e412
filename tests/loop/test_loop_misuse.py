"""What a loop with `SAM` may get wrong: one clear error each."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from loops import new_accelerator
from tiny import Classifier, examples
from torch import nn
from torch.utils.data import DataLoader, default_collate

from sam_hf import SAM, SAMConfig

BATCH = default_collate(examples(6).rows)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def new(**options) -> tuple[nn.Module, torch.optim.Optimizer, SAM]:
    model = Classifier()
    optimizer = sgd(model)
    return model, optimizer, SAM(model, optimizer, SAMConfig(**options))


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: SAM(m.parameters(), sgd(m)), TypeError, "takes the model, got parameters"),
        (lambda m: SAM(list(m.parameters()), sgd(m)), TypeError, "takes the model, got parameters"),
        (lambda m: SAM(m, torch.optim.SGD), TypeError, "an optimizer instance, got the class SGD"),
        (lambda m: SAM(m, sgd(m), 0.05), TypeError, "config=0.05 is not allowed"),
        (lambda m: SAM(m, sgd(Classifier())), ValueError, "steps no parameter of the model"),
        (lambda m: SAM(m, NeedsClosure(m.parameters())), ValueError, "evaluates the loss itself"),
        (
            lambda m: SAM(m, sgd(m), SAMConfig(sam_start_ratio=0.5)),
            ValueError,
            "sam_start_ratio=0.5 depends on the length of the run. Pass total_steps=",
        ),
        (
            lambda m: SAM(m, sgd(m), SAMConfig(sam_rho=0.1, sam_rho_schedule="cosine")),
            ValueError,
            "sam_rho_schedule='cosine' depends",
        ),
        (
            lambda m: SAM(m, sgd(m), SAMConfig(sam_trigger="gradient_norm")),
            ValueError,
            "sam_trigger='gradient_norm' depends",
        ),
        (lambda m: SAM(m, sgd(m), total_steps=0), ValueError, "total_steps=0 is not allowed"),
        (
            lambda m: SAM(m, sgd(m), SAMConfig(sam_rho=0.1, sam_ascent_fraction=0.5)),
            ValueError,
            "sam_ascent_fraction=0.5 leaves out whole micro-batches",
        ),
        (
            lambda m: SAM(m, sgd(m), SAMConfig(sam_rho=0.1, sam_method="bilora")),
            ValueError,
            "only SAMTrainer does",
        ),
        (
            lambda m: SAM(m, sgd(m), SAMConfig(sam_params="nothing")),
            ValueError,
            "sam_params='nothing' selects no trainable parameter",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        make(Classifier())


def closures(model):
    hidden = model.first(BATCH["x"])
    loader = iter(DataLoader(examples(6), batch_size=2))
    cycle = itertools.cycle([BATCH])
    generator = (row for row in examples(6))
    return {
        "a loss": (model(**BATCH)["loss"], TypeError, "takes a function .* got a Tensor"),
        "none": (lambda: None, TypeError, "returned nothing"),
        "no loss": (lambda: model(BATCH["x"])["logits"].sum, TypeError, "returned a builtin"),
        "a dict": (lambda: {"losses": 1}, TypeError, "returned a dict"),
        "a vector": (lambda: model(**BATCH)["logits"], ValueError, r"of shape \(6, 3\)"),
        "detached": (lambda: model(**BATCH)["loss"].detach(), ValueError, "without a graph"),
        "a graph": (lambda: model.second(hidden).sum(), RuntimeError, "computed with gradients"),
        "a loader": (lambda: model(**next(loader))["loss"], RuntimeError, "reads from 'loader'"),
        "a cycle": (lambda: model(**next(cycle))["loss"], RuntimeError, "'cycle'"),
        "a generator": (lambda: model(**next(generator))["loss"], RuntimeError, "'generator'"),
    }


@pytest.mark.parametrize("name", closures(Classifier()))
def test_a_closure_that_cannot_be_replayed_is_told_and_costs_nothing(name):
    model, optimizer, sam = new()
    before = [p.detach().clone() for p in model.parameters()]
    closure, error, message = closures(model)[name]
    with pytest.raises(error, match=message):
        sam.backward(closure)
    optimizer.zero_grad()
    sam.backward(lambda: model(**BATCH)["loss"])
    for p, w in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, w)


def test_gradients_that_are_disabled_are_told():
    model, _, sam = new()
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are disabled"):
        sam.backward(lambda: model(**BATCH)["loss"])


def test_a_step_in_the_middle_of_an_update_is_refused():
    model, optimizer, sam = new()
    sam.backward(lambda: model(**BATCH)["loss"], end_of_update=False)
    with pytest.raises(RuntimeError, match=r"incomplete update \(micro-batches so far: 1\)"):
        optimizer.step()
    sam.backward(lambda: model(**BATCH)["loss"])
    optimizer.step()


def test_two_updates_without_a_step_keep_both_gradients_with_one_warning():
    model, optimizer, sam = new(sam_rho=1e-9)
    sam.backward(lambda: model(**BATCH)["loss"])
    with pytest.warns(
        UserWarning, match=r"before optimizer.step\(\): each call has a pert"
    ) as said:
        sam.backward(lambda: model(**BATCH)["loss"])
    total = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**BATCH)["loss"].backward()
    expected = [2 * p.grad for p in model.parameters()]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.backward(lambda: model(**BATCH)["loss"])  # said once
        model, optimizer, sam = new()
        for _ in range(3):  # and not at all where the loop steps
            for is_end in (False, True):
                sam.backward(lambda m=model: m(**BATCH)["loss"], end_of_update=is_end)
            optimizer.step()
    assert len(said) == 1


def test_a_closure_that_calls_backward_itself_is_told():
    model, _, sam = new()

    def closure():
        loss = model(**BATCH)["loss"]
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="second time") as error:
        sam.backward(closure)
    assert "calls backward() itself" in error.value.__notes__[0]


def test_two_updates_without_a_step_are_refused_where_that_loses_gradient():
    model, optimizer, sam = new(sam_method="wsam")
    sam.backward(lambda: model(**BATCH)["loss"])
    with pytest.raises(RuntimeError, match=r"before optimizer.step\(\)"):
        sam.backward(lambda: model(**BATCH)["loss"])
    optimizer.step()
    sam.backward(lambda: model(**BATCH)["loss"])


def test_end_of_update_is_refused_where_accelerate_tells_it():
    accelerator, model = new_accelerator(steps=2), Classifier()
    model, optimizer = accelerator.prepare(model, sgd(model))
    sam = SAM(model, optimizer, accelerator=accelerator)
    with pytest.raises(ValueError, match="no effect with gradient_accumulation_steps=2"):
        sam.backward(lambda: model(**BATCH)["loss"], end_of_update=False)


def test_what_belongs_to_accelerate_is_not_mixed_with_a_loop_without_it():
    accelerator, model = new_accelerator(), Classifier()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with pytest.raises(ValueError, match="Pass accelerator= to SAM too"):
        SAM(model, optimizer)
    with pytest.raises(ValueError, match="scaler= is for loops without Accelerate"):
        SAM(model, optimizer, accelerator=accelerator, scaler=torch.amp.GradScaler("cpu"))


def test_an_end_of_an_update_that_is_not_reduced_is_refused():
    model, _, sam = new()
    model.require_backward_grad_sync = False  # as within no_sync() of DDP
    with pytest.raises(ValueError, match="Pass end_of_update=False"):
        sam.backward(lambda: model(**BATCH)["loss"])
    sam.backward(lambda: model(**BATCH)["loss"], end_of_update=False)


def test_a_state_that_is_none_and_a_model_as_the_closure_are_told():
    model, _, sam = new()
    with pytest.raises(ValueError, match=r"has the keys \[\]. Allowed"):
        sam.load_state_dict({})
    with pytest.raises(TypeError, match="got a Classifier"):
        sam.backward(model)


def test_after_gradients_were_lost_the_next_update_is_a_new_one():
    model, optimizer, sam = new(sam_rho=1e-9)
    sam.backward(lambda: model(**BATCH)["loss"], end_of_update=False)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="Gradients were changed"):
        sam.backward(lambda: model(**BATCH)["loss"])
    optimizer.zero_grad(set_to_none=False)
    sam.backward(lambda: model(**BATCH)["loss"])
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**BATCH)["loss"].backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradients_that_are_changed_between_micro_batches_are_told():
    model, _, sam = new()
    sam.backward(lambda: model(**BATCH)["loss"], end_of_update=False)
    sum(p.square().sum() for p in model.parameters()).backward()
    with pytest.raises(RuntimeError, match="Gradients were changed between two micro-batches"):
        sam.backward(lambda: model(**BATCH)["loss"])

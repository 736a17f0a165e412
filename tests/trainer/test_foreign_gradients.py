"""Gradient that the recorded losses do not explain, and losses that reach no perturbed parameter.

What others add to `.grad` takes no part in e, and the optimizer steps with g_s plus that gradient.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mlp import MLP, TINY_RHO, above, assert_same_weights, below, build, plain, trained
from reference_asam import asam_step
from reference_gsam import gsam_step
from reference_sam import Gradient, add, sam_step
from tiny import Rows, Spy, examples, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback
from twin_runs import RHO, assert_weights, by_the_twin, means, share

from sam_hf import SAMTrainer

GSAM = {"sam_method": "gsam", "sam_method_args": {"alpha": 0.4}}
METHODS = {"sam": {}, "asam": {"sam_method": "asam"}, "gsam": GSAM}
METHODS_AND_SCOPES = [
    (method, scope)
    for method in METHODS
    for scope in ("batch", "micro_batch")
    if (method, scope) != ("gsam", "micro_batch")  # not allowed together
]

all_scopes = pytest.mark.parametrize("scope", ["batch", "micro_batch"])
all_places = pytest.mark.parametrize("place", [above, below])
all_methods = pytest.mark.parametrize(("method", "scope"), METHODS_AND_SCOPES)


class Spare(MLP):
    """Has a parameter that the loss does not use: its gradient is that of the penalty alone."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(4, dtype=torch.float64))


def penalty(model: nn.Module, k: int) -> Tensor:
    """The share of one of the k micro-batches of an update."""
    return 10 / k * sum(p.square().sum() for p in model.parameters())


def penalised(order: str, by: str = "tensor", only: Callable[[int, int], bool] | None = None):
    """Overrides `training_step` by one that runs a backward of its own next to super's.

    `only(i, k)` tells whether it does so in micro-batch i of the k of an update.
    """

    class Penalised:
        steps = 0

        def training_step(
            self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
        ) -> Tensor:
            if order == "before":
                self.penalise(model)
            loss = super().training_step(model, inputs, num_items_in_batch)
            if order == "after":
                self.penalise(model)
            self.steps += 1
            return loss

        def penalise(self, model: nn.Module) -> None:
            k = self.args.gradient_accumulation_steps
            if only is not None and not only(self.steps % k, k):
                return
            if by == "tensor":
                penalty(model, k).backward()
            else:
                self.accelerator.backward(penalty(model, k))

    return Penalised


def trained_or_refused(trainer: Any, may_be_refused: bool) -> bool:
    """Train. Whether that was refused, with the reason and the way out."""
    if not may_be_refused:
        trainer.train()
        return False
    try:
        trainer.train()
    except (RuntimeError, ValueError) as error:
        assert re.search(r"training_step.*(compute_loss|sam_rho=0)", str(error)), error
        return True
    return False


def assert_as_plain(theirs: type, place: Any, may_be_refused: bool = False, **kwargs: Any) -> None:
    """At a tiny rho the weights after each update are those of plain training."""
    sam = {"sam_rho": TINY_RHO, **kwargs.pop("sam", {})}
    expected, spy = Spy(), Spy()
    begin = trained(plain(theirs), Spare, trainer_kwargs={"callbacks": [expected]}, **kwargs)
    assert begin.state.global_step == 3
    trainer = build(place(theirs), Spare, sam=sam, trainer_kwargs={"callbacks": [spy]}, **kwargs)
    before = weights(trainer.model)
    if trained_or_refused(trainer, may_be_refused):
        done = trainer.state.global_step
        assert_close(weights(trainer.model), [before, *expected.weights][done], rtol=0, atol=1e-6)
    else:
        assert_close(spy.weights, expected.weights, rtol=0, atol=1e-6)


# ---- A backward of one's own next to the training step -----------------------------------------

# Only what is there before SAM's own training step cannot be refused.
PLACES = [
    pytest.param(above, "before", id="above-before"),
    pytest.param(above, "after", id="above-after"),
    pytest.param(below, "before", id="below-before"),
    pytest.param(below, "after", id="below-after"),
]
all_places_and_orders = pytest.mark.parametrize(("place", "order"), PLACES)


def may_be_refused(place: Any, order: str) -> bool:
    return (place, order) != (above, "before")


@all_places_and_orders
@all_methods
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_penalty_with_a_backward_of_its_own_trains_as_plain_at_a_tiny_rho(
    place, order, method, scope, accumulation
):
    assert_as_plain(
        penalised(order),
        place,
        may_be_refused(place, order),
        sam={**METHODS[method], "sam_scope": scope},
        accumulation=accumulation,
    )


@all_places_and_orders
@all_scopes
@pytest.mark.parametrize(
    "only",
    [
        pytest.param(lambda i, k: i == 0, id="first"),
        pytest.param(lambda i, k: i == 1, id="second"),
        pytest.param(lambda i, k: i == k - 1, id="last"),
    ],
)
def test_a_penalty_in_one_micro_batch_of_the_update_trains_as_plain_at_a_tiny_rho(
    place, order, scope, only
):
    theirs = penalised(order, only=only)
    refusable = may_be_refused(place, order)
    assert_as_plain(theirs, place, refusable, sam={"sam_scope": scope}, accumulation=3)


@all_places_and_orders
@all_scopes
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_penalty_through_the_accelerator_trains_as_plain_at_a_tiny_rho(
    place, order, scope, accumulation
):
    assert_as_plain(
        penalised(order, by="accelerator"),
        place,
        may_be_refused(place, order),
        sam={"sam_scope": scope},
        accumulation=accumulation,
    )


@all_places_and_orders
@pytest.mark.parametrize("optim", [{"optim": "adamw_torch"}, {"max_grad_norm": 0.5}])
def test_a_penalty_trains_as_plain_at_a_tiny_rho_with_adamw_and_with_clipping(place, order, optim):
    refusable = may_be_refused(place, order)
    assert_as_plain(penalised(order), place, refusable, accumulation=3, **optim)


@all_places_and_orders
@all_scopes
def test_a_penalty_that_begins_in_the_second_update_trains_as_plain_at_a_tiny_rho(
    place, order, scope
):
    class Later(penalised(order)):
        def penalise(self, model: nn.Module) -> None:
            if self.state.global_step > 0:
                super().penalise(model)

    refusable = may_be_refused(place, order)
    assert_as_plain(Later, place, refusable, sam={"sam_scope": scope}, accumulation=3)


class InComputeLoss:
    """A part of the recorded call: it is replayed with it."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        penalty(model, self.args.gradient_accumulation_steps).backward()
        return super().compute_loss(model, *args, **kwargs)


@all_places
@all_methods
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_backward_within_compute_loss_trains_as_plain_at_a_tiny_rho(
    place, method, scope, accumulation
):
    sam = {**METHODS[method], "sam_scope": scope}
    assert_as_plain(InComputeLoss, place, sam=sam, accumulation=accumulation)


class PenaltyCallback(TrainerCallback):
    """Adds the gradient of a penalty between the training steps."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.penalise)

    def penalise(self, args: Any, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        penalty(model, args.gradient_accumulation_steps).backward()


@all_scopes
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"])
def test_gradient_that_a_callback_adds_trains_as_plain_at_a_tiny_rho(event, scope):
    class Theirs:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(PenaltyCallback(event))

    assert_as_plain(Theirs, above, sam={"sam_scope": scope}, accumulation=3)


# ---- It takes no part in e ---------------------------------------------------------------------

TWINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sam": (sam_step, {}),
    "asam": (asam_step, {"eta": 0.01}),
    "gsam": (gsam_step, {"alpha": 0.4}),
}


@all_places_and_orders
@all_methods
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_optimizer_steps_with_g_s_of_the_loss_alone_plus_the_gradient_of_the_penalty(
    place, order, method, scope, accumulation
):
    twin, options = TWINS[method]
    if method != "gsam":
        options = options | {"scope": scope}

    def step(w: list[Tensor], losses: Any, rho: float, **kwargs: Any) -> tuple[Gradient, Any]:
        g_s, readings = twin(w, losses, rho, **kwargs)
        foreign = [20 * w_i for w_i in w]
        return [add(a, b) for a, b in zip(g_s, foreign, strict=True)], readings

    sam = {"sam_rho": RHO, **METHODS[method], "sam_scope": scope}
    trainer = build(place(penalised(order)), Spare, accumulation, sam=sam)
    rows, k = list(trainer.train_dataset), accumulation
    batches = [rows[i : i + 4] for i in range(0, 12 * k, 4)]
    windows = [batches[i : i + k] for i in range(0, 3 * k, k)]
    expected = by_the_twin(trainer.model, means(trainer.model, windows), step=step, **options)
    if not trained_or_refused(trainer, may_be_refused(place, order)):
        assert_weights(trainer.model, expected)
        if method == "sam":
            assert trainer.state.log_history[0]["sam_perturbation_norm"] == pytest.approx(RHO)


# ---- Two calls of the training step for one batch ------------------------------------------------


class Halves:
    """Calls `training_step` on the two halves of the batch."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        losses = []
        for half in (slice(0, 2), slice(2, 4)):
            part = {name: value[half] for name, value in inputs.items()}
            losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()


@all_places
@all_methods
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_two_training_steps_on_halves_of_the_batch_train_as_plain_at_a_tiny_rho(
    place, method, scope, accumulation
):
    sam = {**METHODS[method], "sam_scope": scope}
    assert_as_plain(Halves, place, sam=sam, accumulation=accumulation)


@all_scopes
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_second_half_of_the_batch_has_an_e_of_its_own_and_its_g_s_is_added(scope, accumulation):
    # With scope "batch", the first half of the last micro-batch completes the update's e.
    trainer = build(above(Halves), MLP, accumulation, sam={"sam_rho": RHO, "sam_scope": scope})
    loss, rows, k = share(trainer.model), list(trainer.train_dataset), accumulation

    def part(rows: list[Any]) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda w: (
            sum(loss(w, default_collate(rows[i : i + 2])) for i in range(0, len(rows), 2)) / k
        )

    updates = []
    for i in range(0, 12 * k, 4 * k):
        window = rows[i : i + 4 * k]
        halves = [window[j : j + 2] for j in range(0, 4 * k, 2)]
        updates.append(
            [part(window[:-2]), part(window[-2:])] if scope == "batch" else [*map(part, halves)]
        )
    expected = by_the_twin(trainer.model, updates, scope="micro_batch")
    trainer.train()
    assert_weights(trainer.model, expected)


# ---- Losses that reach no perturbed parameter ----------------------------------------------------


class Block(nn.Module):
    """A residual branch with a norm, left out where `skips()` says so."""

    def __init__(self, skips: Callable[[], bool]) -> None:
        super().__init__()
        self.norm, self.linear, self.skips = nn.LayerNorm(5), nn.Linear(5, 5), skips

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and self.skips() else x + self.linear(self.norm(x))


class Marked(nn.Module):
    """Leaves its block out for micro-batches that the data mark."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.block = Block(lambda: self.skips)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, labels: Tensor, skip: Tensor) -> dict[str, Tensor]:
        self.skips = bool(skip.any())
        logits = self.head(torch.tanh(self.block(torch.tanh(self.first(x)))))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def marked(marks: str) -> Rows:
    """Four rows for each micro-batch; '-' marks those that leave the block out."""
    rows = examples(4 * len(marks)).rows
    return Rows([row | {"skip": torch.tensor(marks[i // 4] == "-")} for i, row in enumerate(rows)])


MARKS = {
    "the first micro-batch": ("-xxx" * 3, 4),
    "the second micro-batch": ("x-xx" * 3, 4),
    "the last micro-batch": ("xxx-" * 3, 4),
    "all but the last micro-batch": ("---x" * 3, 4),
    "a whole update of four": ("xxxx----x-xx", 4),
    "the first update": ("-xx", 1),
    "the second update": ("x-x", 1),
    "the last update": ("xx-", 1),
    "every update": ("---", 1),
}
SAM_OF_NORMS = [
    pytest.param({**METHODS[m], "sam_scope": s, "sam_params": "norms"}, id=f"{m}-{s}")
    for m, s in METHODS_AND_SCOPES
]


@pytest.mark.parametrize("sam", SAM_OF_NORMS)
@pytest.mark.parametrize("case", MARKS)
def test_micro_batches_that_reach_no_perturbed_parameter_train_as_plain_at_a_tiny_rho(case, sam):
    marks, k = MARKS[case]
    runs = [
        trained(trainer_class, Marked, k, marked(marks), sam={"sam_rho": TINY_RHO, **sam})
        for trainer_class in (SAMTrainer, Trainer)
    ]
    assert_same_weights(*(run.model for run in runs))


@all_scopes
@pytest.mark.parametrize("case", MARKS)
def test_e_is_zero_where_no_perturbed_parameter_has_a_gradient(case, scope):
    marks, k = MARKS[case]
    sam = {"sam_rho": RHO, "sam_scope": scope, "sam_params": "norms"}
    trainer = build(SAMTrainer, Marked, k, marked(marks), sam=sam)
    rows = trainer.train_dataset.rows
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    windows = [batches[i : i + k] for i in range(0, len(batches), k)]
    expected = by_the_twin(
        trainer.model,
        means(trainer.model, windows),
        scope=scope,
        perturbed=["norm" in name for name, _ in trainer.model.named_parameters()],
    )
    trainer.train()
    assert_weights(trainer.model, expected)


DRAWS = {"torch": lambda: torch.rand(()).item(), "random": random.random, "numpy": np.random.rand}


@pytest.mark.parametrize("sam", SAM_OF_NORMS)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("source", DRAWS)
def test_stochastic_depth_with_perturbed_norms_trains_as_plain_at_a_tiny_rho(
    source, accumulation, sam
):
    def run(trainer_class: type) -> tuple[nn.Module, list[bool]]:
        skipped = []

        def skips() -> bool:
            skipped.append(DRAWS[source]() < 0.5)
            return skipped[-1]

        model = trained(
            trainer_class,
            lambda: MLP(Block(skips)),
            accumulation,
            sam={"sam_rho": TINY_RHO, **sam},
            max_steps=6,
        ).model
        return model, skipped

    (ours, _), (expected, skipped) = run(SAMTrainer), run(Trainer)
    assert len(skipped) == 6 * accumulation and 0 < sum(skipped) < len(skipped)
    assert_same_weights(ours, expected)


# ---- What a replay would not repeat --------------------------------------------------------------


@all_scopes
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_through_the_accelerator_keeps_its_gradient_with_some_parameters_perturbed(
    accumulation, scope
):
    theirs = penalised("after", by="accelerator")
    sam = {"sam_params": "first", "sam_scope": scope}
    assert_as_plain(theirs, below, sam=sam, accumulation=accumulation)


def test_a_penalty_in_the_backward_pass_of_the_loss_is_refused_though_it_is_not_returned():
    class Joined:
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss + penalty(model, 1))
            return loss.detach()

    trainer = build(below(Joined), Spare)
    with pytest.raises(RuntimeError, match=r"training_step adds something.*in compute_loss"):
        trainer.train()


def test_an_input_that_is_changed_after_the_loss_is_told_before_the_replay():
    class Zeroes:
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            inputs["x"].zero_()
            return loss

    with pytest.warns(UserWarning, match="wrote into the input .*x.* in place"):
        build(above(Zeroes), accumulation=2).train()

"""torch.compile: the second pass runs what the first pass compiled, on the same dropout masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow import slow_unless
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback

from sam_hf import SAMTrainer

UPDATES = 5

all_scopes = pytest.mark.parametrize("scope", ["batch", "micro_batch"])


class Compilations(TrainerCallback):
    """What has been compiled up to the end of each update."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        graphs, inductor = counters["stats"]["unique_graphs"], counters["inductor"]
        lowered = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_hit"]
        self.seen.append((graphs, sum(counters["frames"].values()), lowered))


def trained(
    model: nn.Module, rows: Any, backend: str | None, sam: dict[str, Any] | None, **args: Any
) -> list[tuple[int, ...]]:
    """Train the model in place; what each update had compiled. Without `sam`, plainly."""
    torch._dynamo.reset()
    counters.clear()
    compilations = Compilations()
    if backend is not None:
        args |= {"torch_compile": True, "torch_compile_backend": backend}
    sam_trainer(
        model,
        rows,
        Trainer if sam is None else SAMTrainer,
        {"callbacks": [compilations], "eval_dataset": rows},
        sam,
        gradient_accumulation_steps=2,
        **{"max_steps": UPDATES, **args},
    ).train()
    return compilations.seen


def classifier(backend: str | None, sam: dict[str, Any] | None, dropout: float) -> Any:
    torch.manual_seed(0)
    model = Classifier(dropout)
    return trained(model, examples(8 * UPDATES), backend, sam), weights(model)


# A model that draws no masks: inductor's dropout is not the eager one, see below.
@all_scopes
@pytest.mark.parametrize(
    "backend, method",
    [
        ("aot_eager", "asam"),
        pytest.param("inductor", "sam", marks=pytest.mark.slow),  # a C++ compiler is run
        pytest.param("inductor", "asam", marks=pytest.mark.slow),
    ],
)
def test_all_is_compiled_in_the_first_update_and_the_weights_are_the_eager_ones(
    backend, method, scope
):
    sam = {"sam_rho": 0.3, "sam_method": method, "sam_scope": scope}
    _, expected = classifier(None, sam, dropout=0.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compilations, actual = classifier(backend, sam, dropout=0.0)
    graphs, _, lowered = compilations[0]
    assert graphs == 1 and (lowered > 0) == (backend == "inductor")
    assert compilations == [compilations[0]] * UPDATES
    assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
@all_scopes
def test_inductors_dropout_draws_the_same_masks_in_both_passes(scope):
    """It seeds a generator of its own from torch's, which the second pass finds put back."""
    sam = {"sam_rho": 1e-9, "sam_scope": scope}
    _, plain = classifier("inductor", None, dropout=0.3)
    _, same_masks = classifier("inductor", sam, dropout=0.3)
    _, own_masks = classifier("inductor", sam | {"sam_replay_rng": False}, dropout=0.3)
    assert_close(same_masks, plain, rtol=0, atol=1e-8)
    assert far(own_masks, plain) > 1e-3
    assert far(classifier(None, None, dropout=0.3)[1], plain) > 1e-3  # not the eager masks


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - value).abs().max().item() for name, value in b.items())


@slow_unless(scope=["batch"])
@all_scopes
def test_no_graph_is_compiled_that_plain_training_does_not_compile(scope):
    """Evaluation and a short last batch ask for graphs of their own, once."""

    def run(backend: str | None, sam: dict[str, Any] | None) -> Any:
        torch.manual_seed(0)
        model, epochs = Classifier(0.3), {"max_steps": -1, "num_train_epochs": 2}
        evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
        return model, trained(model, examples(22), backend, sam, **epochs, **evaluated)

    sam = {"sam_rho": 0.3, "sam_scope": scope}
    compiled, seen = run("aot_eager", sam)
    eager, _ = run(None, sam)
    _, plain = run("aot_eager", None)
    assert seen == plain
    assert 1 == plain[0][0] < plain[-1][0]
    assert_same_bits(compiled, weights(eager))


class InOnePlace(torch.autograd.Function):
    """Returns the loss in memory that the next call writes to."""

    memory = torch.zeros((), dtype=torch.float64)

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return InOnePlace.memory.copy_(loss).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Captured(Classifier):
    """As a captured CUDA graph does: every pass leaves its loss in the same memory."""

    accepts_loss_kwargs = True  # so that the Trainer does not divide it, which would copy it

    def forward(self, x: Tensor, labels: Tensor, **_: Any) -> Any:
        outputs = super().forward(x, labels)
        return outputs | {"loss": InOnePlace.apply(outputs["loss"])}


class NotCaptured(Captured):
    def forward(self, x: Tensor, labels: Tensor, **_: Any) -> Any:
        return Classifier.forward(self, x, labels)


@all_scopes
def test_the_losses_of_captured_graphs_are_read_before_the_next_pass_overwrites_them(scope):
    logs = []
    for kind in (Captured, NotCaptured):
        torch.manual_seed(0)
        trainer = sam_trainer(
            kind(),
            examples(24),
            sam={"sam_rho": 0.3, "sam_scope": scope},
            gradient_accumulation_steps=2,
        )
        trainer.train()
        logs.append([(e["loss"], e["sam_sharpness"]) for e in trainer.state.log_history[:-1]])
    assert logs[0] == logs[1]
    assert all(sharpness > 1e-3 for _, sharpness in logs[0])

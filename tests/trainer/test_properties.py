"""Properties of whole trainings, for random models under random settings (Hypothesis).

The suite tries a few cases, always the same ones. Thousands, with random seeds, by hand:

    SAM_HF_EXAMPLES=2000 pytest tests/trainer/test_properties.py

A failing case is shrunk and printed as a call of the test that can be repeated.
"""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_models import SAVED_COUNTERS, Architecture, Block, RandomModel, architectures
from safetensors.torch import load_file
from tiny import examples, sam_trainer
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback
from twin_runs import optimizer_state

from sam_hf import SAMConfig, SAMTrainer

EXAMPLES = int(os.environ.get("SAM_HF_EXAMPLES", 0))
pytestmark = [
    pytest.mark.timeout(0 if EXAMPLES else 900),  # a failing case takes a while to shrink
    pytest.mark.filterwarnings("ignore:sam_rho"),  # too large, or without effect
    pytest.mark.filterwarnings("ignore:Training ended after"),  # without a SAM update
]

UPDATES = 4
TINY = 1e-11
LARGE = (0.05, 0.5, 5.0)

METHODS = (
    "sam", "asam", "gsam", "looksam", "wsam", "friendly_sam", "vasso", "msam", "esam"
)  # fmt: skip
KEEP_G = ("gsam", "looksam", "wsam")
"""The methods that need the whole gradient g: scope batch, and all examples in the ascent."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "nesterov": {"optim": "sgd", "optim_args": "momentum=0.5,nesterov=True", "learning_rate": 0.1},
    # The first step of Adam and its relatives turns the rounding errors of a gradient that is
    # nearly 0 into a whole step, unless epsilon is larger than those.
    "adamw": {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-4},
    "adafactor": {"optim": "adafactor", "learning_rate": 0.01},
    "rmsprop": {"optim": "rmsprop", "optim_args": "eps=1e-4", "learning_rate": 0.01},
}
HAVE_MOMENTUM = ("sgd with momentum", "nesterov", "adamw")


def cases(count: int) -> settings:
    """So many examples in the suite."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass(frozen=True)
class Case:
    """A model, its data, the arguments of the trainer and the options of SAM."""

    architecture: Architecture
    sam: dict[str, Any]
    args: dict[str, Any]
    rows: int
    evaluates: bool = False
    seed: int = 0

    @property
    def method(self) -> str:
        return self.sam["sam_method"]


# --- The cases ------------------------------------------------------------------------------------


@st.composite
def any_case(
    draw: st.DrawFn,
    rho: float | None = None,
    change: Callable[[Architecture], Architecture] = lambda architecture: architecture,
) -> Case:
    """A case with all that the options allow together.

    Args:
        rho: that of all cases; a large one is drawn if None.
        change: what makes the architecture one for which the property holds.
    """
    architecture = change(draw(architectures()))
    # Batch norm cannot work on one example, and with two it leaves signs alone.
    batch_size = draw(st.sampled_from([3, 4] if architecture.has_batch_norm else [1, 2, 4]))
    micro_batches = draw(st.integers(2, 7))  # an epoch may end with a short window
    is_ragged = draw(st.booleans()) and not architecture.has_batch_norm and batch_size > 1
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    args = {
        **OPTIMIZERS[optimizer],
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": draw(st.integers(1, 4)),
        "max_grad_norm": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "train_sampling_strategy": draw(st.sampled_from(["sequential", "random"])),
        "max_steps": UPDATES,
    }
    args |= draw(
        st.sampled_from(
            [
                {"lr_scheduler_type": "constant"},
                {"lr_scheduler_type": "linear"},
                {"lr_scheduler_type": "cosine", "warmup_steps": 2},
            ]
        )
    )
    evaluates = draw(st.booleans())
    if evaluates:
        args |= {"eval_strategy": "steps", "eval_steps": draw(st.integers(1, 2))}
    return Case(
        architecture,
        draw(sam_options(architecture, optimizer, rho)),
        args,
        rows=batch_size * micro_batches - is_ragged,
        evaluates=evaluates,
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def sam_options(
    draw: st.DrawFn, architecture: Architecture, optimizer: str, rho: float | None
) -> dict[str, Any]:
    """Options of SAM that do not exclude each other."""
    allowed = [m for m in METHODS if m != "msam" or optimizer in HAVE_MOMENTUM]
    method = draw(st.sampled_from(allowed))
    rho = draw(st.sampled_from(LARGE)) if rho is None else rho
    sam: dict[str, Any] = {
        "sam_method": method,
        "sam_rho": rho,
        "sam_start_ratio": draw(st.sampled_from([0.0, 0.0, 0.3, 0.5])),
        "sam_rho_schedule": draw(
            st.sampled_from(["constant", "linear", "cosine", "learning_rate"])
        ),
        "sam_rho_warmup_ratio": draw(st.sampled_from([0.0, 0.5])),
        "sam_params": draw(st.sampled_from(selections(architecture))),
        "sam_method_args": draw(method_args(method)),
    }
    if sam["sam_rho_schedule"] != "constant":
        sam["sam_rho_min"] = draw(st.sampled_from([0.0, 0.5])) * rho
    if method == "asam":
        sam["sam_eta"] = draw(st.sampled_from([0.01, 0.3]))
        sam["sam_adaptive_scope"] = draw(st.sampled_from(["all", "weights"]))
    if method != "looksam":
        sam["sam_interval"] = draw(st.integers(1, 2))
    if method not in ("looksam", "msam") and draw(st.booleans()):
        sam["sam_trigger"] = "gradient_norm"
        return sam
    if method not in (*KEEP_G, "msam"):
        sam["sam_scope"] = draw(st.sampled_from(["batch", "micro_batch"]))
        sam["sam_ascent_fraction"] = draw(st.sampled_from([1.0, 1.0, 0.5, 0.75]))
    return sam


def method_args(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Values of the options of one method alone."""
    values: dict[str, dict[str, Any]] = {
        "gsam": {"alpha": st.sampled_from([0.0, 0.4, 1.0])},
        "looksam": {"k": st.integers(1, 3), "alpha": st.sampled_from([0.3, 0.7])},
        "wsam": {"gamma": st.sampled_from([0.2, 0.5, 0.9]), "decoupled": st.booleans()},
        "friendly_sam": {
            "sigma": st.sampled_from([0.5, 1.0]),
            "ema_decay": st.sampled_from([0.0, 0.6]),
        },
        "vasso": {"theta": st.sampled_from([0.2, 0.9])},
        "esam": {"beta": st.sampled_from([0.3, 0.6, 1.0])},
    }
    return st.fixed_dictionaries({}, optional=values.get(method, {}))


def selections(architecture: Architecture) -> list[str]:
    """Values of `sam_params` that select something that is trained and part of the loss."""
    found = ["all", "all", "matrices", "head", "bias$"]
    if architecture.has_trained_norms:
        found += ["norms", r"norm\."]
    if not architecture.is_stem_frozen:
        found += ["stem", "stem|unused"]
    if architecture.blocks and not architecture.blocks[-1].is_frozen:
        found += [rf"blocks\.{len(architecture.blocks) - 1}\.(linear|norm)"]
    return found


# --- The trainings --------------------------------------------------------------------------------


def build(case: Case, trainer_class: type = SAMTrainer, *callbacks: Any, **changes: Any) -> Any:
    """A trainer of the case, with `changes` of its arguments."""
    torch.manual_seed(case.seed)
    kwargs: dict[str, Any] = {"callbacks": list(callbacks)}
    if case.evaluates:
        kwargs["eval_dataset"] = examples(3, seed=case.seed + 1)
    return sam_trainer(
        RandomModel(case.architecture),
        examples(case.rows, seed=case.seed),
        trainer_class,
        kwargs,
        SAMConfig(**case.sam) if trainer_class is SAMTrainer else None,
        **{"seed": case.seed, **case.args, **changes},
    )


@dataclass
class Outcome:
    """What a training leaves."""

    weights: dict[str, Tensor]
    counts: list[Any]
    optimizer: list[Tensor]
    random_state: tuple[Any, ...]
    log: list[dict[str, float]]


def train(trainer: Any, **kwargs: Any) -> Outcome:
    # Thousands of lines otherwise, in front of the one case that matters.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        trainer.train(**kwargs)
    name, keys, *rest = np.random.get_state()
    random_state = (torch.get_rng_state(), random.getstate(), (name, keys.tolist(), *rest))
    return Outcome(
        trainer.model.state_dict(),
        trainer.model.counts(),
        optimizer_state(trainer),
        random_state,
        [without_times(entry) for entry in trainer.state.log_history if "train_loss" not in entry],
    )


def without_times(entry: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second"))}


def plain_readings(outcome: Outcome) -> list[dict[str, float]]:
    """The log without what SAM adds."""
    return [{k: v for k, v in e.items() if not k.startswith("sam_")} for e in outcome.log]


def assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    exact = {"rtol": 0, "atol": 0}
    assert_close(actual.weights, expected.weights, **exact)
    assert_close(actual.counts, expected.counts, **exact)
    assert_close(actual.optimizer, expected.optimizer, **exact)
    assert_same_random_state(actual, expected)
    assert actual.log == expected.log


def assert_same_random_state(actual: Outcome, expected: Outcome) -> None:
    names = ("torch", "random", "numpy")
    for name, a, b in zip(names, actual.random_state, expected.random_state, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f"{name}'s state differs"


# --- The properties -------------------------------------------------------------------------------


def near_plain(case: Case) -> Case:
    """The options with which the updates become plain ones as rho goes to 0."""
    sam = dict(case.sam)
    if case.method == "looksam":  # it gives the direction that it reuses the length of g
        sam["sam_method_args"] = sam["sam_method_args"] | {"k": 1}
    if case.architecture.is_random or case.architecture.has_batch_statistics:
        sam.pop("sam_ascent_fraction", None)  # a part draws fewer numbers, and has other means
    return replace(case, sam=sam)


def found(block: Block, seed: int = 0, **sam: Any) -> Case:
    """A case like those that this search has found, shrunk: one block, and two micro-batches."""
    args = {"gradient_accumulation_steps": 2, "max_steps": UPDATES, **OPTIMIZERS["sgd"]}
    options = {"sam_method": "sam", "sam_rho": TINY, **sam}
    return Case(Architecture((block,)), options, args, rows=12, seed=seed)


@cases(25)
@example(case=found(Block(counter="number")))
@example(case=found(Block(counter="buffer")))
@example(case=found(Block(counter="running_mean"), sam_scope="micro_batch"))
@example(case=found(Block(skipped_by="torch", counter="buffer"), seed=2))
@example(case=found(Block("layer", skipped_by="torch"), seed=2, sam_params="norms"))
@example(case=found(Block("layer", skipped_by="python"), 4, sam_params="norms", sam_method="gsam"))
@example(
    case=found(Block("layer", skipped_by="numpy"), 1, sam_params="norms", sam_scope="micro_batch")
)
@given(case=any_case(rho=TINY).map(near_plain))
def test_at_a_tiny_rho_training_is_the_plain_trainers(case):
    ours, plain = train(build(case)), train(build(case, Trainer))
    close = {"rtol": 0, "atol": 1e-6}
    assert_close(ours.weights, plain.weights, **close)
    assert_close(ours.counts, plain.counts, **close)
    assert_same_random_state(ours, plain)
    if case.sam.get("sam_ascent_fraction", 1.0) == 1:  # else the loss at w is that of a part
        assert_close(plain_readings(ours), plain_readings(plain), **close)


@cases(20)
@given(case=any_case(rho=0.0))
def test_at_rho_0_training_is_the_plain_trainers_bit_for_bit(case):
    assert_same_bits(train(build(case)), train(build(case, Trainer)))


class SaveAt(TrainerCallback):
    """Saves after some of the updates."""

    def __init__(self, *updates: int) -> None:
        self._updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self._updates


def can_be_resumed(architecture: Architecture) -> Architecture:
    """Without what Trainer itself cannot resume or save: numbers that no checkpoint holds, and two
    names of one tensor, which safetensors refuses."""
    blocks = architecture.without(is_tied=False).blocks
    kept = (b if b.counter in SAVED_COUNTERS else replace(b, counter=None) for b in blocks)
    return replace(architecture, blocks=tuple(kept))


@cases(15)
@given(case=any_case(change=can_be_resumed), middle=st.integers(1, UPDATES - 1))
def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(case, middle):
    trainers = [build(case, SAMTrainer, SaveAt(middle, UPDATES)) for _ in range(2)]
    folders = [Path(trainer.args.output_dir) for trainer in trainers]
    try:
        straight = train(trainers[0])
        with torch.no_grad():  # all of it must come from the checkpoint
            for tensor in trainers[1].model.state_dict().values():
                tensor.add_(1)
        resumed = train(
            trainers[1], resume_from_checkpoint=str(folders[0] / f"checkpoint-{middle}")
        )
        assert_same_bits(resumed, straight)
        expected, actual = (state_of_sam(folder / f"checkpoint-{UPDATES}") for folder in folders)
        assert_close(actual, expected, rtol=0, atol=0)
    finally:
        for folder in folders:
            shutil.rmtree(folder)


def state_of_sam(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of methods and triggers."""
    return {file.name: load_file(file) for file in checkpoint.glob("sam_state*.safetensors")}


def one_by_one(architecture: Architecture) -> Architecture:
    """Without what depends on the other examples of a call, or on the number of calls."""
    plain = architecture.without(has_dropout=False, skipped_by=None, noise_by=None, counter=None)
    blocks = (replace(b, norm=b.norm.replace("batch", "layer")[:5]) for b in plain.blocks)
    return replace(plain, blocks=tuple(blocks))


@cases(15)
@given(case=any_case(change=one_by_one))
def test_in_scope_batch_the_weights_do_not_depend_on_how_the_batch_is_cut(case):
    # Each micro-batch has a part of its own.
    sam = case.sam | {"sam_scope": "batch", "sam_ascent_fraction": 1.0}
    case = replace(case, sam=sam, rows=8 * (1 + case.rows % 3))
    whole, *cut = (
        train(build(case, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size))
        for size in (8, 1, 4)
    )
    for outcome in cut:
        assert_close(outcome.weights, whole.weights, rtol=0, atol=1e-10)


class Watch(TrainerCallback):
    """Compares the weights that the events of an update see: w before the optimizer's step, and
    from then on the next w. Counts the training calls at other weights."""

    def __init__(self) -> None:
        self.w: list[Tensor] = []
        self.perturbed_calls = 0
        self.wrong: list[str] = []

    def start(self, model: RandomModel) -> None:
        self._parameters = list(model.parameters())
        self._take()
        model.register_forward_pre_hook(self._on_forward)

    def _take(self) -> None:
        self.w = [p.detach().clone() for p in self._parameters]

    def _is_at_w(self) -> bool:
        return all(map(torch.equal, self._parameters, self.w))

    def _on_forward(self, model: RandomModel, inputs: Any) -> None:
        if not self._is_at_w():
            self.perturbed_calls += 1
            if not model.training:
                self.wrong.append("evaluation")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._take()

    def _compare(self, args: Any, state: Any, *rest: Any, event: str, **kwargs: Any) -> None:
        if not self._is_at_w():
            self.wrong.append(f"{event} of update {state.global_step}")

    on_train_begin = partialmethod(_compare, event="on_train_begin")
    on_step_begin = partialmethod(_compare, event="on_step_begin")
    on_substep_end = partialmethod(_compare, event="on_substep_end")
    on_pre_optimizer_step = partialmethod(_compare, event="on_pre_optimizer_step")
    on_step_end = partialmethod(_compare, event="on_step_end")
    on_log = partialmethod(_compare, event="on_log")
    on_prediction_step = partialmethod(_compare, event="on_prediction_step")
    on_evaluate = partialmethod(_compare, event="on_evaluate")
    on_epoch_end = partialmethod(_compare, event="on_epoch_end")
    on_train_end = partialmethod(_compare, event="on_train_end")


@cases(20)
@given(case=any_case())
def test_no_callback_sees_perturbed_weights(case):
    watch = Watch()
    trainer = build(case, SAMTrainer, watch)
    watch.start(trainer.model)
    train(trainer)
    assert watch.wrong == []
    # A test that would see nothing if there were nothing to see.
    always = case.sam["sam_start_ratio"] == 0 and case.sam["sam_params"] in ("all", "head")
    if always and case.method not in ("looksam", "esam"):
        assert watch.perturbed_calls > 0

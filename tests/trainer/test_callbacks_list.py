"""The callbacks are those of Trainer, and `is_in_descent_pass` tells user code of the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mlp import MLP, above, below, build, trained
from tiny import Spy, arguments, assert_same_bits, examples, weights
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from twin_runs import RHO

from sam_hf import SAMConfig, SAMSeq2SeqTrainer, SAMTrainer, SAMTrainingArguments

all_scopes = pytest.mark.parametrize("scope", ["batch", "micro_batch"])
both_places = pytest.mark.parametrize("place", [above, below])


# ---- The list of callbacks -----------------------------------------------------------------------


def callbacks(trainer: Any) -> list[type]:
    return [type(callback) for callback in trainer.callback_handler.callbacks]


class Lists(TrainerCallback):
    """Notes which callbacks there are while training."""

    def __init__(self) -> None:
        self.seen: list[list[type]] = []
        self.trainer: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(callbacks(self.trainer))

    on_step_end = on_train_end = on_train_begin


@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("own", [[], [Spy]])
@pytest.mark.parametrize("disable_tqdm", [True, False])
@pytest.mark.parametrize(
    ("trainer_class", "base", "args_class"),
    [
        (SAMTrainer, Trainer, TrainingArguments),
        (SAMTrainer, Trainer, SAMTrainingArguments),
        (SAMSeq2SeqTrainer, Seq2SeqTrainer, Seq2SeqTrainingArguments),
    ],
)
def test_no_callback_is_added_to_those_of_trainer(
    trainer_class, base, args_class, disable_tqdm, own, rho
):
    options = {"disable_tqdm": disable_tqdm}
    if args_class is SAMTrainingArguments:
        options["sam_rho"] = rho

    def listed(kind: type) -> list[list[type]]:
        lists = Lists()
        has_config = kind is trainer_class and args_class is not SAMTrainingArguments
        lists.trainer = kind(
            model=MLP(),
            args=arguments(args_class, **options),
            train_dataset=examples(12),
            callbacks=[*(c() for c in own), lists],
            **({"sam_config": SAMConfig(sam_rho=rho)} if has_config else {}),
        )
        before = callbacks(lists.trainer)
        lists.trainer.train()
        return [before, *lists.seen, callbacks(lists.trainer)]

    assert listed(trainer_class) == listed(base)


# ---- Which pass user code runs in ----------------------------------------------------------------


def watching(flags: list[bool], fails_at: int | None = None) -> type:
    """Notes the pass of each call of `compute_loss`; the call `fails_at` raises."""

    class Watching:
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            flags.append(self.is_in_descent_pass)
            if len(flags) - 1 == fails_at:
                raise RuntimeError("on purpose")
            return super().compute_loss(model, *args, **kwargs)

    return Watching


UPDATES = {
    "batch": [False] * 2 + [True] * 2,
    "micro_batch": [False, True] * 2,
    "plain": [False] * 2,
}


@all_scopes
@both_places
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_is_in_descent_pass_is_true_in_the_second_pass_alone(method, place, scope):
    flags: list[bool] = []
    sam = {"sam_method": method, "sam_scope": scope}
    trainer = build(place(watching(flags)), accumulation=2, sam=sam)
    assert trainer.is_in_descent_pass is False
    trainer.train()
    assert flags == UPDATES[scope] * 3
    assert trainer.is_in_descent_pass is False


@all_scopes
@both_places
def test_is_in_descent_pass_is_false_in_plain_updates(place, scope):
    for sam, kinds in (
        ({"sam_interval": 2}, [scope, "plain", scope]),
        ({"sam_start_ratio": 0.5}, ["plain", "plain", scope]),
        ({"sam_rho": 0.0}, ["plain"] * 3),
    ):
        flags: list[bool] = []
        trained(place(watching(flags)), accumulation=2, sam={"sam_scope": scope, **sam})
        assert flags == [flag for kind in kinds for flag in UPDATES[kind]]


@all_scopes
def test_is_in_descent_pass_is_false_in_callbacks_in_evaluation_and_around_the_step(scope):
    flags: list[bool] = []

    class Looks(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            flags.append(trainer.is_in_descent_pass)

        on_substep_end = on_pre_optimizer_step = on_step_end = on_step_begin
        on_log = on_evaluate = on_train_end = on_step_begin

    class Around(SAMTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            flags.append(self.is_in_descent_pass)
            loss = super().training_step(*args, **kwargs)
            flags.append(self.is_in_descent_pass)
            return loss

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            flags.append(self.is_in_descent_pass)
            return super().prediction_step(*args, **kwargs)

    trainer = build(
        Around,
        accumulation=2,
        sam={"sam_scope": scope},
        trainer_kwargs={"eval_dataset": examples(4), "callbacks": [Looks()]},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert len(flags) > 20 and not any(flags)


@all_scopes
def test_is_in_descent_pass_holds_in_the_model_and_in_the_hooks_of_its_backward(scope):
    flags: list[tuple[str, bool]] = []

    class Model(MLP):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            flags.append(("forward", trainer.is_in_descent_pass))
            outputs = super().forward(x, labels)
            outputs["loss"].register_hook(
                lambda _: flags.append(("backward", trainer.is_in_descent_pass))
            )
            return outputs

    trainer = build(SAMTrainer, Model, 2, sam={"sam_scope": scope}, max_steps=1)
    trainer.train()
    expected = [(where, flag) for flag in UPDATES[scope] for where in ("forward", "backward")]
    assert flags == expected


@all_scopes
@both_places
@pytest.mark.parametrize("call", [0, 1])
def test_is_in_descent_pass_is_false_again_after_a_second_pass_that_raised(call, place, scope):
    flags: list[bool] = []
    fails_at = [i for i, flag in enumerate(UPDATES[scope]) if flag][call]
    trainer = build(place(watching(flags, fails_at)), accumulation=2, sam={"sam_scope": scope})
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert flags == UPDATES[scope][: fails_at + 1]
    assert trainer.is_in_descent_pass is False
    assert_same_bits(trainer.model, before)
    done = len(flags)
    trainer.train()
    assert flags[done:] == UPDATES[scope] * 3


def test_compute_loss_counts_the_batches_and_sees_w_plus_e_in_the_second_pass():
    batches, distances = [], []

    class Counts:
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            w = torch.cat([p.detach().flatten() for p in model.parameters()])
            if self.is_in_descent_pass:
                distances.append((w - batches[-1]).norm().item())
            else:
                batches.append(w)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trained(above(Counts), accumulation=2, sam={"sam_rho": RHO})
    assert len(batches) == 2 * 3
    assert distances == pytest.approx([RHO] * 2 * 3)


@pytest.mark.parametrize("value", [True, False])
def test_is_in_descent_pass_cannot_be_set(value):
    with pytest.raises(AttributeError):
        build(SAMTrainer).is_in_descent_pass = value


# ---- `compute_loss` ------------------------------------------------------------------------------


class DoubleLater(TrainerCallback):
    """Wraps the `compute_loss` of the trainer after an update, so that the loss is doubled."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 1:
            whole = self.trainer.compute_loss
            self.trainer.compute_loss = lambda *args, **kwargs: 2 * whole(*args, **kwargs)


@all_scopes
def test_a_loss_function_that_a_callback_wraps_is_the_one_of_both_passes(scope):
    runs = []
    for trainer_class, options in (
        (Trainer, {}),
        (SAMTrainer, {"sam_config": SAMConfig(sam_rho=1e-9, sam_scope=scope)}),
    ):
        torch.manual_seed(0)
        double = DoubleLater()
        double.trainer = trainer = trainer_class(
            model=MLP(),
            args=arguments(max_steps=3),
            train_dataset=examples(24),
            callbacks=[double],
            **options,
        )
        before = trainer.compute_loss
        trainer.train()
        assert trainer.compute_loss is not before and "compute_loss" in vars(trainer)
        runs.append(weights(trainer.model))
    for name, w in runs[0].items():
        torch.testing.assert_close(runs[1][name], w, rtol=0, atol=1e-6)

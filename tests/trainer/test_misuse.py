"""Options and optimizers that cannot be meant: told in one line, with the way out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mlp import MLP
from tiny import arguments, assert_same_bits, examples, sam_trainer, weights
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from sam_hf import SAMConfig, SAMSeq2SeqTrainer, SAMTrainer, SAMTrainingArguments, with_sam


class Theirs(Trainer):
    """A trainer with arguments of its own."""

    def __init__(self, model: Any = None, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.temperature = temperature


@dataclass
class Seq2SeqSAMArguments(SAMConfig, Seq2SeqTrainingArguments):
    """Options of SAM with the arguments of another class."""


TRAINERS = [SAMTrainer, SAMSeq2SeqTrainer, with_sam(Theirs)]
all_trainers = pytest.mark.parametrize("trainer_class", TRAINERS)


def arguments_of(trainer_class: type) -> Any:
    is_seq2seq = issubclass(trainer_class, Seq2SeqTrainer)
    return arguments(Seq2SeqTrainingArguments) if is_seq2seq else arguments()


def refusal(error: type[Exception], call: Any) -> str:
    with pytest.raises(error) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- Options in the wrong place ------------------------------------------------------------------


@all_trainers
def test_an_option_given_to_the_trainer_is_told_to_go_into_sam_config(trainer_class):
    def make(**options: Any) -> Any:
        args, data = arguments_of(trainer_class), examples(4)
        return trainer_class(model=MLP(), args=args, train_dataset=data, **options)

    message = refusal(TypeError, lambda: make(sam_rho=0.1))
    assert "pass sam_config=SAMConfig(sam_rho=0.1)" in message.replace("Pass", "pass")
    message = refusal(TypeError, lambda: make(sam_rho=0.1, sam_method="asam"))
    assert "sam_config=SAMConfig(" in message
    assert "sam_rho=0.1" in message and "sam_method='asam'" in message
    assert "sam_rho" in refusal(TypeError, lambda: make(sam_roh=0.1))
    assert "learning_rate" in refusal(TypeError, lambda: make(learning_rate=0.1))


# ---- Misspelt options ----------------------------------------------------------------------------


def config(**options: Any) -> Any:
    return SAMConfig(**options)


def training_arguments(**options: Any) -> Any:
    return arguments(SAMTrainingArguments, **options)


def seq2seq_arguments(**options: Any) -> Any:
    return arguments(Seq2SeqSAMArguments, **options)


all_makers = pytest.mark.parametrize("make", [config, training_arguments, seq2seq_arguments])


@all_makers
@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("rho", "sam_rho"),
        ("sam_roh", "sam_rho"),
        ("method", "sam_method"),
        ("scope", "sam_scope"),
        ("params", "sam_params"),
        ("sam_param", "sam_params"),
        ("sam_start_ration", "sam_start_ratio"),
        ("SAM_RHO", "sam_rho"),
    ],
)
def test_a_misspelt_option_raises_a_type_error_with_the_option_that_is_meant(make, wrong, meant):
    message = refusal(TypeError, lambda: make(**{wrong: 0.1}))
    assert repr(wrong) in message and f"Did you mean {meant!r}?" in message


@all_makers
def test_an_option_like_none_that_exists_raises_a_type_error_without_a_guess(make):
    message = refusal(TypeError, lambda: make(quux=1))
    assert "'quux'" in message and "Did you mean" not in message


@pytest.mark.parametrize("make", [training_arguments, seq2seq_arguments])
def test_a_misspelt_training_argument_raises_a_type_error_that_names_it(make):
    assert "'learning_rat'" in refusal(TypeError, lambda: make(learning_rat=0.1))


@all_makers
def test_options_that_exist_are_taken(make):
    assert make(sam_rho=0.1, sam_method="asam").sam_rho == 0.1


@all_makers
@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("norm", "norms"),
        ("Norms", "norms"),
        ("NORMS", "norms"),
        ("nroms", "norms"),
        ("matrix", "matrices"),
        ("Matrices", "matrices"),
        ("matrice", "matrices"),
        ("al", "all"),
        ("All", "all"),
    ],
)
def test_a_near_miss_of_sam_params_is_refused_with_the_value_that_is_meant(make, wrong, meant):
    message = refusal(ValueError, lambda: make(sam_params=wrong))
    assert f"sam_params={wrong!r}" in message
    assert f"did you mean {meant!r}" in message.replace("Did", "did")


@all_makers
@pytest.mark.parametrize(
    "pattern",
    [
        "all",
        "norms",
        "matrices",
        "head",
        r"norm\.weight",
        "layer_norm",
        "LayerNorm",
        "lora_B",
        "classifier|pooler",
        r"layers\.\d+\.",
        "weight$",
    ],
)
def test_regular_expressions_and_names_of_groups_are_taken_for_sam_params(make, pattern):
    assert make(sam_params=pattern).sam_params == pattern


# ---- Optimizers that need a closure --------------------------------------------------------------


class LBFGSByAnotherName(torch.optim.LBFGS):
    """Found by its class, not by its name."""


def lbfgs(kind: type, given: bool, **sam: Any) -> Any:
    """Make a trainer with LBFGS and train."""
    torch.manual_seed(0)
    model = MLP()
    if given:
        optimizers = {"optimizers": (kind(model.parameters()), None)}
        return sam_trainer(model, examples(12), trainer_kwargs=optimizers, sam=sam).train()

    class Own(SAMTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = kind(self.model.parameters())
            return self.optimizer

    return sam_trainer(model, examples(12), Own, sam=sam).train()


@pytest.mark.parametrize("given", [True, False], ids=["optimizers", "create_optimizer"])
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, LBFGSByAnotherName])
def test_an_optimizer_that_needs_a_closure_is_refused_with_the_reason(kind, given):
    message = refusal(ValueError, lambda: lbfgs(kind, given))
    assert kind.__name__ in message and "closure" in message


def test_a_refused_optimizer_leaves_the_weights_as_they_were():
    model = MLP()
    before = weights(model)
    optimizers = {"optimizers": (torch.optim.LBFGS(model.parameters()), None)}
    with pytest.raises(ValueError, match="LBFGS"):
        sam_trainer(model, examples(12), trainer_kwargs=optimizers).train()
    assert_same_bits(model, before)


# ---- What an editor shows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer_class", "base"),
    [(SAMTrainer, Trainer), (SAMSeq2SeqTrainer, Seq2SeqTrainer), (with_sam(Theirs), Theirs)],
)
def test_the_signature_names_the_arguments_of_the_base_class_and_sam_config(trainer_class, base):
    shown, expected = (inspect.signature(c).parameters for c in (trainer_class, base))
    assert [name for name in shown if name in expected] == list(expected)
    for name, parameter in expected.items():
        assert (shown[name].kind, shown[name].default) == (parameter.kind, parameter.default)
    assert set(shown) - set(expected) == {"sam_config"}
    assert shown["sam_config"].default is None
    assert shown["sam_config"].kind is inspect.Parameter.KEYWORD_ONLY
    # It can be called as the base class is, with sam_config in addition.
    inspect.signature(trainer_class).bind(MLP(), sam_config=SAMConfig())


def test_the_signature_of_sam_trainer_begins_as_that_of_trainer():
    assert list(inspect.signature(SAMTrainer).parameters)[:2] == ["model", "args"]
    assert "train_dataset" in inspect.signature(SAMTrainer).parameters


@all_trainers
def test_arguments_can_be_given_by_position_as_to_the_base_class(trainer_class):
    assert trainer_class(MLP(), args=arguments_of(trainer_class)).model is not None
    if trainer_class is SAMTrainer:
        trainer = trainer_class(MLP(), arguments(), sam_config=SAMConfig(sam_rho=0.2))
        assert trainer.sam_config.sam_rho == 0.2


def test_arguments_that_only_begin_like_an_option_belong_to_the_trainer():
    class Samples(Trainer):
        def __init__(self, *args, sampler_name=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.sampler_name = sampler_name

    trainer = with_sam(Samples)(model=MLP(), args=arguments(), sampler_name="x")
    assert trainer.sampler_name == "x"


def test_the_signature_of_a_subclass_with_its_own_init_is_its_own():
    class Own(SAMTrainer):
        def __init__(self, model, extra, **kwargs):
            super().__init__(model=model, **kwargs)

    class Derived(Own): ...

    for kind in (Own, Derived):
        assert list(inspect.signature(kind).parameters) == ["model", "extra", "kwargs"]

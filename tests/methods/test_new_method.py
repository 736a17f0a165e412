"""A method that this package does not have: one class and one row, and the trainer knows it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import Classifier, examples, sam_trainer

from sam_hf import SAMConfig
from sam_hf.methods import METHODS
from sam_hf.methods.base import option
from sam_hf.methods.esam import ESAM
from sam_hf.methods.sam import SAM


@dataclass(frozen=True)
class Signs(SAM):
    """e along the signs of g, with an option that no other file knows."""

    strength: float = option(1.0, help="The length of each step along the signs.", low=0.0)

    def direction(self, names, weights, grads, dot, state):
        torch._foreach_sign_(grads)
        length = dot(grads, grads)
        torch._foreach_mul_(grads, self.strength)
        return grads, length


@pytest.fixture(autouse=True)
def _row_of_the_registry(monkeypatch):
    monkeypatch.setitem(METHODS, "signs", Signs)


def test_a_new_method_is_a_class_and_a_row_of_the_registry():
    data, model, twin = examples(8), Classifier(), Classifier()
    twin.load_state_dict(model.state_dict())
    x, labels = (torch.stack([row[key] for row in data.rows]) for key in ("x", "labels"))
    w = list(twin.parameters())

    def gradient():
        return torch.autograd.grad(twin(x, labels)["loss"], w)

    signs = [g.sign() for g in gradient()]
    length = sum(s.square().sum() for s in signs).sqrt()
    before = [a.detach().clone() for a in w]
    with torch.no_grad():
        for a, s in zip(w, signs, strict=True):
            a += 2.0 * 0.1 * s / length
    expected = [a - 0.5 * g for a, g in zip(before, gradient(), strict=True)]
    sam = {"sam_method": "signs", "sam_rho": 0.1, "sam_method_args": {"strength": 2.0}}
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.5}
    trainer = sam_trainer(model, data, sam=sam, **options)
    trainer.train()
    for a, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-14)


def test_its_option_is_a_key_of_sam_method_args_with_the_default_of_its_class():
    assert SAMConfig(sam_method="signs").build_method() == Signs(1.0)
    for written in ({"strength": 2.0}, "strength=2.0", '{"strength": 2.0}'):
        config = SAMConfig(sam_method="signs", sam_method_args=written)
        assert config.build_method() == Signs(2.0)
        assert config.sam_method_args == {"strength": 2.0}


@pytest.mark.parametrize("written", [{"strenght": 2.0}, "strenght=2.0"])
def test_a_misspelt_option_is_refused_with_those_that_there_are(written):
    with pytest.raises(ValueError) as caught:
        SAMConfig(sam_method="signs", sam_method_args=written)
    message = str(caught.value)
    assert "sam_method_args" in message and "'strenght'" in message and "\n" not in message
    assert "strength" in message.replace("'strenght'", "")


@pytest.mark.parametrize("value", [-1.0, "2.0", True, float("inf")])
def test_a_value_that_the_declaration_does_not_allow_is_refused(value):
    with pytest.raises(ValueError) as caught:
        SAMConfig(sam_method="signs", sam_method_args={"strength": value})
    message = str(caught.value)
    assert "sam_method_args" in message and "strength" in message and repr(value) in message
    assert "a finite number from 0 up" in message and "\n" not in message


def test_its_option_is_none_of_another_method():
    with pytest.raises(ValueError, match=r"sam_method_args.*'strength'"):
        SAMConfig(sam_method="gsam", sam_method_args={"strength": 2.0})


def test_two_seeds_draw_other_parts_of_the_weights_and_one_seed_the_same():
    names = [str(i) for i in range(64)]
    first, again, other = (ESAM(0.5).choose(names, 3, seed) for seed in (0, 0, 1))
    assert first == again != other

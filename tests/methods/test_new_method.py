"""A method that this package does not have: one class and one row, and the trainer knows it."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass

import pytest
import torch
from tiny import Classifier, examples, sam_trainer

from sam_hf import SAMConfig
from sam_hf.methods import METHODS
from sam_hf.methods.esam import ESAM
from sam_hf.methods.sam import SAM


@dataclass(frozen=True)
class Signs(SAM):
    """e along the signs of g, with what an option adds to each of them."""

    sigma: float = 1.0

    def direction(self, names, weights, grads, dot, state):
        torch._foreach_sign_(grads)
        torch._foreach_mul_(grads, self.sigma)
        return grads, dot(grads, grads)


def test_a_new_method_is_a_class_and_a_row_of_the_registry(monkeypatch):
    monkeypatch.setitem(METHODS, "signs", Signs)
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
            a += 0.1 * s / length
    expected = [a - 0.5 * g for a, g in zip(before, gradient(), strict=True)]
    sam = {"sam_method": "signs", "sam_rho": 0.1, "sam_sigma": 2.0}
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.5}
    trainer = sam_trainer(model, data, sam=sam, **options)
    trainer.train()
    for a, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-14)


def test_an_option_of_a_method_that_the_config_lacks_is_named(monkeypatch):
    strange = make_dataclass(
        "Strange", [("strength", float, field(default=1.0))], bases=(SAM,), frozen=True
    )
    monkeypatch.setitem(METHODS, "strange", strange)
    config = SAMConfig(sam_method="strange")
    with pytest.raises(TypeError, match=r"option .strength.*no field sam_strength"):
        config.build_method()


def test_two_seeds_draw_other_parts_of_the_weights_and_one_seed_the_same():
    names = [str(i) for i in range(64)]
    first, again, other = (ESAM(0.5).choose(names, 3, seed) for seed in (0, 0, 1))
    assert first == again != other

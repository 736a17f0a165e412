"""The Wide-ResNet: the sizes of the paper, its shapes, and that transformers knows it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from wide_resnet import WideBlock, WideResNetConfig, WideResNetForImageClassification


def build(**options) -> WideResNetForImageClassification:
    torch.manual_seed(0)
    sizes = {"depth": 10, "width": 1, "num_labels": 10, **options}
    return WideResNetForImageClassification(WideResNetConfig(**sizes))


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    # table 4 of the paper, for CIFAR-10
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (40, 8, 35.7), (28, 10, 36.5), (16, 8, 11.0)],
)
def test_the_number_of_parameters_is_that_of_the_paper(depth, width, millions):
    with torch.device("meta"):
        model = build(depth=depth, width=width)
    assert round(model.num_parameters() / 1e6, 1) == millions


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_the_depth_counts_the_convolutions(depth):
    with torch.device("meta"):
        model = build(depth=depth)
    on_the_path = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "shortcut" not in name
    ]
    # The paper's 6 n + 4 counts the three shortcuts, and not the linear layer.
    assert len(on_the_path) - 1 + 3 == depth


def test_a_block_is_the_one_of_its_docstring():
    torch.manual_seed(0)
    block = WideBlock(4, 4, stride=1, dropout=0.0)
    x = torch.randn(2, 4, 6, 6)
    out = block.conv1(torch.relu(block.bn1(x)))
    out = block.conv2(torch.relu(block.bn2(out)))
    assert block.shortcut is None
    torch.testing.assert_close(block(x), x + out)


def test_the_loss_of_an_untrained_model_is_about_that_of_guessing():
    model, images = build(), torch.randn(64, 3, 32, 32)
    output = model(images, labels=torch.arange(64) % 10)
    assert output.logits.shape == (64, 10)
    assert 2 < output.loss.item() < 4.5
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dropout_acts_in_training_alone():
    model, images = build(dropout=0.5), torch.randn(2, 3, 32, 32)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)
    model.eval()
    assert torch.equal(model(images).logits, model(images).logits)


def test_a_saved_model_comes_back_through_the_auto_class(tmp_path):
    model, images = build(width=2), torch.randn(2, 3, 32, 32)
    model(images)  # moves the running statistics, which are saved too
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, WideResNetForImageClassification)
    assert AutoConfig.from_pretrained(tmp_path).width == 2
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"depth": 12}, "depth=12 is not allowed. Allowed: 6 n \\+ 4"),
        ({"depth": 4}, "depth=4"),
        ({"width": 0}, "width=0 is not allowed. Allowed: 1 and more"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(option, said):
    with pytest.raises(ValueError, match=said):
        WideResNetConfig(**option)

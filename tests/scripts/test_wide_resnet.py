"""The Wide-ResNet: the sizes of the paper, its shapes, and its training by the script."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models.wide_resnet import WideBlock, WideResNetConfig, WideResNetForImageClassification
from PIL import Image
from train_image_classification import (
    CIFAR10_MEAN,
    DataArguments,
    ImageTensors,
    ModelArguments,
    build_model,
    load_data,
    main,
)
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

NEW = "--model_type wide_resnet --config_overrides depth=10,width=1"
SCRIPT = f"{NEW} --optim sgd --use_cpu --save_strategy no"
BATCHES = "--per_device_train_batch_size 16 --per_device_eval_batch_size 512"


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


def run(folder: Path, options: str):
    return main([*f"{SCRIPT} {BATCHES} {options}".split(), "--output_dir", str(folder)])


def test_the_script_trains_it_with_sam_and_what_it_saves_serves_a_pipeline(tmp_path):
    first = tmp_path / "first"
    options = "--max_train_samples 64 --max_steps 2 --logging_steps 1 --sam_rho 0.1"
    (result,) = run(first, f"{options} --learning_rate 0.01")
    history = json.loads((first / "trainer_state.json").read_text())["log_history"]
    norms = [entry["sam_perturbation_norm"] for entry in history if "loss" in entry]
    assert norms == pytest.approx([0.1, 0.1], rel=1e-4)
    assert result.passes == 2 * result.epochs

    model = AutoModelForImageClassification.from_pretrained(first)
    assert isinstance(model, WideResNetForImageClassification)
    assert (model.config.depth, model.config.width, model.config.image_size) == (10, 1, 8)
    processor = AutoImageProcessor.from_pretrained(first, backend="pil")
    _, _, test, _ = load_data(DataArguments())
    images = [row["image"].convert("RGB") for row in test]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    assert (logits.argmax(-1).numpy() == np.array(test["labels"])).mean() == result.score
    label = pipeline("image-classification", model=str(first))(images[0], top_k=1)[0]["label"]
    assert label == str(logits[0].argmax().item())

    again = ["--model_name_or_path", str(first), "--use_cpu", "--learning_rate", "0"]
    again += ["--max_steps", "1", "--sam_rho", "0", "--output_dir"]
    main([*again, str(tmp_path / "again")])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(name)), name


def test_the_sizes_that_are_not_given_are_those_of_the_configuration():
    args = ModelArguments(model_type="wide_resnet", config_overrides="dropout=0.25")
    with torch.device("meta"):
        config = build_model(args, list("0123456789"), (8, 8))[0].config
    assert (config.depth, config.width, config.dropout, config.num_labels) == (16, 8, 0.25, 10)


def test_an_image_of_the_mean_colour_of_cifar10_becomes_zeros():
    args = ModelArguments(model_type="wide_resnet", config_overrides="depth=10,width=1")
    _, processor = build_model(args, ["a", "b"], (8, 8))
    colour = np.round(255 * np.array(CIFAR10_MEAN)).astype(np.uint8)
    image = Image.fromarray(np.tile(colour, (8, 8, 1)))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels.abs().max() < 0.01  # half a level of 255, over the standard deviation
    assert (
        processor(Image.new("RGB", (8, 8), "white"), return_tensors="pt")["pixel_values"].min() > 2
    )


def test_both_passes_of_sam_see_the_smoothed_labels(tmp_path):
    """One update with learning rate 0 on one batch, against the two passes by hand."""
    epsilon, rho = 0.5, 0.2
    # Trained first: where the model is sure of the labels, smoothing makes a large difference.
    run(tmp_path / "sure", "--max_train_samples 16 --max_steps 10 --learning_rate 0.1 --sam_rho 0")
    options = f"--model_name_or_path {tmp_path}/sure --label_smoothing_factor {epsilon} {BATCHES}"
    options += f" --sam_rho {rho} --max_grad_norm 1e9 --learning_rate 0 --max_train_samples 16"
    options += f" --max_steps 1 --logging_steps 1 --use_cpu --output_dir {tmp_path}"
    main(options.split())
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]

    model = AutoModelForImageClassification.from_pretrained(tmp_path).double()
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    _, train, test, _ = load_data(DataArguments(max_train_samples=16))

    def losses(images) -> tuple[torch.Tensor, torch.Tensor]:
        rows = list(ImageTensors(images, processor, "RGB"))
        logits = model(torch.stack([row["pixel_values"] for row in rows]).double()).logits
        nll = -logits.log_softmax(-1)
        labels = torch.tensor([row["labels"] for row in rows])
        plain = nll[torch.arange(len(rows)), labels].mean()
        return (1 - epsilon) * plain + epsilon * nll.mean(), plain

    with torch.no_grad():
        smoothed, plain = losses(test)  # in one batch, by the running statistics
    assert history[-1]["eval_loss"] == pytest.approx(smoothed.item(), rel=1e-4)
    assert history[-1]["eval_loss"] != pytest.approx(plain.item(), rel=0.01)

    model.train()
    loss, plain = losses(train)
    assert history[0]["loss"] != pytest.approx(plain.item(), rel=0.05)
    weights = list(model.parameters())
    gradient = torch.autograd.grad(loss, weights)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    with torch.no_grad():
        for weight, g in zip(weights, gradient, strict=True):
            weight += rho * g / norm
    perturbed, _ = losses(train)
    descent = torch.autograd.grad(perturbed, weights)
    by_hand = {
        "loss": loss,
        "sam_ascent_grad_norm": norm,
        "sam_sharpness": perturbed - loss,
        "grad_norm": torch.cat([g.flatten() for g in descent]).norm(),
    }
    for name, value in by_hand.items():
        assert history[0][name] == pytest.approx(value.item(), rel=1e-2), name

"""CIFAR-10 with wrong labels on one GPU, in minutes: the images stay on the device as uint8.

    python scripts/benchmarks/cifar10_gpu.py --train_file train.parquet --test_file test.parquet \\
        --labels_file cifar10n.parquet --minutes 12 --output_file outputs/cifar10_gpu.json

A WRN-16-4 (or ResNet-18 with a 3 x 3 stem) in bf16, SGD with momentum, all 50,000 images with
crops and flips; 40 % synthetic wrong labels, and CIFAR-10N's "worse" ones if --labels_file is
given. For each kind of labels and seed: plain training, plain training with SAM's number of
forward-backward passes, SAM with rho 0.1 (SAM paper, section 3.3) and with the automatic radius.
After each epoch the model is scored on the test images; the peak and the last score are recorded.
A run is written as soon as it is finished. Runs that are in the file already are not repeated, and
no run is started that would not finish in time.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from common.data import add_symmetric_noise
from common.runs import save_json
from models.wide_resnet import WideResNetConfig, WideResNetForImageClassification
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from sam_hf import SAMConfig, SAMTrainer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images
PADDING = 4
# Name: rho (None: automatic; 0: plain), epochs in units of plain training.
WAYS = {"plain": (0.0, 1), "sam, auto": (None, 1), "plain, equal compute": (0.0, 2)}
WAYS |= {"sam, rho 0.1": (0.1, 1)}


class DeviceImages(Dataset):
    """uint8 images on the device, which are cropped, flipped and normalised batch by batch."""

    def __init__(self, pixels: Tensor, labels: Tensor, augment: bool) -> None:
        self.pixels, self.labels, self.augment = pixels, labels, augment
        shape = {"dtype": torch.float32, "device": pixels.device}
        self.mean, self.std = (torch.tensor(x, **shape).view(3, 1, 1) * 255 for x in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch: `pixel_values` (images, 3, 32, 32) and `labels`."""
        chosen = torch.tensor(indices, device=self.pixels.device)
        images = self.pixels[chosen]
        if self.augment:
            images = self._crop_and_flip(images)
        return {"pixel_values": (images - self.mean) / self.std, "labels": self.labels[chosen]}

    @staticmethod
    def _crop_and_flip(images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        padded = functional.pad(images, (PADDING,) * 4)
        make = {"device": images.device}
        top, left = torch.randint(2 * PADDING + 1, (2, count, 1), **make)
        rows, columns = top + torch.arange(height, **make), left + torch.arange(width, **make)
        is_flipped = torch.rand(count, 1, **make) < 0.5
        columns = torch.where(is_flipped, columns.flip(1), columns)
        number = torch.arange(count, **make)[:, None, None]
        return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Scores(TrainerCallback):
    """Test accuracy after each epoch."""

    def __init__(self, test: DeviceImages) -> None:
        self.test, self.values = test, list[float]()

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        right = 0
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            for part in torch.arange(len(self.test)).split(1000):
                batch = self.test.__getitems__(part.tolist())
                guesses = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
                right += (guesses == batch["labels"]).sum()
        self.values.append(float(right) / len(self.test))
        model.train()


def resnet18() -> nn.Module:
    """ResNet-18 with a 3 x 3 stem and no pooling before the first block."""
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=10)
    model = transformers.ResNetForImageClassification(config)
    stem = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    return model


def wrn16_4() -> nn.Module:
    return WideResNetForImageClassification(WideResNetConfig(depth=16, width=4, num_labels=10))


MODELS = {"wrn16-4": wrn16_4, "resnet18": resnet18}


def read_images(file: str, device: str) -> tuple[Tensor, np.ndarray]:
    """Pixels (images, 3, height, width) on the device, and the labels."""
    frame = pd.read_parquet(file)
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in frame["img"]]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels.to(device), frame["label"].to_numpy()


def train(way: str, seed: int, train_set: DeviceImages, test: DeviceImages, args: Any) -> dict:
    """Train once: the scores after each epoch, and the seconds."""
    rho, factor = WAYS[way]
    set_seed(seed)
    model = MODELS[args.model]().to(memory_format=torch.channels_last)
    scores = Scores(test)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=factor * args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=5e-4,
            lr_scheduler_type="cosine",
            optim="sgd",
            optim_args="momentum=0.9,nesterov=True",
            max_grad_norm=0.0,
            bf16=True,
            use_cpu=args.device == "cpu",
            seed=seed,
            dataloader_pin_memory=False,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            **{f"{what}_strategy": "no" for what in ("logging", "eval", "save")},
        )
        options = {"model": model, "args": arguments, "train_dataset": train_set}
        options |= {"data_collator": dict, "callbacks": [scores]}
        config = SAMConfig(sam_rho=rho)
        trainer = Trainer(**options) if rho == 0 else SAMTrainer(sam_config=config, **options)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    found = {"peak": max(scores.values), "final": scores.values[-1], "scores": scores.values}
    return {"way": way, "seed": seed, **found, "seconds": round(seconds, 1)}


def passes(way: str) -> int:
    """Forward-backward passes in units of plain training's."""
    rho, factor = WAYS[way]
    return factor if rho == 0 else 2 * factor


def seconds_per_pass(run: dict[str, Any]) -> float:
    """Seconds of a pass over the training images, with its share of the scoring."""
    rho, _ = WAYS[run["way"]]
    return run["seconds"] / len(run["scores"]) / (1 if rho == 0 else 2)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--labels_file", help="CIFAR-10N, with the column worse_label")
    parser.add_argument("--output_file", default="outputs/cifar10_gpu.json")
    parser.add_argument("--minutes", type=float, default=12.0, help="start no run that ends later")
    parser.add_argument("--model", choices=MODELS, default="wrn16-4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=30, help="of plain training")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    start, file = time.perf_counter(), Path(args.output_file)

    pixels, right = read_images(args.train_file, args.device)
    test_pixels, test_labels = read_images(args.test_file, args.device)
    test = DeviceImages(test_pixels, torch.tensor(test_labels, device=args.device), augment=False)
    human = None
    if args.labels_file:
        labels = pd.read_parquet(args.labels_file)
        if not np.array_equal(labels["clean_label"], right):
            raise SystemExit(f"{args.labels_file}: clean_label differs from --train_file's labels")
        human = labels["worse_label"].to_numpy()
    names = ("model", "epochs", "batch_size", "learning_rate", "device")
    head = {name: getattr(args, name) for name in names}
    head |= {"torch": torch.__version__, "transformers": transformers.__version__}
    head |= {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    content: dict[str, Any] = {**head, "runs": []}
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        if differences := [name for name in head if content.get(name) != head[name]]:
            raise SystemExit(f"{file} was made with another {differences[0]}: choose another file")
    done = {(run["labels"], run["way"], run["seed"]) for run in content["runs"]}
    per_pass = [seconds_per_pass(run) for run in content["runs"]]
    kinds = ["40 % wrong", *(["worse label"] if human is not None else [])]
    for seed, kind, way in [(s, k, w) for s in args.seeds for k in kinds for w in WAYS]:
        left = 60 * args.minutes - (time.perf_counter() - start)
        expected = passes(way) * args.epochs * max(per_pass, default=0.0)
        if (kind, way, seed) in done or expected > left or left < 0:
            continue
        labels = human if kind == "worse label" else add_symmetric_noise(right, 10, 0.4, seed)
        on_device = torch.tensor(labels, device=args.device)
        train_set = DeviceImages(pixels, on_device, augment=True)
        run = {"labels": kind, **train(way, seed, train_set, test, args)}
        per_pass.append(seconds_per_pass(run))
        content["runs"].append(run)
        save_json(content, file)
        peak, final = (f"{run[name]:.4f}" for name in ("peak", "final"))
        print(f"{kind}, {way}, seed {seed}: peak {peak}, final {final}, {run['seconds']} s")
    return content


if __name__ == "__main__":
    main()

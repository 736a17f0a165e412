"""The script for CIFAR-10 on a GPU, on a CPU: its images, its runs and how it resumes."""

from __future__ import annotations

import io
import itertools
import json

import cifar10_gpu
import numpy as np
import pandas as pd
import pytest
import torch
from cifar10_gpu import MEAN, PADDING, STD, WAYS, DeviceImages
from models.wide_resnet import WideResNetConfig, WideResNetForImageClassification
from PIL import Image
from torch.nn import functional


def test_images_are_normalised_and_training_images_are_crops_that_may_be_flipped():
    pixels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(6)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    plain = DeviceImages(pixels, labels, augment=False).__getitems__([4, 1])
    torch.testing.assert_close(plain["pixel_values"], (pixels[[4, 1]] / 255 - mean) / std)
    assert plain["labels"].tolist() == [4, 1]
    torch.manual_seed(0)
    batch = DeviceImages(pixels, labels, augment=True).__getitems__([2] * 40)["pixel_values"]
    padded = functional.pad(pixels[2], (PADDING,) * 4)
    shifts = itertools.product(range(2 * PADDING + 1), repeat=2)
    crops = [padded[:, top : top + 8, left : left + 8] for top, left in shifts]
    possible = [(x / 255 - mean) / std for crop in crops for x in (crop, crop.flip(-1))]
    found = [
        next(i for i, crop in enumerate(possible) if torch.allclose(crop, image, atol=1e-5))
        for image in batch
    ]
    assert len(set(found)) > 20 and len({i % 2 for i in found}) == 2


@pytest.mark.slow
def test_runs_are_recorded_and_not_repeated(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for name, count in (("train", 32), ("test", 8)):
        files = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        frame = pd.DataFrame({"img": files, "label": np.arange(count) % 10})
        frame.to_parquet(tmp_path / f"{name}.parquet")
    labels = {"clean_label": np.arange(32) % 10, "worse_label": np.arange(32)[::-1] % 10}
    human = pd.DataFrame(labels)
    human.to_parquet(tmp_path / "human.parquet")
    config = WideResNetConfig(depth=10, width=1, num_labels=10)
    tiny = {"wrn16-4": lambda: WideResNetForImageClassification(config)}
    monkeypatch.setattr(cifar10_gpu, "MODELS", tiny)
    given = ["--device", "cpu", "--epochs", "1", "--batch_size", "16", "--seeds", "0"]
    for name in ("train", "test"):
        given += [f"--{name}_file", str(tmp_path / f"{name}.parquet")]
    given += ["--labels_file", str(tmp_path / "human.parquet")]
    given += ["--output_file", str(tmp_path / "out.json")]
    content = cifar10_gpu.main(given)
    runs = content["runs"]
    assert [run["way"] for run in runs] == [*WAYS, *WAYS]
    assert [run["labels"] for run in runs] == ["40 % wrong"] * 4 + ["worse label"] * 4
    for run in runs:
        assert len(run["scores"]) == (2 if "equal" in run["way"] else 1)
        assert run["final"] == run["scores"][-1] <= run["peak"]
    monkeypatch.setattr(cifar10_gpu, "train", lambda *a: pytest.fail("repeated"))
    assert cifar10_gpu.main(given) == json.loads((tmp_path / "out.json").read_text()) == content
    with pytest.raises(SystemExit, match="was made with another epochs"):
        cifar10_gpu.main([*given, "--epochs", "2"])
    human.assign(clean_label=0).to_parquet(tmp_path / "human.parquet")
    with pytest.raises(SystemExit, match="clean_label differs"):
        cifar10_gpu.main(given)
    human.to_parquet(tmp_path / "human.parquet")
    (tmp_path / "out.json").unlink()  # none is started that would not end in time
    assert cifar10_gpu.main([*given, "--minutes", "0"])["runs"] == []

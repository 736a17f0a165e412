"""Sources, splits, label noise and tensors of the image classification script."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_image_classification
from common.cli import InputError
from common.data import add_symmetric_noise
from PIL import Image
from sklearn.datasets import load_digits
from train_image_classification import DataArguments, ImageTensors, load_data, random_crop_and_flip
from transformers import ViTImageProcessorPil


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(level: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8))


def write_parquet(file: Path, labels: list, label_feature, names=("image", "label")) -> str:
    features = datasets.Features({names[0]: datasets.Image(), names[1]: label_feature})
    columns = {names[0]: [picture(10 * i) for i in range(len(labels))], names[1]: labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))
    return str(file)


def write_folder(folder: Path, counts: dict[str, int]) -> str:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(10 * i).save(folder / name / f"{i}.png")
    return str(folder)


CATS_AND_DOGS = datasets.ClassLabel(names=["cat", "dog"])


def pixels(data: datasets.Dataset) -> list[bytes]:
    return [row["image"].tobytes() for row in data]


def test_the_default_is_the_digits_in_a_fixed_stratified_split_with_their_17_levels():
    name, train, test, class_names = load_data(DataArguments())
    assert (name, len(train), len(test)) == ("digits", 1437, 360)
    assert class_names == list("0123456789")
    shares = np.bincount(test["labels"]) / len(test)
    assert np.abs(shares - np.bincount(load_digits().target) / 1797).max() < 0.003
    torch.manual_seed(7)
    np.random.seed(7)
    _, _, again, _ = load_data(DataArguments())
    assert again["labels"][:] == test["labels"][:] and pixels(again) == pixels(test)
    scans = {scan.tobytes() for scan in (load_digits().images * 255 / 16).round().astype(np.uint8)}
    found = pixels(train) + pixels(test)
    assert set(found) == scans
    assert len(found) == 1797


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 1.0])
def test_exactly_the_fraction_of_labels_changes(fraction):
    labels = np.arange(1003) % 7
    noisy = add_symmetric_noise(labels, 7, fraction, seed=0)
    assert (noisy != labels).sum() == round(fraction * 1003)
    assert set(noisy) <= set(range(7))
    assert (labels == np.arange(1003) % 7).all()


def test_a_changed_label_is_each_of_the_other_classes_equally_often():
    noisy = add_symmetric_noise(np.full(30_000, 2), 4, 1.0, seed=0)
    counts = Counter(noisy.tolist())
    assert set(counts) == {0, 1, 3}
    assert all(abs(count - 10_000) < 300 for count in counts.values())  # 3.7 sigma


def test_the_noise_is_a_function_of_its_seed_alone():
    labels = np.arange(500) % 10
    first = add_symmetric_noise(labels, 10, 0.4, seed=1)
    np.random.seed(3)
    assert (add_symmetric_noise(labels, 10, 0.4, seed=1) == first).all()
    assert (add_symmetric_noise(labels, 10, 0.4, seed=2) != first).any()


def test_the_noise_changes_the_training_labels_and_never_those_of_the_test():
    _, train, test, _ = load_data(DataArguments())
    args = DataArguments(label_noise=0.4)
    _, noisy, noisy_test, _ = load_data(args)
    assert (np.array(noisy["labels"]) != np.array(train["labels"])).sum() == round(0.4 * 1437)
    assert noisy_test["labels"][:] == test["labels"][:]
    assert args.title("digits") == "digits, 40% label noise"


def test_a_subset_is_drawn_before_the_noise_so_that_its_fraction_is_exact():
    limits = {"max_train_samples": 64, "max_eval_samples": 32}
    _, train, test, _ = load_data(DataArguments(**limits))
    _, noisy, _, _ = load_data(DataArguments(**limits, label_noise=0.5))
    assert (len(train), len(test)) == (64, 32)
    assert pixels(noisy) == pixels(train)
    assert (np.array(noisy["labels"]) != np.array(train["labels"])).sum() == 32


def test_parquet_columns_may_have_any_names(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [0, 1, 1], CATS_AND_DOGS, ("img", "image"))
    args = {"train_file": [file], "validation_file": [file]}
    _, train, _, names = load_data(DataArguments(**args, image_column="img", label_column="image"))
    assert names == ["cat", "dog"]
    assert train.column_names == ["image", "labels"]
    assert train["labels"][:] == [0, 1, 1]
    assert [row["image"].getpixel((0, 0))[0] for row in train] == [0, 10, 20]
    with pytest.raises(InputError, match=r"--label_column: .* no column 'label'; the columns: img"):
        load_data(DataArguments(**args, image_column="img"))
    with pytest.raises(InputError, match=r"--image_column: .* 'im' \(did you mean img\?\);"):
        load_data(DataArguments(**args, image_column="im", label_column="image"))


def test_a_named_data_set_has_its_own_splits_or_a_part_is_held_out(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", [0, 1, 1, 0, 1, 0], CATS_AND_DOGS)
    write_parquet(folder / "test.parquet", [1, 0], CATS_AND_DOGS)
    args = DataArguments(dataset_name=str(folder))
    assert args.hub_dataset is None
    assert DataArguments(dataset_name="uoft-cs/cifar10").hub_dataset == "uoft-cs/cifar10"
    _, train, test, _ = load_data(args)
    assert train["labels"][:] == [0, 1, 1, 0, 1, 0]
    assert test["labels"][:] == [1, 0]
    swapped = DataArguments(dataset_name=str(folder), train_split="test", eval_split="train")
    assert load_data(swapped)[1]["labels"][:] == [1, 0]
    held_out = DataArguments(dataset_name=str(folder), eval_fraction=0.34)
    assert [len(data) for data in load_data(held_out)[1:3]] == [3, 3]
    with pytest.raises(InputError, match=r"--eval_split dev \(without .* cannot be loaded: .*dev"):
        load_data(DataArguments(dataset_name=str(folder), eval_split="dev"))


@pytest.mark.parametrize(
    ("labels", "feature", "classes"),
    [
        (["dog", "cat", "dog"], datasets.Value("string"), ["cat", "dog"]),
        ([7, 3, 7], datasets.Value("int64"), ["3", "7"]),
    ],
)
def test_plain_labels_are_numbered_in_their_order(tmp_path, labels, feature, classes):
    file = write_parquet(tmp_path / "a.parquet", labels, feature)
    _, train, test, names = load_data(
        DataArguments(train_file=[file, file], validation_file=[file])
    )
    assert names == classes
    assert train["labels"][:] == [1, 0, 1, 1, 0, 1]
    assert test["labels"][:] == [1, 0, 1]


def test_evaluation_labels_are_matched_by_name_and_not_by_number(tmp_path):
    train = write_parquet(tmp_path / "a.parquet", [0, 1], CATS_AND_DOGS)
    swapped = datasets.ClassLabel(names=["dog", "cat"])
    test = write_parquet(tmp_path / "b.parquet", [0, 0, 1], swapped)
    _, _, found, _ = load_data(DataArguments(train_file=[train], validation_file=[test]))
    assert found["labels"][:] == [1, 1, 0]
    strange = write_parquet(tmp_path / "c.parquet", [0], datasets.ClassLabel(names=["cow"]))
    with pytest.raises(InputError, match=r"evaluation examples have classes .*: \['cow'"):
        load_data(DataArguments(train_file=[train], validation_file=[strange]))


def test_an_image_folder_has_one_class_per_sub_folder_and_equal_shares_are_held_out(tmp_path):
    folder = write_folder(tmp_path / "data", {"cat": 20, "dog": 10})
    args = {"dataset_name": folder, "eval_fraction": 0.3}
    _, train, test, names = load_data(DataArguments(**args))
    assert names == ["cat", "dog"]
    assert np.bincount(train["labels"]).tolist() == [14, 7]
    assert np.bincount(test["labels"]).tolist() == [6, 3]
    # The source is sorted by class; a subset has both.
    subset = load_data(DataArguments(**args, max_train_samples=8, max_eval_samples=5))
    assert set(subset[1]["labels"]) == set(subset[2]["labels"]) == {0, 1}


def bad_sources(tmp_path: Path) -> dict[str, tuple[dict, str]]:
    good = write_parquet(tmp_path / "good.parquet", [0, 1, 1], CATS_AND_DOGS)
    half = write_parquet(tmp_path / "half.parquet", [0, -1, 1], CATS_AND_DOGS)
    none = write_parquet(tmp_path / "none.parquet", [-1, -1], CATS_AND_DOGS)
    empty = write_parquet(tmp_path / "empty.parquet", ["cat", None], datasets.Value("string"))
    floats = write_parquet(tmp_path / "floats.parquet", [0.5, 1.5], datasets.Value("float32"))
    one = write_parquet(tmp_path / "one.parquet", [0, 0], datasets.ClassLabel(names=["cat"]))
    datasets.Dataset.from_dict({"image": [1, 2], "label": ["a", "b"]}).to_parquet(
        tmp_path / "numbers.parquet"
    )
    datasets.Dataset.from_dict({"image": [b"x", b"y"], "label": ["a", "b"]}).to_parquet(
        tmp_path / "bytes.parquet"
    )
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "void").mkdir()
    return {
        "no such file": ({"train_file": ["x.parquet"]}, "cannot be loaded: Unable to find"),
        "no such evaluation file": (
            {"train_file": [good], "validation_file": ["x.parquet"]},
            "--validation_file ['x.parquet'] cannot be loaded",
        ),
        "no parquet": ({"train_file": [str(tmp_path / "text.parquet")]}, "cannot be loaded"),
        "an empty folder": ({"dataset_name": str(tmp_path / "void")}, "cannot be loaded"),
        "some unlabeled": ({"train_file": [half]}, "1 of 3 examples have no label"),
        "all unlabeled": (
            {"train_file": [good], "validation_file": [none]},
            "2 of 2 examples have no label",
        ),
        "an empty label": ({"train_file": [empty]}, "1 of 2 examples have no label"),
        "no classes": ({"train_file": [floats]}, "not integers or strings"),
        "one class": ({"train_file": [one]}, "two are needed"),
        "no images": (
            {"train_file": [str(tmp_path / "numbers.parquet")]},
            "--image_column 'image' does not hold images",
        ),
        "broken images": (
            {"train_file": [str(tmp_path / "bytes.parquet")]},
            "--image_column 'image' does not hold images",
        ),
        "too few to hold out": ({"train_file": [good]}, "--eval_fraction 0.2 cannot be held out"),
    }


def test_a_source_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    for name, (arguments, message) in bad_sources(tmp_path).items():
        with pytest.raises(InputError) as error:
            load_data(DataArguments(**arguments))
        assert message in str(error.value), name
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_noise": 1.5}, "--label_noise must be from 0 to 1, got 1.5"),
        ({"label_noise": -0.1}, "--label_noise must be from 0 to 1, got -0.1"),
        ({"eval_fraction": 1.0}, "--eval_fraction must be between 0 and 1"),
        ({"max_train_samples": 0}, "--max_train_samples must be 1 or more"),
        ({"image_column": "img"}, "--image_column has no effect on the built-in examples"),
        ({"label_column": "y"}, "--label_column has no effect on the built-in examples"),
        ({"dataset_name": "./x"}, "--dataset_name: there is no folder './x'"),
        ({"train_split": "x"}, "--train_split has no effect without --dataset_name"),
        ({"validation_file": ["x"]}, "--validation_file has no effect without --train_file"),
        (
            {"train_file": ["x"], "dataset_name": "y"},
            "--train_file has no effect with --dataset_name",
        ),
        (
            {"train_file": ["x"], "validation_file": ["y"], "eval_fraction": 0.1},
            "--eval_fraction has no effect on evaluation data that is given",
        ),
        (
            {"dataset_name": "x", "eval_split": "dev", "eval_fraction": 0.1},
            "--eval_fraction has no effect on evaluation data that is given",
        ),
    ],
)
def test_data_options_that_are_wrong_or_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


PROCESSOR = ViTImageProcessorPil(
    size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


def digits(count: int) -> datasets.Dataset:
    return load_data(DataArguments(max_train_samples=count))[1]


def test_small_sets_are_kept_and_large_ones_processed_on_access_with_the_same_result(monkeypatch):
    images = digits(4)
    kept = ImageTensors(images, PROCESSOR, "RGB")
    monkeypatch.setattr(train_image_classification, "CACHE_BYTES", 0)
    lazy = ImageTensors(images, PROCESSOR, "RGB")
    for i in range(4):
        assert torch.equal(kept[i]["pixel_values"], lazy[i]["pixel_values"])
        assert kept[i]["labels"] == lazy[i]["labels"] == images["labels"][i]
    once, again = kept[0]["pixel_values"], kept[0]["pixel_values"]
    assert once.data_ptr() == again.data_ptr()
    once, again = lazy[0]["pixel_values"], lazy[0]["pixel_values"]
    assert once.data_ptr() != again.data_ptr()
    scaled = np.asarray(images[0]["image"], dtype=np.float32) / 255 * 2 - 1
    assert torch.allclose(kept[0]["pixel_values"], torch.tensor(scaled).expand(3, 8, 8))


def test_the_augmentation_shifts_and_flips_and_is_seeded():
    image = torch.arange(1.0, 65.0).view(1, 8, 8)
    torch.manual_seed(0)
    seen = [random_crop_and_flip(image) for _ in range(200)]
    assert all(each.shape == image.shape for each in seen)
    # 3 x 3 shifts by up to 1/8 of the side, each flipped or not.
    assert len({tuple(each.flatten().tolist()) for each in seen}) == 18
    assert any(torch.equal(each, image) for each in seen)
    assert any(torch.equal(each, image.flip(-1)) for each in seen)
    torch.manual_seed(0)
    assert torch.equal(random_crop_and_flip(image), seen[0])


def test_only_the_set_that_asks_for_it_is_augmented():
    plain = ImageTensors(digits(1), PROCESSOR, "RGB")
    augmented = ImageTensors(digits(1), PROCESSOR, "RGB", augment=True)
    assert all(torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"]) for _ in range(9))
    shown = [augmented[0]["pixel_values"] for _ in range(9)]
    assert any(not torch.equal(image, plain[0]["pixel_values"]) for image in shown)


def test_an_image_that_cannot_be_read_is_named(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Value("int64")})
    columns = {"image": [picture(0), None, picture(2)], "labels": [0, 0, 0]}
    images = datasets.Dataset.from_dict(columns, features)
    with pytest.raises(InputError, match="image 1 of its data set cannot be read"):
        ImageTensors(images, PROCESSOR, "RGB")
    monkeypatch.setattr(train_image_classification, "CACHE_BYTES", 0)
    lazy = ImageTensors(images, PROCESSOR, "RGB")
    assert lazy[2]["labels"] == 0
    with pytest.raises(InputError, match="image 1 of its data set cannot be read"):
        lazy[1]

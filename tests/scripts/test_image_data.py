"""Sources, splits, label noise and tensors of the image classification script."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from common import image_data
from common.image_arguments import DataArguments
from common.image_data import ImageTensors, load_image_data, random_crop_and_flip
from common.labeled_data import add_symmetric_noise
from common.script_utils import InputError
from PIL import Image
from sklearn.datasets import load_digits
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


def levels(images) -> list[int]:
    return [images.image(i).convert("L").getpixel((0, 0)) for i in range(len(images))]


def test_the_default_is_the_digits_in_a_fixed_stratified_split():
    data = load_image_data(DataArguments())
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.class_names == list("0123456789")
    shares = np.bincount(data.test.labels) / len(data.test)
    assert np.abs(shares - np.bincount(load_digits().target) / 1797).max() < 0.003
    torch.manual_seed(7)
    np.random.seed(7)
    again = load_image_data(DataArguments())
    assert (again.test.labels == data.test.labels).all()
    assert all(again.test.image(i) == data.test.image(i) for i in range(360))


def test_the_digits_keep_their_17_levels_and_no_image_is_in_both_splits():
    data = load_image_data(DataArguments())
    scans = {scan.tobytes() for scan in (load_digits().images * 255 / 16).round().astype(np.uint8)}
    found = [
        split.image(i).tobytes() for split in (data.train, data.test) for i in range(len(split))
    ]
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
    clean = load_image_data(DataArguments())
    noisy = load_image_data(DataArguments(label_noise=0.4))
    assert (noisy.train.labels != clean.train.labels).sum() == noisy.labels_changed == 575
    assert (noisy.test.labels == clean.test.labels).all()
    assert "575" in noisy.describe()
    assert "40% label noise" in noisy.describe()
    other = load_image_data(DataArguments(label_noise=0.4, label_noise_seed=1))
    assert (other.train.labels != noisy.train.labels).any()


def test_a_subset_is_drawn_before_the_noise_so_that_its_fraction_is_exact():
    data = load_image_data(
        DataArguments(label_noise=0.5, max_train_samples=64, max_eval_samples=32)
    )
    assert (len(data.train), len(data.test), data.labels_changed) == (64, 32, 32)


def test_parquet_columns_may_have_any_names(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [0, 1, 1], CATS_AND_DOGS, ("img", "fine"))
    args = {"train_file": [file], "validation_file": [file]}
    data = load_image_data(DataArguments(**args, image_column="img", label_column="fine"))
    assert data.class_names == ["cat", "dog"]
    assert data.train.labels.tolist() == [0, 1, 1]
    assert levels(data.train) == [0, 10, 20]
    with pytest.raises(
        InputError, match=r"--label_column: .* no column 'label'; its columns: img, fine"
    ):
        load_image_data(DataArguments(**args))
    with pytest.raises(InputError, match=r"--image_column: .* 'image' \(did you mean img\?\);"):
        load_image_data(DataArguments(**args, label_column="fine"))


def test_a_named_data_set_has_its_own_splits(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 1], CATS_AND_DOGS)
    write_parquet(tmp_path / "set" / "test.parquet", [1, 0], CATS_AND_DOGS)
    args = DataArguments(dataset_name=str(tmp_path / "set"))
    assert args.hub_dataset is None
    assert DataArguments(dataset_name="uoft-cs/cifar10").hub_dataset == "uoft-cs/cifar10"
    data = load_image_data(args)
    assert data.train.labels.tolist() == [0, 1, 1]
    assert data.test.labels.tolist() == [1, 0]
    swapped = DataArguments(
        dataset_name=str(tmp_path / "set"), train_split="test", eval_split="train"
    )
    assert load_image_data(swapped).train.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"--dataset_name .* cannot be loaded: .*validation"):
        load_image_data(DataArguments(dataset_name=str(tmp_path / "set"), eval_split="validation"))


def test_several_parquet_files_are_one_set(tmp_path):
    files = [write_parquet(tmp_path / f"{i}.parquet", [0, 1, 1], CATS_AND_DOGS) for i in range(2)]
    data = load_image_data(DataArguments(train_file=files, validation_file=files[:1]))
    assert (len(data.train), len(data.test)) == (6, 3)


@pytest.mark.parametrize(
    ("labels", "feature", "classes"),
    [
        (["dog", "cat", "dog"], datasets.Value("string"), ["cat", "dog"]),
        ([7, 3, 7], datasets.Value("int64"), ["3", "7"]),
    ],
)
def test_plain_labels_are_numbered_in_their_order(tmp_path, labels, feature, classes):
    file = write_parquet(tmp_path / "a.parquet", labels, feature)
    data = load_image_data(DataArguments(train_file=[file], validation_file=[file]))
    assert data.class_names == classes
    assert data.train.labels.tolist() == [1, 0, 1]


def test_evaluation_labels_are_matched_by_name_and_not_by_number(tmp_path):
    train = write_parquet(tmp_path / "a.parquet", [0, 1], CATS_AND_DOGS)
    swapped = datasets.ClassLabel(names=["dog", "cat"])
    test = write_parquet(tmp_path / "b.parquet", [0, 0, 1], swapped)
    data = load_image_data(DataArguments(train_file=[train], validation_file=[test]))
    assert data.test.labels.tolist() == [1, 1, 0]
    strange = write_parquet(tmp_path / "c.parquet", [0], datasets.ClassLabel(names=["cow"]))
    with pytest.raises(InputError, match=r"classes that the training has not: \['cow'"):
        load_image_data(DataArguments(train_file=[train], validation_file=[strange]))


def test_an_image_folder_has_one_class_per_sub_folder(tmp_path):
    # "test" as a class, because `datasets` takes such folders for splits if it is let.
    train = write_folder(tmp_path / "train", {"cat": 2, "dog": 3, "test": 2})
    test = write_folder(tmp_path / "val", {"dog": 2})
    data = load_image_data(DataArguments(train_dir=train, validation_dir=test))
    assert data.class_names == ["cat", "dog", "test"]
    assert np.bincount(data.train.labels).tolist() == [2, 3, 2]
    assert data.test.labels.tolist() == [1, 1]


def test_without_evaluation_data_a_share_of_the_training_data_is_set_aside(tmp_path):
    train = write_folder(tmp_path / "train", {"cat": 10, "dog": 10})
    data = load_image_data(DataArguments(train_dir=train, eval_fraction=0.3))
    assert np.bincount(data.train.labels).tolist() == [7, 7]
    assert np.bincount(data.test.labels).tolist() == [3, 3]


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
    (tmp_path / "flat").mkdir()
    picture(0).save(tmp_path / "flat" / "a.png")
    (tmp_path / "void").mkdir()
    return {
        "no such file": ({"train_file": ["x.parquet"]}, "--train_file 'x.parquet': there is no"),
        "no such evaluation file": (
            {"train_file": [good], "validation_file": ["x.parquet"]},
            "--validation_file 'x.parquet': there is no such file",
        ),
        "no parquet": ({"train_file": [str(tmp_path / "text.parquet")]}, "cannot be loaded"),
        "no such folder": ({"train_dir": "x"}, "--train_dir 'x': there is no such folder"),
        "no sub-folders": (
            {"train_dir": str(tmp_path / "flat")},
            "only the class ['flat']: two are needed",
        ),
        "an empty folder": ({"train_dir": str(tmp_path / "void")}, "cannot be loaded"),
        "some unlabeled": ({"train_file": [half]}, "1 of the 3 training images have no label"),
        "all unlabeled": (
            {"train_file": [good], "validation_file": [none]},
            "2 of the 2 evaluation images have no label",
        ),
        "an empty label": ({"train_file": [empty]}, "1 of the 2 training images have no label"),
        "no classes": ({"train_file": [floats]}, "classes must be integers or strings"),
        "one class": ({"train_file": [one]}, "two are needed"),
        "no images": (
            {"train_file": [str(tmp_path / "numbers.parquet")]},
            "--image_column 'image'",
        ),
        "broken images": ({"train_file": [str(tmp_path / "bytes.parquet")]}, "cannot be read as"),
        "too few to set aside": ({"train_file": [good]}, "--eval_fraction 0.2 cannot be set aside"),
    }


def test_a_subset_of_a_sorted_source_has_all_its_classes(tmp_path):
    folder = write_folder(tmp_path / "data", {"cat": 20, "dog": 20})
    args = {"train_dir": folder, "validation_dir": folder, "max_train_samples": 10}
    subset = load_image_data(DataArguments(**args, max_eval_samples=10))
    assert set(subset.train.labels) == set(subset.test.labels) == {0, 1}
    again = load_image_data(DataArguments(**args))
    assert (again.train.labels == subset.train.labels).all()
    assert len(again.test) == 40


def test_a_source_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    for name, (arguments, message) in bad_sources(tmp_path).items():
        with pytest.raises(InputError) as error:
            load_image_data(DataArguments(**arguments))
        assert message in str(error.value), name
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_noise": 1.5}, "--label_noise must be from 0 to 1, got 1.5"),
        ({"label_noise": -0.1}, "--label_noise must be from 0 to 1, got -0.1"),
        ({"label_noise_seed": 1}, "--label_noise_seed has no effect without --label_noise"),
        ({"label_noise": 0.1, "label_noise_seed": -1}, "--label_noise_seed must be 0 or more"),
        ({"eval_fraction": 1.0}, "--eval_fraction must be between 0 and 1"),
        ({"max_train_samples": 0}, "--max_train_samples must be 1 or more"),
        ({"image_column": "img"}, "--image_column has no effect on the built-in digits"),
        ({"label_column": "y"}, "--label_column has no effect on the built-in digits"),
        ({"train_split": "x"}, "--train_split has no effect without --dataset_name"),
        ({"validation_file": ["x"]}, "--validation_file has no effect without --train_file"),
        ({"train_file": ["x"], "validation_dir": "y"}, "--validation_dir has no effect without"),
        ({"train_file": ["x"], "train_dir": "y"}, "give one of --train_file and --train_dir"),
        (
            {"dataset_name": "x", "eval_fraction": 0.1},
            "--eval_fraction has no effect: this source has its own",
        ),
    ],
)
def test_data_options_that_are_wrong_or_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


PROCESSOR = ViTImageProcessorPil(
    size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


def test_small_sets_are_kept_and_large_ones_processed_each_time_with_the_same_result(monkeypatch):
    images = load_image_data(DataArguments(max_train_samples=4)).train
    kept = ImageTensors(images, PROCESSOR, "RGB")
    monkeypatch.setattr(image_data, "CACHE_BYTES", 0)
    lazy = ImageTensors(images, PROCESSOR, "RGB")
    for i in range(4):
        assert torch.equal(kept[i]["pixel_values"], lazy[i]["pixel_values"])
        assert kept[i]["labels"] == lazy[i]["labels"] == images.labels[i]
    once, again = kept[0]["pixel_values"], kept[0]["pixel_values"]
    assert once.data_ptr() == again.data_ptr()
    once, again = lazy[0]["pixel_values"], lazy[0]["pixel_values"]
    assert once.data_ptr() != again.data_ptr()
    pixels = np.asarray(images.image(0), dtype=np.float32) / 255 * 2 - 1
    assert torch.allclose(kept[0]["pixel_values"], torch.tensor(pixels).expand(3, 8, 8))


def test_the_augmentation_shifts_and_flips_and_is_seeded():
    pixels = torch.arange(1.0, 65.0).view(1, 8, 8)
    torch.manual_seed(0)
    seen = [random_crop_and_flip(pixels) for _ in range(200)]
    assert all(image.shape == pixels.shape for image in seen)
    # 3 x 3 shifts by up to 1/8 of the side, each flipped or not.
    assert len({tuple(image.flatten().tolist()) for image in seen}) == 18
    assert any(torch.equal(image, pixels) for image in seen)
    assert any(torch.equal(image, pixels.flip(-1)) for image in seen)
    torch.manual_seed(0)
    assert torch.equal(random_crop_and_flip(pixels), seen[0])


def test_only_the_set_that_asks_for_it_is_augmented():
    images = load_image_data(DataArguments(max_train_samples=1)).train
    plain = ImageTensors(images, PROCESSOR, "RGB")
    augmented = ImageTensors(images, PROCESSOR, "RGB", augment=True)
    assert all(torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"]) for _ in range(9))
    shown = [augmented[0]["pixel_values"] for _ in range(9)]
    assert any(not torch.equal(image, plain[0]["pixel_values"]) for image in shown)


def test_an_image_that_cannot_be_read_is_named(monkeypatch):
    images = image_data.LabeledImages([picture(0), None, picture(2)], np.zeros(3, dtype=int))
    with pytest.raises(InputError, match="image number 1 of its set cannot be read"):
        ImageTensors(images, PROCESSOR, "RGB")
    monkeypatch.setattr(image_data, "CACHE_BYTES", 0)
    lazy = ImageTensors(images, PROCESSOR, "RGB")
    assert lazy[2]["labels"] == 0
    with pytest.raises(InputError, match="image number 1 of its set cannot be read"):
        lazy[1]

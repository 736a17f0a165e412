"""CIFAR-10 in the comparison: its files, the labels that people gave, and the model."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sam_hf")

from common.script_utils import InputError
from compare.arguments import Options
from compare.recipes import Recipe
from compare.results import RunSpec
from compare.runs import train_once
from compare.tasks import build_task


@pytest.fixture
def cifar(tmp_path):
    """Three small parquet files in the layout of CIFAR-10 and CIFAR-10N, as options."""
    datasets = pytest.importorskip("datasets")
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    for name in ("train", "test"):
        images = random.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
        rows = {"img": list(images), "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    worse = (labels + (np.arange(60) % 4 == 0)) % 3
    human = {"clean_label": labels, "worse_label": worse}
    datasets.Dataset.from_dict(human).to_parquet(tmp_path / "human.parquet")
    human = {"clean_label": labels[::-1].copy(), "worse_label": worse}
    datasets.Dataset.from_dict(human).to_parquet(tmp_path / "disordered.parquet")
    return {
        "task": "cifar10",
        "train_file": [str(tmp_path / "train.parquet")],
        "validation_file": [str(tmp_path / "test.parquet")],
        "labels_file": str(tmp_path / "human.parquet"),
        "label_column": ["worse_label"],
        "max_train_samples": 40,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "use_cpu": True,
    }


def test_cifar_trains_a_wide_resnet_on_the_labels_that_people_gave(cifar):
    options = Options(**cifar)
    task = build_task(options)
    train, _ = task.sets("worse_label", 0, is_tuning=False)
    differing = int((train.data.labels != task.data.train.labels).sum())
    assert 0 < differing < 20
    recipe = Recipe("sam", "d", options={"sam_rho": 0.1})
    record = train_once(recipe, task, RunSpec("sam", "worse_label", 0), options)
    assert record["passes"] == 2.0
    part, scored = task.sets("worse_label", 100, is_tuning=True)
    assert len(part) + len(scored) == 40


def test_synthetic_and_human_labels_stand_beside_each_other_and_rho_is_tuned_on_human_ones(cifar):
    both = build_task(Options(**cifar, label_noise=[0.2]))
    assert list(both.levels) == ["0.2", "worse_label"]
    assert list(build_task(Options(**cifar)).levels) == ["worse_label"]
    assert list(build_task(Options(**cifar, tune=True)).levels) == ["worse_label"]


def test_a_small_vit_takes_the_place_of_the_wide_resnet(cifar):
    task = build_task(Options(**cifar, model="vit"))
    assert task.model(0).config.model_type == "vit"
    assert task.training["learning_rate"] == 1e-3 and "optim" not in task.training
    assert task.settings["model"]["vit"]["patch_size"] == 4
    coarse = build_task(Options(**cifar, model="vit", patch_size=8))
    assert coarse.model(0).config.patch_size == 8
    assert coarse.settings["model"]["vit"]["patch_size"] == 8


def test_images_are_augmented_unless_they_are_not_to_be_and_the_results_say_so(cifar):
    for augment in (True, False):
        task = build_task(Options(**cifar, augment=augment))
        train, scored = task.sets("worse_label", 0, is_tuning=False)
        assert (train.augment, scored.augment) == (augment, False)
        assert ("augment" in task.settings) == (not augment)


def test_a_part_of_the_images_keeps_the_labels_that_people_gave(cifar):
    task = build_task(Options(**{**cifar, "train_fraction": [1.0, 0.5]}))
    assert list(task.levels) == ["worse_label", "worse_label at 0.5"]
    everything, _ = task.sets("worse_label", 3, is_tuning=False)
    part, _ = task.sets("worse_label at 0.5", 3, is_tuning=False)
    assert len(part) == 20
    assert [part[i]["labels"] for i in range(20)] == [everything[i]["labels"] for i in part.indices]


def test_the_examples_whose_sharpness_is_measured_are_not_augmented(cifar):
    task = build_task(Options(**cifar))
    trained, _ = task.sets("worse_label", 0, is_tuning=False)
    measured = task.plain_examples("worse_label", 0)
    assert trained.augment and not measured.augment
    assert trained.data.labels.tolist() == measured.data.labels.tolist()


def test_other_labels_behind_the_same_options_are_other_settings(cifar, tmp_path):
    datasets = pytest.importorskip("datasets")
    settings = build_task(Options(**cifar)).settings
    rows = datasets.Dataset.from_parquet(cifar["labels_file"]).to_dict()
    rows["worse_label"][0] = (rows["worse_label"][0] + 1) % 3
    other = tmp_path / "other.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(other)
    changed = build_task(Options(**{**cifar, "labels_file": str(other)})).settings
    assert {k for k in settings if settings[k] != changed[k]} == {"labels_file"}

    fewer = build_task(Options(**{**cifar, "max_eval_samples": 59})).settings
    assert fewer["labels"] != settings["labels"]
    assert "bf16" not in settings and "device" not in settings
    assert build_task(Options(**cifar, bf16=True)).settings["bf16"] is True


def test_labels_that_are_not_those_of_the_images_are_refused(cifar):
    cifar["labels_file"] = cifar["labels_file"].replace("human", "disordered")
    with pytest.raises(InputError, match="the rows are in another order"):
        build_task(Options(**cifar))
    cifar["labels_file"] = cifar["train_file"][0].replace("train", "no")
    with pytest.raises(InputError, match="there is no such file"):
        build_task(Options(**cifar))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_column": None}, "go together"),
        ({"label_column": ["worst"]}, "no column 'worst'"),
        ({"depth": 12}, "--depth=12 is not allowed"),
        ({"model": "vit", "width": 2}, "--width has no effect without --model wrn"),
        ({"patch_size": 8}, "--patch_size has no effect without --model vit"),
    ],
)
def test_wrong_options_of_cifar_are_refused(cifar, changes, said):
    with pytest.raises((InputError, ValueError), match=said):
        build_task(Options(**{**cifar, **changes}))

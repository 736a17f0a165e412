"""CIFAR-10 and texts in the comparison: files, parts of them, labels, and models."""

from __future__ import annotations

import shutil
from pathlib import Path

import compare_methods
import datasets
import numpy as np
import pytest
from common.cli import InputError
from compare.arguments import Options
from compare.recipes import Recipe
from compare.results import RunSpec
from compare.runs import build_trainer, train_once
from compare.tasks import build_task
from comparison import RECIPES, cells, write_recipes
from train_text_classification import train_tokenizer
from transformers import BertConfig, BertModel, set_seed

COLUMNS = {"trec6": ("sentence",), "cola": ("sentence",), "rte": ("sentence1", "sentence2")}
WORDS = ("red", "green", "blue", "sun", "moon", "star")
SAM = Recipe("sam", "d", options={"sam_rho": 0.1})


def task_of(options: dict, **changes):
    return build_task(Options(**{**options, **changes}))


# ---------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar(tmp_path):
    """Three small parquet files in the layout of CIFAR-10 and CIFAR-10N, as options."""
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
    for name, clean in (("human", labels), ("disordered", labels[::-1].copy())):
        human = {"clean_label": clean, "worse_label": worse}
        datasets.Dataset.from_dict(human).to_parquet(tmp_path / f"{name}.parquet")
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


def test_cifar_trains_a_wide_resnet_on_human_labels_and_augmented_images(cifar):
    options = Options(**cifar)
    task = build_task(options)
    train, scored = task.sets("worse_label", 0, is_tuning=False)
    assert 0 < (train.labels != task.right_labels).sum() < 20
    record = train_once(SAM, task, RunSpec("sam", "worse_label", 0), options)
    assert record["passes"] == 2.0 and task.model(0, "0").config.model_type == "wide_resnet"
    part, held_out = task.sets("worse_label", 100, is_tuning=True)
    assert len(part) + len(held_out) == 40
    images = [image.tobytes() for image in task.train["image"]]
    numbers = [images.index(row["image"].tobytes()) for row in part.examples.images]
    assert part.labels.tolist() == train.labels[numbers].tolist()

    def is_augmented(examples):
        set_seed(0)
        first = examples[0]["pixel_values"]
        return any((examples[0]["pixel_values"] != first).any() for _ in range(5))

    measured = task.plain_examples("worse_label", 0)
    assert [is_augmented(x) for x in (train, scored, measured)] == [True, False, False]
    assert train.labels.tolist() == measured.labels.tolist()
    plain = task_of(cifar, augment=False)
    assert not is_augmented(plain.sets("worse_label", 0, is_tuning=False)[0])
    assert plain.settings["augment"] is False and "augment" not in task.settings


def test_human_labels_are_levels_of_their_own_and_in_a_part_of_the_data(cifar):
    both = task_of(cifar, label_noise=[0.2], train_fraction=[1.0, 0.5])
    assert list(both.levels) == ["0.2", "worse_label", "0.2 at 0.5", "worse_label at 0.5"]
    assert list(task_of(cifar, tune=True).levels) == ["worse_label"]
    everything, _ = both.sets("worse_label", 3, is_tuning=False)
    part, _ = both.sets("worse_label at 0.5", 3, is_tuning=False)
    assert len(part) == 20
    assert part.labels.tolist() == everything.labels[part.indices].tolist()


def test_a_small_vit_replaces_the_wide_resnet(cifar):
    task = task_of(cifar, model="vit", patch_size=8)
    config = task.model(0, "0").config
    assert (config.model_type, config.patch_size, config.hidden_size) == ("vit", 8, 128)
    assert task.training["learning_rate"] == 1e-3 and "optim" not in task.training
    assert task.settings["model"]["vit"]["patch_size"] == 8


def test_other_labels_with_the_same_options_are_other_settings(cifar, tmp_path):
    settings = task_of(cifar).settings
    rows = datasets.Dataset.from_parquet(cifar["labels_file"]).to_dict()
    rows["worse_label"][0] = (rows["worse_label"][0] + 1) % 3
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "other.parquet")
    changed = task_of(cifar, labels_file=str(tmp_path / "other.parquet")).settings
    assert {k for k in settings if settings[k] != changed[k]} == {"labels_file"}
    fewer = task_of(cifar, max_eval_samples=59, bf16=True).settings
    assert fewer["labels"] != settings["labels"] and fewer["bf16"] is True
    assert "bf16" not in settings and "device" not in settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_column": None}, "need each other"),
        ({"label_column": ["worst"]}, "no column 'worst'"),
        ({"depth": 12}, "--depth must be 10, 16, 22, .* got 12"),
        ({"model": "vit", "width": 2}, "--width has no effect with --model vit"),
        ({"patch_size": 8}, "--patch_size has no effect without --model vit"),
        ({"labels_file": "disordered"}, "another order of rows"),
        ({"labels_file": "no"}, "--labels_file .* cannot be loaded: Unable to find"),
    ],
)
def test_wrong_options_of_cifar_are_refused(cifar, changes, said):
    if "labels_file" in changes:
        file = cifar["labels_file"].replace("human", changes["labels_file"])
        changes = {"labels_file": file}
    with pytest.raises((InputError, ValueError), match=said):
        task_of(cifar, **changes)


# ------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(iter([" ".join(WORDS)]), 256)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), intermediate_size=16, pad_token_id=0, **sizes)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path, encoder):
    """Makes the options of a task, with its parquet files."""

    def make(task: str = "trec6", **options) -> dict:
        random = np.random.default_rng(0)
        classes = 3 if task == "trec6" else 2
        for name, count in (("train", 120), ("test", 30)):
            rows = {
                c: [" ".join(random.choice(WORDS, 4)) for _ in range(count)] for c in COLUMNS[task]
            }
            rows |= {"label": np.arange(count) % classes, "idx": np.arange(count)}
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
        return {
            "task": task,
            "train_file": [str(tmp_path / "train.parquet")],
            "validation_file": [str(tmp_path / "test.parquet")],
            "model_name_or_path": encoder,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "use_cpu": True,
            **options,
        }

    return make


def test_the_seed_draws_a_stratified_part_and_of_it_the_exact_share_of_wrong_labels(texts):
    task = task_of(texts(train_fraction=[1.0, 0.25], label_noise=[0.0, 0.2]))
    assert list(task.levels) == ["0", "0.2", "0 at 0.25", "0.2 at 0.25"]
    drawn = {}
    for seed in (0, 1):
        part, scored = task.sets("0.2 at 0.25", seed, is_tuning=False)
        labels = np.array([part[i]["labels"] for i in range(len(part))])
        right = task.right_labels[part.indices]
        assert np.bincount(right).tolist() == [10, 10, 10]
        assert (labels != right).sum() == round(0.2 * 30) and len(scored) == 30
        drawn[seed] = part.indices.tolist()
    assert drawn[0] != drawn[1]
    same, _ = task.sets("0 at 0.25", 0, is_tuning=False)
    assert same.indices.tolist() == drawn[0]  # whatever the labels


def test_every_recipe_has_the_same_head_texts_and_order(texts, tmp_path):
    options = Options(**texts())
    task = build_task(options)
    seen = []
    for recipe in (Recipe("plain", "d", trainer="plain"), SAM):
        spec = RunSpec(recipe.name, "0.2", 1)
        trainer = build_trainer(recipe, task, spec, options, str(tmp_path))
        head = trainer.model.classifier.weight.tolist()
        seen.append((head, [b["input_ids"].tolist() for b in trainer.get_train_dataloader()]))
    assert seen[0] == seen[1]
    first, second = (task.model(seed, "0").classifier.weight.tolist() for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize("name", COLUMNS)
def test_a_run_is_scored_by_the_metric_of_its_task(name, texts):
    options = Options(**texts(name, max_train_samples=64, max_eval_samples=20, max_length=10))
    task = build_task(options)
    record = train_once(SAM, task, RunSpec("sam", "0.2", 0), options)
    assert record["passes"] == 2.0 and record["updates"] == 8
    assert ("matthews_correlation" in record) == (name == "cola")
    assert task.metric == ("matthews_correlation" if name == "cola" else "accuracy")
    assert record["accuracy"] * 20 == pytest.approx(round(record["accuracy"] * 20))
    assert "corrupted_accuracy" not in record
    assert task.settings["training_texts"] == 64 and task.settings["test_texts"] == 20
    if name == "rte":  # both texts reach the model, and are cut
        row = task.sets("0", 0, is_tuning=False)[0][0]
        assert len(row["input_ids"]) == 10


def test_rho_is_tuned_on_a_part_of_the_training_texts(texts):
    task = task_of(texts(tune=True, train_fraction=[0.5]))
    (level,) = task.levels
    assert level == "0.2 at 0.5"
    train, scored = task.sets(level, 100, is_tuning=True)
    assert (len(train), len(scored)) == (48, 24)
    encoded = [task.processor(text)["input_ids"] for text in task.train["text"]]
    assert all(row["input_ids"] in encoded for row in scored)


def test_pretrained_weights_are_identified_by_their_values(texts, encoder, tmp_path):
    known = task_of(texts()).settings["model"]["pretrained"]
    moved = tmp_path / Path(encoder).parent.name / Path(encoder).name
    shutil.copytree(encoder, moved)
    again = task_of(texts(model_name_or_path=str(moved))).settings
    assert again["model"]["pretrained"] == known
    set_seed(1)
    model = BertModel.from_pretrained(encoder)
    model.pooler.dense.weight.data.add_(1e-3)
    model.save_pretrained(moved)
    other = task_of(texts(model_name_or_path=str(moved))).settings
    assert other["model"]["pretrained"]["sha256"] != known["sha256"]


def test_the_table_of_cola_shows_matthews_correlations(texts, tmp_path, capsys):
    recipes = {name: RECIPES[name] for name in ("plain", "sam")}
    given = texts("cola", train_fraction=[0.5], label_noise=[0.2], timing_rounds=0, seeds=[0, 1])
    arguments = [*write_recipes(tmp_path, recipes), "--output_dir", str(tmp_path / "out")]
    for key, value in given.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    content = compare_methods.main(arguments)
    out = capsys.readouterr().out
    assert "Matthews correlation, 50 % of the data, 20 % wrong labels" in out
    assert "accuracy, " not in out
    mean = np.mean([r["matthews_correlation"] for r in content["runs"] if r["recipe"] == "sam"])
    (line,) = cells(next(line for line in out.splitlines() if line.startswith("| sam ")))
    assert line[2].startswith(f"{mean:.3f}")
    assert "costs" not in content and line[7] == "-"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_name_or_path": None}, "--task trec6 needs --model_name_or_path"),
        ({"validation_file": None}, "--task trec6 needs --validation_file"),
        ({"model_name_or_path": "/no/such"}, "--model_name_or_path: .* '/no/such'"),
        ({"max_length": 4}, "--max_length must be 8 or more, got 4"),
        ({"max_length": 257}, "--max_length 257 is more than the model's 256 tokens"),
        ({"train_fraction": [1.5]}, "--train_fraction must be from 0 to 1, got .1.5"),
        ({"train_fraction": [0.05]}, "--per_device_train_batch_size 8 is more than .* 0.05 of"),
        ({"train_fraction": [1.0, 0.5], "tune": True}, "--tune takes one --train_fraction"),
        ({"sharpness": True, "tune": True}, "--sharpness has no effect with --tune"),
        ({"depth": 16}, "--depth has no effect without --task cifar10"),
    ],
)
def test_wrong_options_of_texts_are_refused(changes, said, texts):
    with pytest.raises((InputError, ValueError), match=said):
        task_of(texts(), **changes)


def test_hidden_labels_are_refused(texts, tmp_path):
    given = texts("cola")
    rows = {"sentence": ["red"] * 4, "label": [-1] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"have classes of their own: \[-1\]"):
        task_of(given)

"""Texts in the comparison: files, parts of them, wrong labels, and the pretrained encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

pytest.importorskip("sam_hf")

import compare_methods
from common.script_utils import InputError
from compare.arguments import Options
from compare.recipes import Recipe
from compare.results import RunSpec
from compare.runs import build_trainer, train_once
from compare.tasks import build_task
from comparison import write_recipes
from train_text_classification import train_tokenizer
from transformers import BertConfig, BertModel, set_seed

COLUMNS = {"trec6": ("sentence",), "cola": ("sentence",), "rte": ("sentence1", "sentence2")}
WORDS = ("red", "green", "blue", "sun", "moon", "star")
SAM = Recipe("sam", "d", options={"sam_rho": 0.1})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(iter([" ".join(WORDS)]), 270, 256)
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


def test_each_fraction_is_crossed_with_each_share_of_wrong_labels(texts):
    task = build_task(Options(**texts(train_fraction=[1.0, 0.5], label_noise=[0.0, 0.2])))
    assert list(task.levels) == ["0", "0.2", "0 at 0.5", "0.2 at 0.5"]


def test_the_seed_draws_a_stratified_part_and_of_it_the_exact_share_of_wrong_labels(texts):
    task = build_task(Options(**texts(train_fraction=[0.25], label_noise=[0.0, 0.2])))
    right = np.array(task.data.train["labels"])
    drawn = {}
    for seed in (0, 1):
        part, scored = task.sets("0.2 at 0.25", seed, is_tuning=False)
        labels = np.array([part[i]["labels"] for i in range(len(part))])
        assert np.bincount(right[part.indices]).tolist() == [10, 10, 10]
        assert (labels != right[part.indices]).sum() == round(0.2 * 30)
        assert len(scored) == 30
        drawn[seed] = part.indices
    assert drawn[0] != drawn[1]
    same, _ = task.sets("0 at 0.25", 0, is_tuning=False)
    assert same.indices == drawn[0]  # whatever the labels


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
    assert task.model(1).classifier.weight.tolist() != task.model(2).classifier.weight.tolist()


@pytest.mark.parametrize("name", COLUMNS)
def test_a_run_is_scored_by_the_metric_of_its_task(name, texts):
    options = Options(**texts(name, max_train_samples=64, max_eval_samples=20))
    task = build_task(options)
    record = train_once(SAM, task, RunSpec("sam", "0.2", 0), options)
    assert record["passes"] == 2.0 and record["updates"] == 8
    assert ("matthews_correlation" in record) == (name == "cola")
    assert task.metric == ("matthews_correlation" if name == "cola" else "accuracy")
    assert record["accuracy"] * 20 == pytest.approx(round(record["accuracy"] * 20))
    assert "corrupted_accuracy" not in record
    assert task.settings["training_texts"] == 64 and task.settings["test_texts"] == 20


def test_both_texts_of_a_pair_reach_the_model_and_are_cut(texts):
    task = build_task(Options(**texts("rte", max_length=12)))
    train, _ = task.sets("0", 0, is_tuning=False)
    row = train[0]
    assert len(row["input_ids"]) == 12
    assert set(row["token_type_ids"]) == {0, 1}


def test_rho_is_tuned_on_a_part_of_the_training_texts(texts):
    task = build_task(Options(**texts(tune=True, train_fraction=[0.5])))
    (level,) = task.levels
    assert level == "0.2 at 0.5"
    train, scored = task.sets(level, 100, is_tuning=True)
    assert (len(train), len(scored)) == (48, 24)
    everything = task.data.train["text"][:]
    encoded = [task.processing_class(text)["input_ids"] for text in everything]
    assert all(row["input_ids"] in encoded for row in (scored[i] for i in range(24)))


def test_pretrained_weights_are_told_apart_by_what_they_are(texts, encoder, tmp_path):
    known = build_task(Options(**texts())).settings["model"]["pretrained"]
    moved = tmp_path / Path(encoder).parent.name / Path(encoder).name
    shutil.copytree(encoder, moved)
    again = build_task(Options(**texts(model_name_or_path=str(moved)))).settings
    assert again["model"]["pretrained"] == known
    set_seed(1)
    model = BertModel.from_pretrained(encoder)
    model.pooler.dense.weight.data.add_(1e-3)
    model.save_pretrained(moved)
    other = build_task(Options(**texts(model_name_or_path=str(moved)))).settings
    assert other["model"]["pretrained"]["sha256"] != known["sha256"]


def test_the_table_of_cola_shows_matthews_correlations(texts, tmp_path, capsys):
    recipes = {
        "plain": {"description": "p", "group": "plain", "trainer": "plain"},
        "sam": {"description": "s", "options": {"sam_rho": 0.1}},
    }
    given = texts("cola", train_fraction=[0.5], label_noise=[0.2], timing_rounds=0, seeds=[0, 1])
    arguments = [*write_recipes(tmp_path, recipes), "--output_dir", str(tmp_path / "out")]
    for key, value in given.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    content = compare_methods.main(arguments)
    out = capsys.readouterr().out
    assert (
        "Matthews correlation, 50 % of the data, 20 % wrong labels" in out
        and "accuracy, " not in out
    )
    mean = np.mean([r["matthews_correlation"] for r in content["runs"] if r["recipe"] == "sam"])
    line = next(line for line in out.splitlines() if line.startswith("| sam "))
    assert line.split("|")[3].strip().startswith(f"{mean:.3f}")
    assert "costs" not in content and line.split("|")[8].strip() == "-"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_name_or_path": None}, "--task trec6 needs --model_name_or_path"),
        ({"validation_file": None}, "--task trec6 needs --validation_file"),
        ({"model_name_or_path": "/no/such"}, "--model_name_or_path '/no/such'"),
        ({"max_length": 4}, "--max_length must be 8 or more, got 4"),
        ({"max_length": 257}, "--max_length 257 is more than the 256 tokens"),
        ({"train_fraction": [1.5]}, "--train_fraction must be above 0 and at most 1, got 1.5"),
        ({"train_fraction": [0.05]}, "--per_device_train_batch_size 8 is more than 0.05 of"),
        ({"train_fraction": [1.0, 0.5], "tune": True}, "--tune takes one of them"),
        ({"sharpness": True, "tune": True}, "--sharpness does not go with --tune"),
        ({"depth": 16}, "--depth has no effect without --task cifar10"),
    ],
)
def test_wrong_options_of_texts_are_refused(changes, said, texts):
    with pytest.raises((InputError, ValueError), match=said):
        build_task(Options(**texts(**changes)))


def test_hidden_labels_are_refused(texts, tmp_path):
    given = texts("cola")
    rows = {"sentence": ["red"] * 4, "label": [-1] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"classes that the training has not: \[-1\]"):
        build_task(Options(**given))

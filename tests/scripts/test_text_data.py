"""Sources, columns, kinds of labels and metrics of the text classification script."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from common import docstrings
from common.cli import InputError
from common.docstrings import SECTIONS, read_docstrings
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from train_text_classification import TASKS, DataArguments, load_data, scores
from transformers import EvalPrediction


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def few_modules(monkeypatch):
    """One module of each part of the library: all of them take seconds to parse."""
    for section, modules in SECTIONS.items():
        monkeypatch.setitem(SECTIONS, section, modules.split()[0])


def write(file: Path, rows: list[dict]) -> list[str]:
    """The rows as a file of the kind that its name says; the value of --train_file."""
    if file.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(str(file))
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return [str(file)]


def load(file: list[str], **options):
    return load_data(DataArguments(train_file=file, validation_file=file, **options))


ROWS = [
    {"text": "a cat", "label": "pet"},
    {"text": "a lion", "label": "wild"},
    {"text": "a dog", "label": "pet"},
]
PAIRS = [
    {"a": "it rains", "b": "it is wet", "id": 0, "label": 1},
    {"a": "it rains", "b": "it is dry", "id": 1, "label": 0},
]


def test_the_docstrings_are_real_text_in_classes_of_like_size():
    name, train, test, class_names = load_data(DataArguments())
    assert name == f"docstrings of Python {sys.version.split()[0]}"
    assert len(train) + len(test) > 3500
    assert class_names == list(SECTIONS)
    counts = np.bincount(train["labels"])
    assert len(counts) == len(SECTIONS)
    assert counts.max() < 3 * counts.min()
    example = "Shallow copy operation on arbitrary Python objects."
    found = [row["labels"] for row in [*train, *test] if row["text"].startswith(example)]
    assert [class_names[label] for label in found] == ["data types"]


def test_the_docstrings_of_a_class_are_on_one_side_and_no_wording_is_on_both(few_modules):
    owner = {d.text: d.definition for d in read_docstrings()}
    _, *sets, _ = load_data(DataArguments())
    train, test = (data["text"][:] for data in sets)
    assert not {owner[text] for text in train} & {owner[text] for text in test}
    words = [{tuple(t.lower().replace(".", "").split()) for t in side} for side in (train, test)]
    assert not words[0] & words[1]
    assert 0.12 < len(test) / (len(train) + len(test)) < 0.28


def test_the_docstrings_are_the_same_every_time_and_no_module_is_imported(few_modules):
    before = set(sys.modules)
    _, train, test, _ = load_data(DataArguments())
    np.random.seed(5)
    _, train_again, test_again, _ = load_data(DataArguments())
    assert train_again[:] == train[:] and test_again[:] == test[:]
    assert not (set(sys.modules) - before) & {"ftplib", "bdb", "asyncio.trsock"}


def test_each_wording_appears_once_with_the_definition_at_the_top_of_its_module(
    tmp_path, few_modules, monkeypatch
):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    for number, module in enumerate(SECTIONS.values()):
        word = "abcdefghi"[number] * 3
        (tmp_path / f"{module}.py").write_text(
            f"class Top:\n  'Short text.'\n  if True:\n    def inner(self):\n"
            f"      'The text of module {word}.'\n"
            f"def other():\n  'the TEXT of module\\n {word}'\n"
        )
    found = read_docstrings()
    assert [d.section for d in found] == list(range(len(SECTIONS)))
    assert found[0].text == "The text of module aaa."
    assert found[0].definition == f"{SECTIONS['data types']}.py:Top"


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"no docstrings in .*give --train_file"):
        load_data(DataArguments())


def test_the_noise_changes_training_labels_alone(few_modules):
    _, train, test, _ = load_data(DataArguments())
    _, noisy, noisy_test, _ = load_data(DataArguments(label_noise=0.4))
    changed = np.array(noisy["labels"]) != np.array(train["labels"])
    assert changed.sum() == round(0.4 * len(changed))
    assert noisy_test["labels"][:] == test["labels"][:]
    assert noisy["text"][:] == train["text"][:]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_string_labels_are_numbered_and_other_columns_left_out(tmp_path, kind):
    rows = [{"id": i, **row} for i, row in enumerate(ROWS)]
    _, train, _, class_names = load(write(tmp_path / f"rows.{kind}", rows))
    assert class_names == ["pet", "wild"]
    assert train[:] == {"text": ["a cat", "a lion", "a dog"], "labels": [0, 1, 0]}


def test_pairs_come_from_the_columns_that_are_named(tmp_path):
    _, train, _, _ = load(write(tmp_path / "a.csv", PAIRS), text_column="b", text_pair_column="a")
    assert train[0] == {"text": "it is wet", "text_pair": "it rains", "labels": 1}


def test_floats_are_regression_and_integers_are_classes(tmp_path):
    rows = [{"text": "x", "label": 0.5}, {"text": "y", "label": 2.0}]
    _, train, _, names = load(write(tmp_path / "a.csv", rows))
    assert names == ["label"]
    assert train["labels"][:] == [0.5, 2.0]
    stars = write(tmp_path / "b.csv", [{"text": "x", "label": 5}, {"text": "y", "label": 1}])
    _, train, _, names = load(stars)
    assert (names, train["labels"][:]) == (["1", "5"], [1, 0])


@pytest.mark.parametrize("task", TASKS)
def test_a_glue_task_sets_the_columns_of_local_files(tmp_path, task):
    columns, metrics = TASKS[task]
    label = 2.5 if "pearson" in metrics else 1
    rows = [{**{c: f"{c} {i}" for c in columns}, "label": i * label} for i in range(2)]
    name, train, _, class_names = load(write(tmp_path / "rows.parquet", rows), task_name=task)
    assert (name, len(class_names)) == (f"GLUE {task}", 1 if "pearson" in metrics else 2)
    texts = {n: f"{c} 1" for n, c in zip(("text", "text_pair"), columns, strict=False)}
    assert train[1] == {**texts, "labels": label}


def test_a_glue_task_without_files_comes_from_the_hub():
    args = DataArguments(task_name="mnli")
    source = (args.hub_dataset, args.dataset_config_name, args.eval_split)
    assert source == ("nyu-mll/glue", "mnli", "validation_matched")
    assert (args.text_column, args.text_pair_column) == ("premise", "hypothesis")
    assert DataArguments(task_name="rte").eval_split == "validation"


def test_evaluation_data_is_held_out_with_equal_shares_where_there_is_none(tmp_path):
    rows = [{"text": f"text {i}", "label": "abbb"[i % 4]} for i in range(160)]
    file = write(tmp_path / "rows.csv", rows)
    _, train, test, _ = load_data(DataArguments(train_file=file, eval_fraction=0.25))
    assert np.bincount(train["labels"]).tolist() == [30, 90]
    assert np.bincount(test["labels"]).tolist() == [10, 30]
    some = load_data(DataArguments(train_file=file, max_train_samples=5, max_eval_samples=2))
    assert [len(data) for data in some[1:3]] == [5, 2]


NUMBERS = [{"text": "x", "label": 0.5}, {"text": "y", "label": 1.5}]


@pytest.mark.parametrize(
    ("train", "evaluation", "options", "message"),
    [
        (ROWS, ROWS, {"label_column": "lable"}, "no column 'lable' (did you mean label?)"),
        (ROWS, ROWS, {"text_column": "txt"}, "no column 'txt' (did you mean text?)"),
        (PAIRS, PAIRS, {"text_column": "id"}, "--text_column 'id' holds int, not text"),
        (
            PAIRS,
            PAIRS,
            {"text_column": "a", "text_pair_column": "c"},
            "--text_pair_column: there is no column 'c'",
        ),
        (
            ROWS,
            ROWS,
            {"text_pair_column": "text"},
            "--text_pair_column 'text' holds the first texts too",
        ),
        (ROWS, [{"text": "x", "label": "tame"}], {}, "have classes of their own: ['tame']"),
        (PAIRS, [{**PAIRS[0], "label": -1}], {"text_column": "a"}, "of their own: [-1]"),
        (ROWS, [], {}, "cannot be loaded: it holds no examples"),
        (ROWS, [ROWS[0], {"text": None, "label": "pet"}], {}, "holds NoneType, not text"),
        (ROWS[:1], ROWS, {}, "has only the class ['pet']: two are needed"),
        (NUMBERS, ROWS, {}, "not integers or strings"),
        (
            [{"text": "x", "label": -1.0}] * 2,  # those of the hidden test of STS-B
            None,
            {},
            "--label_column 'label' holds missing, infinite or all equal numbers",
        ),
        ([NUMBERS[0], {"text": "y", "label": None}], None, {}, "missing, infinite or all equal"),
        ([{"text": "x", "label": math.inf}, *NUMBERS], None, {}, "missing, infinite or all equal"),
        (NUMBERS, None, {"label_noise": 0.1}, "--label_noise has no effect on a regression"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(
    tmp_path, train, evaluation, options, message
):
    files = {"train_file": write(tmp_path / "train.jsonl", train)}
    if evaluation:
        files["validation_file"] = write(tmp_path / "eval.jsonl", evaluation)
    elif evaluation == []:
        (tmp_path / "eval.jsonl").write_text("")
        files["validation_file"] = [str(tmp_path / "eval.jsonl")]
    with pytest.raises(InputError) as error:
        load_data(DataArguments(**files, **options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_unlabelled_test_set_of_a_glue_task_is_refused(tmp_path):
    label = datasets.ClassLabel(names=["entailment", "not_entailment"])
    text = datasets.Value("string")
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": label})
    files = {}
    for name, labels in (("train", [0, 1]), ("test", [-1, -1])):
        columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": labels}
        files[name] = [str(tmp_path / f"{name}.parquet")]
        datasets.Dataset.from_dict(columns, features=features).to_parquet(files[name][0])
    args = {"train_file": files["train"], "validation_file": files["test"], "task_name": "rte"}
    with pytest.raises(InputError, match=r"2 of 2 examples have no label .*-1"):
        load_data(DataArguments(**args))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_name": "rte", "text_column": "x"}, "--text_column has no effect with --task_name"),
        ({"task_name": "rte", "dataset_name": "x"}, "--dataset_name has no effect with --task"),
        ({"text_column": "x"}, "--text_column has no effect on the built-in examples"),
        ({"text_pair_column": "x"}, "--text_pair_column has no effect on the built-in examples"),
        ({"max_length": 4}, "--max_length must be 8 or more, got 4"),
        ({"label_noise": 2}, "--label_noise must be from 0 to 1"),
    ],
)
def test_data_options_that_are_wrong_or_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


def test_files_that_are_missing_or_of_different_kinds_are_refused(tmp_path):
    csv = write(tmp_path / "a.csv", ROWS)
    for files, message in (
        (["nowhere.csv"], "--train_file .* cannot be loaded: Unable to find .*nowhere.csv"),
        ([str(tmp_path)], "the names must end in one of .csv, .json, .jsonl"),
        ([*csv, *write(tmp_path / "a.jsonl", ROWS)], "the names must end in one of"),
    ):
        with pytest.raises(InputError, match=message):
            load_data(DataArguments(train_file=files))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(InputError, match="the names must end in one of"):
        load([str(tmp_path / "a.md")])


def test_the_metrics_are_those_of_scikit_learn_and_scipy():
    random = np.random.default_rng(0)
    for classes in (2, 3):
        logits, true = random.normal(size=(50, classes)), random.integers(0, classes, 50)
        predicted = logits.argmax(-1)
        average = "binary" if classes == 2 else "macro"
        for predictions in (logits, (logits, random.normal(size=(50, 4)))):  # hidden states too
            assert scores(EvalPrediction(predictions, true)) == {
                "accuracy": (predicted == true).mean(),
                "f1": f1_score(true, predicted, average=average),
                "matthews_correlation": matthews_corrcoef(true, predicted),
            }
    predicted, true = random.normal(size=(2, 30))
    assert scores(EvalPrediction(predicted[:, None], true)) == {
        "pearson": pytest.approx(pearsonr(predicted, true)[0]),
        "spearman": pytest.approx(spearmanr(predicted, true)[0]),
    }

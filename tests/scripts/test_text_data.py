"""Sources, columns, kinds of labels and metrics of the text classification script."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
from common import stdlib_docstrings
from common.script_utils import InputError
from common.stdlib_docstrings import SECTIONS, read_docstrings
from common.text_arguments import DataArguments
from common.text_data import MULTI, REGRESSION, SINGLE, load_text_data
from common.training_utils import load_metric
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
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
    return load_text_data(DataArguments(train_file=file, validation_file=file, **options))


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
    docstrings = load_text_data(DataArguments())
    texts, labels = docstrings.train["text"][:], np.array(docstrings.train["labels"])
    assert len(texts) + len(docstrings.test) > 3500
    assert docstrings.class_names == list(SECTIONS)
    counts = np.bincount(labels)
    assert len(counts) == len(SECTIONS)
    assert counts.max() < 3 * counts.min()
    example = "Shallow copy operation on arbitrary Python objects."
    rows = [*docstrings.train, *docstrings.test]
    found = [row["labels"] for row in rows if row["text"].startswith(example)]
    assert [docstrings.class_names[label] for label in found] == ["data types"]


def test_the_docstrings_of_a_class_are_on_one_side_and_no_wording_is_on_both(few_modules):
    docstrings = load_text_data(DataArguments())
    owner = {d.text: d.definition for d in read_docstrings()}
    train, test = docstrings.train["text"][:], docstrings.test["text"][:]
    assert not {owner[text] for text in train} & {owner[text] for text in test}
    words = [{tuple(t.lower().replace(".", "").split()) for t in side} for side in (train, test)]
    assert not words[0] & words[1]
    assert 0.12 < len(test) / (len(train) + len(test)) < 0.28


def test_the_docstrings_are_the_same_every_time_and_no_module_is_imported(few_modules):
    before = set(sys.modules)
    docstrings = load_text_data(DataArguments())
    np.random.seed(5)
    again = load_text_data(DataArguments())
    assert again.train[:] == docstrings.train[:] and again.test[:] == docstrings.test[:]
    assert not (set(sys.modules) - before) & {"ftplib", "bdb", "asyncio.trsock"}


def test_each_wording_stands_once_with_the_definition_at_the_top_of_its_module(
    tmp_path, few_modules, monkeypatch
):
    monkeypatch.setattr(stdlib_docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
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
    monkeypatch.setattr(stdlib_docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="this Python lacks the sources of its library"):
        load_text_data(DataArguments())


def test_the_noise_changes_training_labels_alone(few_modules):
    docstrings = load_text_data(DataArguments())
    noisy = load_text_data(DataArguments(label_noise=0.4))
    changed = np.array(noisy.train["labels"]) != np.array(docstrings.train["labels"])
    assert changed.sum() == noisy.labels_changed == round(0.4 * len(changed))
    assert noisy.test["labels"][:] == docstrings.test["labels"][:]
    assert noisy.train["text"][:] == docstrings.train["text"][:]
    assert "40% label noise" in noisy.describe()


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_the_only_column_of_text_is_found_and_string_labels_are_numbered(tmp_path, kind):
    rows = [{"id": i, **row} for i, row in enumerate(ROWS)]
    data = load(write(tmp_path / f"rows.{kind}", rows))
    assert data.problem_type == SINGLE
    assert data.class_names == ["pet", "wild"]
    assert data.train[:] == {"text": ["a cat", "a lion", "a dog"], "labels": [0, 1, 0]}


def test_pairs_are_taken_from_the_columns_that_are_named(tmp_path):
    file = write(tmp_path / "pairs.csv", PAIRS)
    with pytest.raises(InputError, match=r"--text_column must be .* several .* text: a, b"):
        load(file)
    data = load(file, text_column="b", text_pair_column="a")
    assert data.train[0] == {"text": "it is wet", "text_pair": "it rains", "labels": 1}


def test_lists_of_classes_are_several_labels_to_a_text(tmp_path):
    rows = [{"text": t, "label": c} for t, c in zip("xyz", (["b", "a"], [], ["c"]), strict=True)]
    data = load(write(tmp_path / "rows.jsonl", rows))
    assert (data.problem_type, data.class_names) == (MULTI, ["a", "b", "c"])
    assert data.train["labels"][:] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.metrics[0] == "f1"


def test_floats_are_regression_and_other_numbers_if_asked(tmp_path):
    data = load(write(tmp_path / "a.csv", [{"text": "x", "label": 0.5}, {"text": "y", "label": 2}]))
    assert (data.problem_type, data.class_names) == (REGRESSION, ["label"])
    assert data.train["labels"][:] == [0.5, 2.0]
    stars = write(tmp_path / "b.csv", [{"text": "x", "label": 5}, {"text": "y", "label": 1}])
    assert load(stars).train["labels"][:] == [1, 0]
    assert load(stars, problem_type=REGRESSION).train["labels"][:] == [5.0, 1.0]


@pytest.mark.parametrize(
    ("task", "columns", "label", "metric"),
    [
        ("cola", ("sentence",), 1, "matthews_correlation"),
        ("mrpc", ("sentence1", "sentence2"), 1, "f1"),
        ("qnli", ("question", "sentence"), 1, "accuracy"),
        ("stsb", ("sentence1", "sentence2"), 2.5, "pearson"),
    ],
)
def test_a_glue_task_sets_columns_and_metric_for_local_files(
    tmp_path, task, columns, label, metric
):
    rows = [{**{c: f"{c} {i}" for c in columns}, "label": i * label} for i in range(2)]
    data = load(write(tmp_path / "rows.parquet", rows), task_name=task)
    assert data.metrics[0] == metric
    names = ("text", "text_pair")[: len(columns)]
    assert data.train[1] == {
        **{n: f"{c} 1" for n, c in zip(names, columns, strict=True)},
        "labels": label,
    }
    assert data.name == f"GLUE {task}"


def test_a_glue_task_without_files_comes_from_the_hub():
    args = DataArguments(task_name="mnli")
    source = (args.hub_dataset, args.dataset_config_name, args.eval_split)
    assert source == ("nyu-mll/glue", "mnli", "validation_matched")
    assert (args.text_column, args.text_pair_column) == ("premise", "hypothesis")
    assert DataArguments(task_name="rte").eval_split == "validation"


def test_evaluation_data_is_set_aside_with_equal_shares_where_there_is_none(tmp_path):
    rows = [{"text": f"text {i}", "label": "abbb"[i % 4]} for i in range(160)]
    file = write(tmp_path / "rows.csv", rows)
    data = load_text_data(DataArguments(train_file=file, eval_fraction=0.25))
    assert np.bincount(data.train["labels"]).tolist() == [30, 90]
    assert np.bincount(data.test["labels"]).tolist() == [10, 30]
    some = load_text_data(DataArguments(train_file=file, max_train_samples=5, max_eval_samples=2))
    assert (len(some.train), len(some.test)) == (5, 2)


@pytest.mark.parametrize(
    ("train", "evaluation", "options", "message"),
    [
        (ROWS, ROWS, {"label_column": "lable"}, "no column 'lable' (did you mean label?)"),
        (ROWS, ROWS, {"text_column": "txt"}, "no column 'txt' (did you mean text?)"),
        (PAIRS, PAIRS, {"text_column": "id"}, "--text_column 'id' holds Value('int64'), not text"),
        (
            PAIRS,
            PAIRS,
            {"text_column": "a", "text_pair_column": "c"},
            "--text_pair_column: the training examples have no column 'c'",
        ),
        ([{"label": 1}, {"label": 0}], ROWS, {}, "have no column of text"),
        (ROWS, [{"text": "x", "label": "tame"}], {}, "that the training has not: ['tame']"),
        (PAIRS, [{**PAIRS[0], "label": -1}], {"text_column": "a"}, "has not: [-1]"),
        (ROWS, [], {}, "cannot be loaded: it holds no examples"),
        (ROWS, [ROWS[0], {"text": None, "label": "pet"}], {}, "1 of the 2 evaluation examples"),
        (ROWS[:1], ROWS, {}, "only the class ['pet']: two are needed"),
        (ROWS, ROWS, {"problem_type": REGRESSION}, "'label' holds Value"),
        (ROWS, ROWS, {"problem_type": MULTI}, "no lists"),
        (
            [{"text": "x", "label": -1.0}] * 2,
            None,
            {"problem_type": REGRESSION},
            "all training examples have the label -1.0",
        ),
        (
            [{"text": "x", "label": 0.5}, {"text": "y", "label": None}],
            None,
            {},
            "1 of the 2 training examples have no label",
        ),
        ([{"text": "x", "label": math.inf}] * 2, None, {}, "2 of the 2 training examples have an"),
        (
            [{"text": "x", "label": 0.5}, {"text": "y", "label": 1.5}],
            None,
            {"label_noise": 0.1},
            "--label_noise needs one label to a text",
        ),
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
        load_text_data(DataArguments(**files, **options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_unlabelled_test_set_of_a_glue_task_is_refused(tmp_path):
    label = datasets.ClassLabel(names=["entailment", "not_entailment"])
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": label,
        }
    )
    files = {}
    for name, labels in (("train", [0, 1]), ("test", [-1, -1])):
        columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": labels}
        files[name] = [str(tmp_path / f"{name}.parquet")]
        datasets.Dataset.from_dict(columns, features=features).to_parquet(files[name][0])
    with pytest.raises(InputError, match=r"2 of the 2 evaluation examples have no label .* -1"):
        load_text_data(
            DataArguments(train_file=files["train"], validation_file=files["test"], task_name="rte")
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_name": "rtx"}, r"'rtx' is not a task of GLUE \(did you mean rte\?\)"),
        ({"task_name": "rte", "text_column": "x"}, "--text_column has no effect with --task_name"),
        ({"task_name": "rte", "dataset_name": "x"}, "--dataset_name has no effect with --task"),
        ({"text_column": "x"}, "--text_column has no effect on the built-in docstrings"),
        ({"problem_type": "ranking"}, "--problem_type 'ranking' is not one of single_label"),
        ({"train_file": ["x"], "text_pair_column": "b"}, "--text_pair_column needs --text_column"),
        (
            {"train_file": ["x"], "text_column": "b", "text_pair_column": "b"},
            "--text_pair_column 'b' is --text_column too",
        ),
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
        (["nowhere.csv"], "--train_file 'nowhere.csv': there is no such file"),
        ([str(tmp_path)], r"--train_file '.*' is a directory: name the files in it"),
        ([*csv, *write(tmp_path / "a.jsonl", ROWS)], "must be of one kind, got csv and json"),
    ):
        with pytest.raises(InputError, match=message):
            load(files)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"the names must end in .csv or .json or .jsonl or"):
        load([str(tmp_path / "a.txt")])


def test_the_metrics_agree_with_scikit_learn_and_scipy():
    random = np.random.default_rng(0)
    predicted, true = random.integers(0, 2, (2, 50))
    scores = load_metric("classification", SINGLE).compute(predictions=predicted, references=true)
    assert scores == {
        "accuracy": (predicted == true).mean(),
        "f1": f1_score(true, predicted),
        "matthews_correlation": matthews_corrcoef(true, predicted),
    }
    true[0] = 2  # a third class
    scores = load_metric("classification", SINGLE).compute(predictions=predicted, references=true)
    assert scores["f1"] == f1_score(true, predicted, average="macro")
    predicted, true = random.integers(0, 2, (2, 20, 3))
    scores = load_metric("classification", MULTI).compute(predictions=predicted, references=true)
    assert scores["f1"] == f1_score(true, predicted, average="micro")
    assert scores["accuracy"] == (predicted == true).all(axis=1).mean()
    predicted, true = random.normal(size=(2, 30))
    metric = load_metric("classification", REGRESSION)
    scores = metric.compute(predictions=predicted, references=true)
    assert scores["pearson"] == pytest.approx(pearsonr(predicted, true)[0])
    assert scores["spearman"] == pytest.approx(spearmanr(predicted, true)[0])
    assert scores["mse"] == pytest.approx(np.square(predicted - true).mean())
    for pair in ((np.ones(30), true), (true, np.ones(30))):
        scores = metric.compute(predictions=pair[0], references=pair[1])
        assert (scores["pearson"], scores["spearman"]) == (0.0, 0.0)

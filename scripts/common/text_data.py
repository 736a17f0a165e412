"""The data of the text classification script: sources, columns, kinds of labels, label noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from common.classification import ClassificationData
from common.labeled_data import (
    SPLIT_SEED,
    draw,
    find_classes,
    hold_out,
    load_sets,
    number_labels,
    read_labels,
    require_column,
)
from common.script_utils import InputError
from common.stdlib_docstrings import SECTIONS, describe_source, read_docstrings
from common.text_arguments import PROBLEM_TYPES, TASKS, DataArguments
from sklearn.model_selection import GroupShuffleSplit

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
METRICS = {SINGLE: ("accuracy",), MULTI: ("f1", "accuracy"), REGRESSION: ("pearson", "spearman")}
TEXTS = ("text", "text_pair")
TRAINING, EVALUATION = "training examples", "evaluation examples"


@dataclass
class TextData(ClassificationData):
    """Both sets have the columns `text`, `labels` and perhaps `text_pair`.

    Labels are class numbers; a vector of 0 and 1, one for each class (multi-label); or a number.
    For regression the only class name is that of the label.
    """

    problem_type: str = SINGLE

    examples = "texts"

    def kind(self) -> str:
        several = ", several to a text" if self.problem_type == MULTI else ""
        return "regression" if self.problem_type == REGRESSION else super().kind() + several

    def divide(self, fraction: float, what: str) -> list[datasets.Dataset]:
        """Stratified if each text has one class."""
        labels = np.array(self.train["labels"]) if self.problem_type == SINGLE else None
        parts = hold_out(len(self.train), fraction, what, labels)
        return [self.train.select(part) for part in parts]


def load_text_data(args: DataArguments) -> TextData:
    """Load both sets and add the label noise to the training set.

    Raises:
        InputError: there is no such source or column, or labels are missing or of a wrong kind.
    """
    data = _docstrings(args) if args.source is None else _from_source(args)
    data.train = data.train.select(draw(len(data.train), args.max_train_samples))
    data.test = data.test.select(draw(len(data.test), args.max_eval_samples))
    if args.label_noise and data.problem_type != SINGLE:
        raise InputError(
            f"--label_noise needs one label to a text, and this is {data.problem_type}"
        )
    if args.label_noise:
        labels = data.noisy(np.array(data.train["labels"]), args).tolist()
        data.train = data.train.remove_columns("labels").add_column("labels", labels)
    return data


def _docstrings(args: DataArguments) -> TextData:
    """The built-in data.

    All docstrings of one class (or function) are on the same side: they repeat each other's
    phrases, and a split of single docstrings would reward knowing them. A split of whole modules
    would leave three or four modules to a class, too few to judge by.
    """
    found = read_docstrings()
    data = datasets.Dataset.from_dict(
        {"text": [d.text for d in found], "labels": [d.section for d in found]}
    )
    fraction = args.eval_fraction or 0.2
    splitter = GroupShuffleSplit(1, test_size=fraction, random_state=SPLIT_SEED)
    try:
        train, test = next(splitter.split(found, groups=[d.definition for d in found]))
    except ValueError as error:  # less than one class or function
        raise InputError(f"--eval_fraction {fraction} cannot be set aside: {error}") from error
    return TextData(describe_source(), data.select(train), data.select(test), list(SECTIONS))


def _from_source(args: DataArguments) -> TextData:
    train, test = load_sets(args)
    column = args.label_column or "label"
    require_column(train, "label_column", column, TRAINING)
    problem_type = args.problem_type or _guess_problem_type(train.features[column])
    text_columns = {args.text_column or _guess_text_column(train, column): "text"}
    if args.text_pair_column is not None:
        text_columns[args.text_pair_column] = "text_pair"

    train, classes = _convert(train, text_columns, column, problem_type, TRAINING)
    if test is not None:
        test, _ = _convert(test, text_columns, column, problem_type, EVALUATION, classes)
    metrics = TASKS[args.task_name].metrics if args.task_name else METRICS[problem_type]
    data = TextData(
        _name(args),
        train,
        test,
        [str(c) for c in classes],
        metrics=metrics,
        problem_type=problem_type,
    )
    if test is None:
        fraction = args.eval_fraction or 0.2
        data.train, data.test = data.divide(fraction, f"--eval_fraction {fraction}")
    return data


def _name(args: DataArguments) -> str:
    if args.task_name is not None:
        return f"GLUE {args.task_name}"
    return args.dataset_name or Path(args.train_file[0]).parent.resolve().name


def _guess_problem_type(feature: Any) -> str:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return MULTI
    is_float = isinstance(feature, datasets.Value) and feature.dtype.startswith("float")
    return REGRESSION if is_float else SINGLE


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "string" in feature.dtype


def _guess_text_column(data: datasets.Dataset, label_column: str) -> str:
    found = [n for n, feature in data.features.items() if n != label_column and _is_text(feature)]
    if len(found) == 1:
        return found[0]
    what = f"several columns of text: {', '.join(found)}" if found else "no column of text"
    raise InputError(f"--text_column must be given: the {TRAINING} have {what}")


def _convert(
    data: datasets.Dataset,
    text_columns: dict[str, str],
    label_column: str,
    problem_type: str,
    which: str,
    classes: list[Any] | None = None,
) -> tuple[datasets.Dataset, list[Any]]:
    """The data with the columns of `TextData`, and the classes, found in it if not given."""
    if len(data) == 0:
        raise InputError(f"there are no {which}")
    for column in text_columns:
        option = f"{text_columns[column]}_column"
        require_column(data, option, column, which)
        if not _is_text(data.features[column]):
            raise InputError(f"--{option} {column!r} holds {data.features[column]}, not text")
        missing = sum(text is None for text in data[column])
        if missing:
            raise InputError(
                f"{missing} of the {len(data)} {which} have no text in --{option} {column!r}"
            )
    require_column(data, "label_column", label_column, which)
    if problem_type == REGRESSION:
        classes, labels = [label_column], _read_numbers(data, label_column, which)
    else:
        flat, sizes = data, None
        if problem_type == MULTI:
            flat, sizes = _flatten(data, label_column)
        found = read_labels(flat, label_column, which)
        classes = classes or find_classes(flat, label_column, found, which)
        labels = number_labels(found, classes, which)
        if sizes is not None:
            chosen, labels = labels, np.zeros((len(data), len(classes)))
            labels[np.repeat(np.arange(len(data)), sizes), chosen] = 1
    texts = data.select_columns(list(text_columns)).rename_columns(text_columns)
    return texts.add_column("labels", labels.tolist()), classes


def _flatten(data: datasets.Dataset, column: str) -> tuple[datasets.Dataset, list[int]]:
    """The labels of all examples one after the other, and how many each example has."""
    feature = data.features[column]
    if _guess_problem_type(feature) != MULTI:
        raise InputError(
            f"--problem_type {MULTI}: --label_column {column!r} holds {feature}, no lists"
        )
    lists = [labels or [] for labels in data[column]]
    flat = datasets.Dataset.from_dict(
        {column: [label for labels in lists for label in labels]},
        features=datasets.Features({column: feature.feature}),
    )
    return flat, [len(labels) for labels in lists]


def _read_numbers(data: datasets.Dataset, column: str, which: str) -> np.ndarray:
    labels = data[column][:]
    missing = sum(label is None or label != label for label in labels)
    if missing:
        raise InputError(
            f"{missing} of the {len(labels)} {which} have no label in --label_column {column!r}"
        )
    if not all(type(label) in (int, float) for label in labels):
        feature = data.features[column]
        raise InputError(
            f"--problem_type {REGRESSION}: --label_column {column!r} holds {feature}, no numbers"
        )
    infinite = sum(map(math.isinf, labels))
    if infinite:
        raise InputError(
            f"{infinite} of the {len(labels)} {which} have an infinite label in --label_column "
            f"{column!r}"
        )
    if len(set(labels)) == 1:  # -1 throughout, in the test sets of GLUE
        raise InputError(
            f"all {which} have the label {labels[0]} in --label_column {column!r}: there is "
            "nothing to predict; choose another split or column"
        )
    return np.array(labels, dtype=float)

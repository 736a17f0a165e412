"""What the classification scripts share: reading sources and labels, splits, label noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from common.script_utils import InputError, closest
from common.shared_arguments import SourceArguments
from sklearn.model_selection import train_test_split

from sam_hf.config.file import is_missing_path

SPLIT_SEED = 0  # for what must be the same in every run, whatever its --seed
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def add_symmetric_noise(
    labels: np.ndarray, num_classes: int, fraction: float, seed: int
) -> np.ndarray:
    """A copy in which exactly round(fraction * N) labels are another class, uniformly drawn."""
    random = np.random.default_rng(seed)
    changed = random.choice(len(labels), size=round(fraction * len(labels)), replace=False)
    noisy = labels.copy()
    # A shift by 1 to C - 1 classes reaches each of the others equally often, and never the own one.
    noisy[changed] = (labels[changed] + random.integers(1, num_classes, len(changed))) % num_classes
    return noisy


def load(option: str, *source: Any, **options: Any) -> datasets.Dataset:
    """`datasets.load_dataset`, with the option that named the source in its error."""
    try:
        return datasets.load_dataset(*source, **options)
    except StopIteration as error:  # `datasets` came to the end before the first example
        raise InputError(f"{option} cannot be loaded: it holds no examples") from error
    # Whatever is wrong with a source, and there are a dozen exceptions for it, the user chose it.
    except Exception as error:
        # `datasets` says "an error occurred", and keeps for the cause what the error was.
        is_vague = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = (error.__cause__ or error) if is_vague else str(error).strip().split("\n")[0]
        raise InputError(f"{option} cannot be loaded: {reason}") from error


def load_files(
    option: str,
    files: Sequence[str],
    builder: str | None = None,
    builders: Mapping[str, str] = BUILDERS,
    **options: Any,
) -> datasets.Dataset:
    """Local files as one data set.

    Args:
        builder: the builder of `datasets` that reads them; by the files' names if not given.
        builders: the builder for each ending of a name.
        options: those of the builder.

    Raises:
        InputError: a file is missing, of an unknown kind, or cannot be read.
    """
    for file in files:
        if Path(file).is_dir():
            raise InputError(f"--{option} {file!r} is a directory: name the files in it")
        if not Path(file).is_file():
            raise InputError(f"--{option} {file!r}: there is no such file")
        if builder is None and Path(file).suffix not in builders:
            raise InputError(f"--{option} {file!r}: the names must end in {' or '.join(builders)}")
    kinds = sorted({builder or builders[Path(file).suffix] for file in files})
    if len(kinds) > 1:
        raise InputError(f"--{option}: the files must be of one kind, got {' and '.join(kinds)}")
    return load(f"--{option} {files}", kinds[0], data_files=files, split="train", **options)


def load_sets(
    args: SourceArguments, read: Callable[[str, list[str]], datasets.Dataset] = load_files
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training and the evaluation examples of --dataset_name or of --train_file.

    Args:
        read: reads local files, given the name of the option and its value.

    Returns:
        None for the second, if there is no --validation_file.
    """
    if args.dataset_name is not None:
        name, config = args.dataset_name, args.dataset_config_name
        if is_missing_path(name):
            raise InputError(f"--dataset_name: there is no folder {name!r}")
        splits = (args.train_split or "train", args.eval_split or "test")
        train, test = (load(f"--dataset_name {name}", name, config, split=s) for s in splits)
        return train, test
    files = args.validation_file
    return read("train_file", args.train_file), files and read("validation_file", files)


def require_column(data: datasets.Dataset, option: str, column: str, which: str) -> None:
    """Raise `InputError` if there is no such column."""
    if column not in data.column_names:
        hint = closest(column, data.column_names)
        raise InputError(
            f"--{option}: the {which} have no column {column!r}{hint}; its columns: "
            f"{', '.join(data.column_names)}"
        )


def read_labels(data: datasets.Dataset, column: str, which: str) -> list[Any]:
    """The labels as the source has them: class names for a ClassLabel, else strings or integers."""
    require_column(data, "label_column", column, which)
    feature = data.features[column]
    labels = list(data.select_columns([column]).with_format(None)[column])
    is_class = isinstance(feature, datasets.ClassLabel)
    unlabeled = sum(label is None or (is_class and label < 0) for label in labels)
    if unlabeled:
        raise InputError(
            f"{unlabeled} of the {len(labels)} {which} have no label (empty or -1) in "
            f"--label_column {column!r}: leave them out, or choose another split or column"
        )
    if not is_class and not all(type(label) in (int, str) for label in labels):
        raise InputError(
            f"--label_column {column!r} holds {feature}; classes must be integers or strings"
        )
    return feature.int2str(labels) if is_class else labels


def find_classes(data: datasets.Dataset, column: str, labels: list[Any], which: str) -> list[Any]:
    """The classes in their order: those that the source names, else those that there are."""
    feature = data.features[column]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(labels))
    if len(classes) < 2:
        raise InputError(f"the {which} have only the class {classes}: two are needed")
    return classes


def number_labels(labels: list[Any], classes: list[Any], which: str) -> np.ndarray:
    """The classes' numbers, by name: another file may number the same classes otherwise."""
    strange = sorted(set(labels) - set(classes))
    if strange:
        raise InputError(f"the {which} have classes that the training has not: {strange}")
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in labels])


def hold_out(
    size: int, fraction: float, what: str, labels: np.ndarray | None = None
) -> list[np.ndarray]:
    """Indices of two parts, the second with this fraction of the examples; the same every time.

    Args:
        what: the name of the second part in the error, with the option that asks for it.
        labels: class numbers, if the parts are to have equal shares of each class.

    Raises:
        InputError: there are too few examples.
    """
    try:
        return train_test_split(
            np.arange(size), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:  # a class with one example, or fewer examples than classes
        raise InputError(f"{what} cannot be set aside: {error}") from error


def draw(size: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` examples, drawn at random but the same every time; all where it is None.

    All keep their order.
    """
    if limit is None or limit >= size:
        return np.arange(size)
    return np.random.default_rng(SPLIT_SEED).permutation(size)[:limit]

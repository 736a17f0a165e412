"""Data handling of the training scripts: load, split, draw, encode labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from common.arguments import DataArguments
from common.cli import InputError, closest
from datasets import ClassLabel, Dataset

SPLIT_SEED = 0  # for what must be the same in every run, whatever its --seed
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
Sets = tuple[Dataset, Dataset | None]


def load_sets(args: DataArguments, name: str, built_in: Callable[[], Sets]) -> tuple[str, Sets]:
    """The data's name, and the training and the evaluation examples, None if there are none."""
    if args.is_built_in:
        return name, built_in()
    if args.train_file is not None:
        name = Path(args.train_file[0]).resolve().parent.name
        test = args.validation_file and load_files("validation_file", args.validation_file)
        return name, (load_files("train_file", args.train_file), test)
    name, config = str(args.dataset_name), args.dataset_config_name
    train = _load(f"--dataset_name {name}", name, config, split=args.train_split or "train")
    if args.eval_fraction is not None:  # rather than the data set's own evaluation examples
        return name, (train, None)
    split = args.eval_split or "test"
    option = f"--eval_split {split} (without one, give --eval_fraction)"
    return name, (train, _load(option, name, config, split=split))


def load_files(option: str, files: Sequence[str]) -> Dataset:
    """Local files of one kind as one data set. In .txt files a blank line ends an example."""
    kind, *others = {BUILDERS.get(Path(file).suffix) for file in files}
    if kind is None or others:
        raise InputError(f"--{option} {files}: the names must end in one of {', '.join(BUILDERS)}")
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    return _load(f"--{option} {files}", kind, data_files=files, split="train", **options)


def _load(option: str, *source: Any, **options: Any) -> Dataset:
    try:
        return datasets.load_dataset(*source, **options)
    except Exception as error:  # many types, with the reason in the first line or the cause
        is_vague = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = str((is_vague and error.__cause__) or error).splitlines()
        reason = reason[0] if reason else "it holds no examples"
        raise InputError(f"{option} cannot be loaded: {reason}") from error


def split_and_draw(
    args: DataArguments, sets: Sets, stratify: str | None = None
) -> tuple[Dataset, Dataset]:
    """Hold out evaluation examples if there are none, then draw --max_train_samples."""
    train, test = sets
    if test is None:
        from sklearn.model_selection import train_test_split  # here: importing it takes a second

        labels = None if stratify is None else np.array(train[stratify])
        size, options = args.eval_fraction or 0.2, {"stratify": labels, "random_state": SPLIT_SEED}
        try:
            kept, held_out = train_test_split(np.arange(len(train)), test_size=size, **options)
        except ValueError as error:  # a class with one example, or fewer examples than classes
            raise InputError(f"--eval_fraction {size} cannot be held out: {error}") from error
        train, test = train.select(kept), train.select(held_out)
    train = train.select(draw(len(train), args.max_train_samples))
    return train, test.select(draw(len(test), args.max_eval_samples))


def draw(size: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` examples, a random subset that is the same every time; all if None."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.random.default_rng(SPLIT_SEED).permutation(size)[:limit]


def require_column(data: Dataset, option: str, column: str) -> None:
    """Raise an InputError if there is no such column."""
    if column not in data.column_names:
        known = f"{closest(column, data.column_names)}; the columns: {', '.join(data.column_names)}"
        raise InputError(f"--{option}: there is no column {column!r}{known}")


def require_texts(data: Dataset, option: str, column: str) -> None:
    """Raise an InputError unless the column exists and all of its values are texts."""
    require_column(data, option, column)
    if kinds := {type(value).__name__ for value in data[column]} - {"str"}:
        raise InputError(f"--{option} {column!r} holds {' and '.join(sorted(kinds))}, not text")


def encode_labels(sets: Sets, column: str) -> tuple[Sets, list[str]]:
    """Replace the column by `labels`, class numbers, and name the classes in their order.

    The evaluation labels are numbered by name, as other files may number the classes differently.
    """
    names = [[] if data is None else _read_labels(data, column) for data in sets]
    feature = sets[0].features[column]
    is_named = isinstance(feature, ClassLabel)
    classes = feature.names if is_named else sorted(set(names[0]))
    if len(classes) < 2:
        raise InputError(f"--label_column {column!r} has only the class {classes}: two are needed")
    if unknown := sorted(set(names[-1]) - set(classes)):
        raise InputError(f"the evaluation examples have classes of their own: {unknown}")
    number = {name: i for i, name in enumerate(classes)}
    train, test = (
        data and data.remove_columns(column).add_column("labels", [number[n] for n in labels])
        for data, labels in zip(sets, names, strict=True)
    )
    return (train, test), [str(name) for name in classes]


def _read_labels(data: Dataset, column: str) -> list[Any]:
    """The labels: integers or strings, or the names of a ClassLabel."""
    require_column(data, "label_column", column)
    feature, labels = data.features[column], list(data.select_columns([column])[column])
    is_class = isinstance(feature, ClassLabel)
    if missing := sum(label is None or (is_class and label < 0) for label in labels):
        found = f"{missing} of {len(labels)} examples have no label (empty or -1)"
        raise InputError(f"--label_column {column!r}: {found}: leave them out")
    if not all(type(label) in (int, str) for label in labels):
        raise InputError(f"--label_column {column!r} holds {feature}, not integers or strings")
    return feature.int2str(labels) if is_class else labels


def with_label_noise(data: Dataset, num_classes: int, fraction: float) -> Dataset:
    """The examples with exactly round(fraction * N) of their `labels` changed."""
    if fraction == 0:
        return data
    labels = add_symmetric_noise(np.array(data["labels"]), num_classes, fraction, seed=0)
    return data.remove_columns("labels").add_column("labels", labels.tolist())


def add_symmetric_noise(
    labels: np.ndarray, num_classes: int, fraction: float, seed: int
) -> np.ndarray:
    """A copy in which exactly round(fraction * N) labels are another class, uniformly drawn."""
    random = np.random.default_rng(seed)
    changed = random.choice(len(labels), size=round(fraction * len(labels)), replace=False)
    noisy = labels.copy()
    # A shift by 1 to C - 1 classes reaches each of the others equally often.
    noisy[changed] = (labels[changed] + random.integers(1, num_classes, len(changed))) % num_classes
    return noisy


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer made from these texts, of at least 260 tokens."""
    from transformers import GPT2Tokenizer

    eos = "<|endoftext|>"
    untrained = GPT2Tokenizer(unk_token=eos, bos_token=eos, eos_token=eos, pad_token="<|padding|>")
    return untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)

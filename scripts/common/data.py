"""What the training scripts do with their examples: load, split, draw, encode labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from common.arguments import DataArguments
from common.cli import InputError, closest

from sam_hf.config.file import is_missing_path

SPLIT_SEED = 0  # for what must be the same in every run, whatever its --seed
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
Sets = tuple[datasets.Dataset, datasets.Dataset | None]


def load_sets(args: DataArguments, name: str, built_in: Callable[[], Sets]) -> tuple[str, Sets]:
    """The data's name, and the training and the evaluation examples, None if there are none.

    Args:
        name, built_in: the built-in examples, where the options name no others.

    Raises:
        InputError: there is no such source, or it cannot be read.
    """
    if args.is_built_in:
        return name, built_in()
    if args.train_file is not None:
        name = Path(args.train_file[0]).resolve().parent.name
        test = args.validation_file and load_files("validation_file", args.validation_file)
        return name, (load_files("train_file", args.train_file), test)
    name, config = str(args.dataset_name), args.dataset_config_name
    if is_missing_path(name):
        raise InputError(f"--dataset_name: there is no folder {name!r}")
    train = _load(f"--dataset_name {name}", name, config, split=args.train_split or "train")
    if args.eval_fraction is not None:  # rather than the data set's own evaluation examples
        return name, (train, None)
    split = args.eval_split or "test"
    option = f"--eval_split {split} (without one, give --eval_fraction)"
    return name, (train, _load(option, name, config, split=split))


def load_files(option: str, files: Sequence[str]) -> datasets.Dataset:
    """Local files of one kind as one data set. In .txt files a blank line ends an example.

    Raises:
        InputError: a file is missing, of an unknown kind, or cannot be read.
    """
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"--{option} {file!r}: there is no such file")
        if Path(file).suffix not in BUILDERS:
            raise InputError(f"--{option} {file!r}: the names must end in {' or '.join(BUILDERS)}")
    kinds = sorted({BUILDERS[Path(file).suffix] for file in files})
    if len(kinds) > 1:
        raise InputError(f"--{option}: the files must be of one kind, got {' and '.join(kinds)}")
    options = {"sample_by": "paragraph"} if kinds == ["text"] else {}
    return _load(f"--{option} {files}", kinds[0], data_files=files, split="train", **options)


def _load(option: str, *source: Any, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(*source, **options)
    # A source can fail with a dozen exceptions, of which the user reads the first line. `datasets`
    # often says "an error occurred", and which in the cause; an empty source stops an iteration.
    except Exception as error:
        is_vague = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = (error.__cause__ or error) if is_vague else str(error).strip().split("\n")[0]
        is_empty = isinstance(error, StopIteration)
        reason = "it holds no examples" if is_empty else reason
        raise InputError(f"{option} cannot be loaded: {reason}") from error


def split_and_draw(
    args: DataArguments, sets: Sets, stratify: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold out evaluation examples if there are none, and draw --max_train_samples of the others.

    Args:
        stratify: column of class numbers of which both parts hold equal shares.

    Raises:
        InputError: a set has no examples, or too few.
    """
    train, test = sets
    if test is None:
        fraction = args.eval_fraction or 0.2
        train, test = hold_out(train, fraction, f"--eval_fraction {fraction}", stratify)
    train = train.select(draw(len(train), args.max_train_samples))
    test = test.select(draw(len(test), args.max_eval_samples))
    for which, data in (("training", train), ("evaluation", test)):
        if not len(data):
            raise InputError(f"there are no {which} examples")
    return train, test


def hold_out(
    data: datasets.Dataset, fraction: float, what: str, stratify: str | None = None
) -> list[datasets.Dataset]:
    """Two parts, the second with this fraction of the examples; the same every time.

    Args:
        what: the name of the second part in the error, with the option that asks for it.
        stratify: column of class numbers of which both parts hold equal shares.

    Raises:
        InputError: there are too few examples.
    """
    from sklearn.model_selection import train_test_split  # here: importing it takes a second

    labels = None if stratify is None else np.array(data[stratify])
    try:
        parts = train_test_split(
            np.arange(len(data)), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:  # a class with one example, or fewer examples than classes
        raise InputError(f"{what} cannot be held out: {error}") from error
    return [data.select(part) for part in parts]


def draw(size: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` examples, a random subset that is the same every time; all if None."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.random.default_rng(SPLIT_SEED).permutation(size)[:limit]


def require_column(data: datasets.Dataset, option: str, column: str) -> None:
    """Raise an InputError if there is no such column."""
    if column not in data.column_names:
        hint = closest(column, data.column_names)
        known = ", ".join(data.column_names)
        raise InputError(f"--{option}: there is no column {column!r}{hint}; the columns: {known}")


def require_texts(data: datasets.Dataset, option: str, column: str) -> None:
    """Raise an InputError unless the column exists and all of its values are texts."""
    require_column(data, option, column)
    kinds = {type(value).__name__ for value in data[column]} - {"str"}
    if kinds:
        raise InputError(f"--{option} {column!r} holds {' and '.join(sorted(kinds))}, not text")


def encode_labels(sets: Sets, column: str) -> tuple[Sets, list[str]]:
    """Replace the column by `labels`, class numbers, and name the classes in their order.

    The evaluation labels are numbered by name, as other files may number the classes differently.

    Raises:
        InputError: labels are missing, of a wrong kind, or unknown in the training examples.
    """
    train, _ = sets
    names, classes = _read_labels(train, column)
    if len(classes) < 2:
        raise InputError(f"--label_column {column!r} has the one class {classes}: two are needed")
    number = {name: i for i, name in enumerate(classes)}
    encoded = []
    for data in sets:
        names = _read_labels(data, column)[0] if data is not None else []
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise InputError(f"the evaluation examples have classes of their own: {unknown}")
        labels = [number[name] for name in names]
        encoded.append(data and data.remove_columns(column).add_column("labels", labels))
    return (encoded[0], encoded[1]), [str(name) for name in classes]


def _read_labels(data: datasets.Dataset, column: str) -> tuple[list[Any], list[Any]]:
    """The labels, as names for a ClassLabel, and the classes in their order."""
    require_column(data, "label_column", column)
    feature = data.features[column]
    labels = list(data.select_columns([column])[column])
    is_class = isinstance(feature, datasets.ClassLabel)
    missing = sum(label is None or (is_class and label < 0) for label in labels)
    if missing:
        raise InputError(
            f"--label_column {column!r}: {missing} of {len(labels)} examples have no label (empty "
            "or -1): leave them out, or choose another split or column"
        )
    if is_class:
        return feature.int2str(labels), feature.names
    if not all(type(label) in (int, str) for label in labels):
        raise InputError(f"--label_column {column!r} holds {feature}, not integers or strings")
    return labels, sorted(set(labels))


def with_label_noise(
    data: datasets.Dataset, num_classes: int, fraction: float, seed: int = 0
) -> datasets.Dataset:
    """The examples with exactly round(fraction * N) of their `labels` changed."""
    if fraction == 0:
        return data
    labels = add_symmetric_noise(np.array(data["labels"]), num_classes, fraction, seed)
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


def train_tokenizer(texts: Iterator[str], vocab_size: int, end: bool = False) -> Any:
    """A byte-level BPE tokenizer made from these texts, of at least 260 tokens.

    Args:
        end: end every text with the end-of-text token, as an encoder-decoder needs it.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import GPT2Tokenizer

    eos = "<|endoftext|>"
    untrained = GPT2Tokenizer(unk_token=eos, bos_token=eos, eos_token=eos, pad_token="<|padding|>")
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)
    if end:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
    return tokenizer

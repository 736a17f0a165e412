"""Batches of labelled examples from a dataset that the command line names."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch import Tensor

from .models import check_path, load

_DIGITS = "digits"
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_LABEL_COLUMNS = ("label", "labels")
# Columns of sentence pairs in GLUE and similar datasets.
_TEXT_PAIRS = {"sentence1": "sentence2", "premise": "hypothesis", "question": "sentence"}
_TEXT_PAIRS |= {"question1": "question2", "text1": "text2"}

_Collator: TypeAlias = Callable[[Any], dict[str, Tensor]]
"""Function from rows of a dataset to a batch of model inputs."""


@dataclass(frozen=True)
class DataOptions:
    """Dataset, examples and columns: the options of the command line of the same names."""

    data: str = _DIGITS
    split: str | None = None
    examples: int = 512
    batch_size: int = 64
    seed: int = 0
    text_column: Sequence[str] = ()
    label_column: str | None = None
    image_column: str | None = None

    def __post_init__(self) -> None:
        check_path(self.data, "file or folder")


def load_batches(options: DataOptions, model: Any) -> list[dict[str, Tensor]]:
    """Load examples and collate them to batches with labels, as the model's forward takes them."""
    path = Path(options.data)
    is_single = options.data == _DIGITS or path.is_file() or (path / "state.json").exists()
    if options.split is not None and is_single:
        raise ValueError(f"--split {options.split}: {options.data} has no splits")
    dataset = _digits() if options.data == _DIGITS else _load_dataset(options)
    order = list(range(len(dataset)))
    random.Random(options.seed).shuffle(order)
    rows = dataset.select(order[: options.examples])  # in this order, so that batches are random
    # For an adapter, the class of the model that it adapts.
    kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
    if "Image" in kind:
        collate = _image_collator(rows, options, model)
    elif "Sequence" in kind:
        collate = _sequence_collator(rows, options, model)
    else:
        rows, collate = _language_collator(rows, options, model)
    # Not `rows.iter`: it decodes images outside of the collator, which names the column in errors.
    starts = range(0, len(rows), options.batch_size)
    return [collate(rows.select(range(i, min(i + options.batch_size, len(rows))))) for i in starts]


def _digits() -> Any:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    rows = {"image": list(pixels), "label": digits.target.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def _load_dataset(options: DataOptions) -> Any:
    path, split = Path(options.data), options.split or "train"
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"{path}: allowed are files ending in {', '.join(_BUILDERS)}")
    try:
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))[split]
        if path.is_file():
            return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split=split)
        if path.is_dir():
            return datasets.load_dataset(str(path), split=split)
        name, _, configuration = options.data.partition(":")
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the exception type depends on the dataset's builder
        hint = f"split {split!r}; to compare with a second model on the Hub, name the data too"
        raise ValueError(f"no data {options.data!r} ({hint}): {error}") from error


def _image_collator(rows: Any, options: DataOptions, model: Any) -> _Collator:
    processor = load("AutoImageProcessor", model.name_or_path, backend="pil")
    labels = _label_reader(rows, options, model)
    found = _columns_of_type(rows, datasets.Image.dtype)[:1]
    column = _column(rows, options.image_column, "image_column", found, "the images")
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

    def collate(some: Any) -> dict[str, Tensor]:
        try:
            images = [image.convert(mode) for image in some[column]]
        except (OSError, AttributeError) as error:  # a broken image, or none
            problem = f"--image_column {column!r}: an image cannot be read: {error}"
            raise ValueError(problem) from error
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": labels(some)}

    return collate


def _sequence_collator(rows: Any, options: DataOptions, model: Any) -> _Collator:
    labels, columns = _label_reader(rows, options, model), _text_columns(rows, options, limit=2)
    tokenize = _tokenize_function(rows, columns, model, load("AutoTokenizer", model.name_or_path))
    return lambda some: {**tokenize(some), "labels": labels(some)}


def _language_collator(rows: Any, options: DataOptions, model: Any) -> tuple[Any, _Collator]:
    """Rows with at least one token to predict, and their collator."""
    tokenizer = load("AutoTokenizer", model.name_or_path)
    columns = _text_columns(rows, options, limit=1)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenize = _tokenize_function(rows, columns, model, tokenizer)
    lengths = map(len, tokenizer(list(rows[columns[0]]))["input_ids"])
    kept = [i for i, length in enumerate(lengths) if length > 1]
    if not kept:
        raise ValueError(f"--text_column {columns[0]!r}: every text has fewer than two tokens")
    if len(kept) < len(rows):
        skipped = f"{len(rows) - len(kept)} of {len(rows)} texts are skipped"
        warnings.warn(f"{skipped}: they have fewer than two tokens", stacklevel=2)

    def collate(some: Any) -> dict[str, Tensor]:
        inputs = tokenize(some)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    return rows.select(kept), collate


def _tokenize_function(rows: Any, columns: Sequence[str], model: Any, tokenizer: Any) -> _Collator:
    """Function that tokenizes the texts, or pairs of texts, of some rows."""
    for column in columns:
        if missing := sum(text is None for text in rows[column]):
            raise ValueError(f"--text_column {column!r}: {missing} of {len(rows)} texts are null")
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    max_length = min(512, *(limit for limit in limits if limit and limit > 0))  # XLNet has -1
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    options = {"padding": True, "truncation": True, "max_length": max_length}

    def tokenize(some: Any) -> dict[str, Tensor]:
        texts = [list(some[column]) for column in columns]
        inputs: dict[str, Tensor] = dict(tokenizer(*texts, return_tensors="pt", **options))
        largest = int(inputs["input_ids"].max())
        if largest >= vocabulary_size:
            found = f"the token {largest}, but the model has {vocabulary_size} embeddings"
            problem = f"the tokenizer of {model.name_or_path} returned {found}"
            raise ValueError(f"{problem}: they do not belong together")
        return inputs

    return tokenize


def _columns_of_type(rows: Any, *types: str) -> list[str]:
    """Names of the columns whose type begins with one of `types`."""
    return [n for n, f in rows.features.items() if str(getattr(f, "dtype", "")).startswith(types)]


def _column(rows: Any, name: str | None, option: str, found: Sequence[str], content: str) -> str:
    """The named column, or the only one found."""
    columns = ", ".join(rows.column_names)
    if name is not None and name not in rows.column_names:
        raise ValueError(f"--{option} {name!r}: the columns are {columns}")
    if name is None and len(found) != 1:
        raise ValueError(f"cannot infer the column of {content} from {columns}: pass --{option}")
    return found[0] if name is None else name


def _text_columns(rows: Any, options: DataOptions, limit: int) -> list[str]:
    """The named columns of texts; else a known pair, "text", or the only string column."""
    labels = {options.label_column} if options.label_column is not None else set(_LABEL_COLUMNS)
    texts = [n for n in _columns_of_type(rows, "string", "large_string") if n not in labels]
    pairs = [list(pair) for pair in _TEXT_PAIRS.items() if limit > 1 and set(pair) <= set(texts)]
    if pairs and not options.text_column:
        return pairs[0]
    found = ["text"] if "text" in texts else texts
    names: Sequence[str | None] = options.text_column or [None]
    if len(names) > limit:
        raise ValueError(f"--text_column is given {len(names)} times. Allowed: at most {limit}")
    return [_column(rows, name, "text_column", found, "the texts") for name in names]


def _label_reader(rows: Any, options: DataOptions, model: Any) -> Callable[[Any], Tensor]:
    """Function from rows to a tensor of class indices of the model.

    Classes are matched by name, ignoring case, where both dataset and model name them, since their
    orders may differ; otherwise the indices of the dataset are used.
    """
    by_name = [name for name in _LABEL_COLUMNS if name in rows.column_names]
    found = by_name[:1] or _columns_of_type(rows, "int", "uint")
    column = _column(rows, options.label_column, "label_column", found, "the labels")
    config = model.config
    # A config may have only one of the two mappings.
    label2id = config.label2id or {name: i for i, name in (config.id2label or {}).items()}
    exact = {str(name): int(index) for name, index in label2id.items()}
    folded = {name.casefold(): index for name, index in exact.items()}
    if len(folded) < len(exact):  # names that differ only in case
        folded = {}
    model_classes = ", ".join(list(exact)[:5])
    names: list[str] = getattr(rows.features[column], "names", None) or []

    def index_of(name: str) -> int | None:
        return exact.get(name, folded.get(name.casefold()))

    indices = list(map(index_of, names))
    if not names or None in indices or len(set(indices)) < len(names):
        indices = list(range(config.num_labels))
        if names and not all(name.casefold().startswith("label_") for name in exact):
            warnings.warn(
                f"the classes of the data ({', '.join(names[:5])}) differ from those of the model "
                f"({model_classes}): class indices are used unchanged",
                stacklevel=2,
            )

    def class_index(label: Any) -> int:
        is_index = isinstance(label, int) and 0 <= label < len(indices)  # also a bool
        index = indices[label] if is_index else index_of(label) if isinstance(label, str) else None
        if index is None:
            raise ValueError(
                f"--label_column {column!r}: the label {label!r} is not a class of the model. "
                f"Allowed: {model_classes}, ..., or an index below {config.num_labels}"
            )
        return index

    return lambda some: torch.tensor([class_index(label) for label in some[column]])

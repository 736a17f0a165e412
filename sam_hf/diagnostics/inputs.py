"""Batches as models take them, of the rows of a data set: `sam-hf` finds the columns itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DIGITS = "digits"
_LABELS = ("label", "labels")
# Columns of two texts that belong together, in GLUE and its like.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text1", "text2"),
)


class UnusableError(Exception):
    """What was named cannot be used. The message is one line."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


@dataclass(frozen=True)
class DataOptions:
    """Which examples, and how they come.

    Args:
        name: "digits", a file (parquet, csv, json, jsonl), a folder of images or of a saved data
            set, or a name on the Hub, with a configuration behind a colon ("nyu-mll/glue:rte").
        split: of what has splits; "train" if None. Refused for what has none.
        examples: how many, drawn by `seed`.
        batch_size: of the passes.
        text_columns: those that hold texts. If empty: the only one of strings beside the labels,
            "text", or two that are known to belong together, such as "sentence1" and "sentence2".
        label_column: "label", "labels" or the only one of whole numbers if None.
        image_column: the first with images if None.
    """

    name: str = DIGITS
    split: str | None = None
    examples: int = 512
    batch_size: int = 64
    seed: int = 0
    text_columns: Sequence[str] = ()
    label_column: str | None = None
    image_column: str | None = None


def input_maker(
    rows: Any, options: DataOptions, model: nn.Module, model_name: str
) -> tuple[Any, Callable[[Any], dict[str, Tensor]]]:
    """The rows that can be used, and what makes a batch of some of them.

    Raises:
        UnusableError: the columns are not found, or do not hold what the model takes.
    """
    kind = type(model).__name__
    if "Image" in kind:
        return rows, _images(rows, options, model, model_name)
    if "Sequence" in kind:
        return rows, _sequences(rows, options, model, model_name)
    return _language(rows, options, model, model_name)


def _column(rows: Any, wanted: str | None, option: str, found: Sequence[str], what: str) -> str:
    if wanted is not None:
        if wanted not in rows.column_names:
            raise UnusableError(f"--{option} {wanted!r}: there are {', '.join(rows.column_names)}")
        return wanted
    if len(found) != 1:
        raise UnusableError(
            f"which column holds {what}? There are {', '.join(rows.column_names)}: give --{option}"
        )
    return found[0]


def _labels(rows: Any, options: DataOptions, model: nn.Module) -> Callable[[Any], Tensor]:
    """What makes a tensor of class numbers of some rows.

    Classes with names are those of the model with the same names, however they are written: data
    and model may have them in another order.
    """
    import datasets

    named = [name for name in _LABELS if name in rows.column_names]
    whole = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
        or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    ]
    column = _column(rows, options.label_column, "label_column", named[:1] or whole, "the labels")
    config: Any = model.config
    # A config may have been given one of the two alone.
    label2id = config.label2id or {name: i for i, name in (config.id2label or {}).items()}
    find = _by_name(label2id)
    names: list[str] = getattr(rows.features[column], "names", None) or []
    numbers = [number for number in map(find, names) if number is not None]
    has_names = 0 < len(set(numbers)) == len(names)
    is_named = not all(str(name).casefold().startswith("label_") for name in label2id)
    known = ", ".join(list(map(str, label2id))[:5])
    if names and is_named and not has_names:
        warnings.warn(
            f"the classes of the data ({', '.join(names[:5])}) are not those that the model names "
            f"({known}): their numbers are taken as they are",
            stacklevel=2,
        )
    count = config.num_labels

    def number(label: Any) -> int:
        if isinstance(label, str):
            of_name = find(label)
            if of_name is None:
                raise UnusableError(
                    f"--label_column {column!r}: the label {label!r} is none of the model's: "
                    f"{known}, ..."
                )
            return of_name
        if has_names and isinstance(label, int) and 0 <= label < len(numbers):
            return numbers[label]
        if not (isinstance(label, int) and 0 <= label < count):
            raise UnusableError(
                f"--label_column {column!r}: the label {label!r} is none of the model's: "
                f"0 to {count - 1}"
            )
        return int(label)  # of a bool too

    return lambda some: torch.tensor([number(label) for label in some[column]])


def _by_name(label2id: Mapping[Any, Any]) -> Callable[[str], int | None]:
    """The number of a class by its name, in whatever case unless two names differ in that alone."""
    exact = {str(name): int(number) for name, number in label2id.items()}
    folded = {name.casefold(): number for name, number in exact.items()}
    if len(folded) < len(exact):
        return exact.get
    return lambda name: exact.get(name, folded.get(name.casefold()))


def _images(rows: Any, options: DataOptions, model: nn.Module, model_name: str) -> Any:
    import datasets

    processor = _from_pretrained("AutoImageProcessor", model_name, backend="pil")
    labels = _labels(rows, options, model)
    found = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    column = _column(rows, options.image_column, "image_column", found[:1], "the images")
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

    def prepare(some: Any) -> dict[str, Tensor]:
        try:
            images = [image.convert(mode) for image in some[column]]
        except (OSError, AttributeError) as error:  # no image, or none at all
            raise UnusableError(
                f"--image_column {column!r}: an image cannot be read: {error}"
            ) from error
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": labels(some)}

    return prepare


def _sequences(rows: Any, options: DataOptions, model: nn.Module, model_name: str) -> Any:
    tokenizer = _from_pretrained("AutoTokenizer", model_name)
    labels, columns = _labels(rows, options, model), _text_columns(rows, options, most=2)
    tokens = _tokens(rows, columns, model, model_name, tokenizer)
    return lambda some: {**tokens(some), "labels": labels(some)}


def _language(
    rows: Any, options: DataOptions, model: nn.Module, model_name: str
) -> tuple[Any, Callable[[Any], dict[str, Tensor]]]:
    tokenizer = _from_pretrained("AutoTokenizer", model_name)
    columns = _text_columns(rows, options, most=1)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens = _tokens(rows, columns, model, model_name, tokenizer)
    lengths = map(len, tokenizer(list(rows[columns[0]]))["input_ids"])
    usable = [i for i, length in enumerate(lengths) if length > 1]
    if not usable:
        raise UnusableError(f"--text_column {columns[0]!r}: no text has a second token to predict")
    if len(usable) < len(rows):
        warnings.warn(
            f"{len(rows) - len(usable)} of {len(rows)} texts are left out: they have no second "
            "token to predict",
            stacklevel=2,
        )

    def prepare(some: Any) -> dict[str, Tensor]:
        inputs = tokens(some)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    return rows.select(usable), prepare


def _tokens(
    rows: Any, columns: Sequence[str], model: nn.Module, model_name: str, tokenizer: Any
) -> Callable[[Any], dict[str, Tensor]]:
    """What makes tokens of the texts of some rows, one text or two."""
    for column in columns:
        missing = sum(text is None for text in rows[column])
        if missing:
            raise UnusableError(
                f"--text_column {column!r}: {missing} of {len(rows)} texts are null"
            )
    config: Any = model.config
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    most = min(512, *(limit for limit in limits if limit and limit > 0))  # XLNet says -1
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    count = embeddings.weight.shape[0]

    def tokens(some: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(
            tokenizer(
                *(list(some[column]) for column in columns),
                padding=True,
                truncation=True,
                max_length=most,
                return_tensors="pt",
            )
        )
        largest = int(found["input_ids"].max())
        if largest >= count:
            raise UnusableError(
                f"the tokenizer of {model_name} gives the token {largest}, and the model has "
                f"{count}: they do not belong together"
            )
        return found

    return tokens


def _text_columns(rows: Any, options: DataOptions, most: int) -> list[str]:
    for name in options.text_columns:
        if name not in rows.column_names:
            raise UnusableError(f"--text_column {name!r}: there are {', '.join(rows.column_names)}")
    if options.text_columns:
        chosen = list(options.text_columns)
    else:
        chosen = _guess_text_columns(rows, options.label_column, most)
    if not 0 < len(chosen) <= most:
        raise UnusableError(
            f"{len(chosen)} columns with texts, and the model takes 1 to {most}; there are "
            f"{', '.join(rows.column_names)}: give --text_column"
        )
    return chosen


def _guess_text_columns(rows: Any, label_column: str | None, most: int) -> list[str]:
    """What there can be no doubt of; else all, which is one too many."""
    kinds = ("string", "large_string")
    others = {label_column} if label_column is not None else set(_LABELS)
    texts = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", None) in kinds and name not in others
    ]
    pair = next((pair for pair in _PAIRS if set(pair) <= set(texts)), None)
    if most > 1 and pair is not None:
        return list(pair)
    if "text" in texts:
        return ["text"]
    if len(texts) > 1:
        raise UnusableError(
            f"which column holds the texts? There are {', '.join(rows.column_names)}: give "
            f"--text_column{', twice for a pair' if most > 1 else ''}"
        )
    return texts


def _from_pretrained(loader: str, name: str, **options: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, loader).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UnusableError(f"{name} has nothing for {loader}: {error}") from error

"""A model and data to measure it on, from names: what `sam-hf` is given."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

DIGITS = "digits"
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_HEADS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}


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
        text_columns: those that hold texts; the first (two) with strings if empty.
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


def load_model(name: str) -> nn.Module:
    """A model of transformers in float32, from a folder or the Hub, in evaluation mode.

    Raises:
        UnusableError: there is none, or it has no head whose loss is known here.
    """
    import transformers

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").exists():
        raise UnusableError(f"{name} has no config.json: it is not the folder of a saved model")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnusableError(f"no model {name!r}: {error}") from error
    (architecture,) = (getattr(config, "architectures", None) or [""])[:1]
    loader = next((auto for end, auto in _HEADS.items() if architecture.endswith(end)), None)
    if loader is None:
        raise UnusableError(
            f"{name} is a {architecture or type(config).__name__}, whose loss is not known here. "
            "Allowed: models that classify images or sequences, and causal language models. For "
            "others: sam_hf.diagnostics.Objective(model, batches, loss=...)"
        )
    try:
        model = getattr(transformers, loader).from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnusableError(f"the model {name!r} cannot be loaded: {error}") from error
    module: nn.Module = model.eval()
    return module


def import_plugin(name: str) -> None:
    """Import a module, or a file that is one: it may register models with transformers.

    Raises:
        UnusableError: it cannot be imported.
    """
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise UnusableError(f"--plugin {name}: {error}") from error


def load_batches(
    options: DataOptions, model: nn.Module, model_name: str
) -> list[dict[str, Tensor]]:
    """Batches as the model takes them, with labels.

    Raises:
        UnusableError: there are no such data, or they do not fit the model.
    """
    if options.split is not None and (options.name == DIGITS or Path(options.name).is_file()):
        raise UnusableError(f"--split {options.split}: {options.name} has no splits")
    if options.name == DIGITS:
        columns: Any = _digits()
    else:
        columns = _data_set(options)
    drawn = list(range(len(columns)))
    random.Random(options.seed).shuffle(drawn)
    rows = columns.select(drawn[: options.examples])  # in this order: batches are random too
    kind = type(model).__name__
    prepare = (_images if "Image" in kind else _sequences if "Sequence" in kind else _language)(
        rows, options, model, model_name
    )
    size = options.batch_size
    return [
        prepare(rows.select(range(i, min(i + size, len(rows))))) for i in range(0, len(rows), size)
    ]


# ------------------------------------------------------------------------------------ the sources


def _digits() -> Any:
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))}
    )
    rows = {"image": [Image.fromarray(x) for x in scans], "label": digits.target.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def _data_set(options: DataOptions) -> Any:
    import datasets

    path, split = Path(options.name), options.split or "train"
    try:
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise UnusableError(f"{path}: allowed are files ending in {', '.join(_BUILDERS)}")
            return datasets.load_dataset(
                _BUILDERS[path.suffix], data_files=str(path), split="train"
            )
        if path.is_dir():
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                found = datasets.load_from_disk(str(path))
                return found[split] if isinstance(found, datasets.DatasetDict) else found
            return datasets.load_dataset(str(path), split=split)
        name, _, configuration = options.name.partition(":")
        return datasets.load_dataset(name, configuration or None, split=split)
    except UnusableError:
        raise
    except Exception as error:  # what it raises depends on the builder
        raise UnusableError(
            f"no data {options.name!r} (split {split!r}; to compare with a model on the Hub, name "
            f"the data too): {error}"
        ) from error


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

    named = [name for name in ("label", "labels") if name in rows.column_names]
    whole = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
        or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    ]
    column = _column(rows, options.label_column, "label_column", named[:1] or whole, "the labels")
    config: Any = model.config
    label2id = config.label2id or {}
    numbers = {str(name).casefold(): int(number) for name, number in label2id.items()}
    names: list[str] = getattr(rows.features[column], "names", None) or []
    folded = [name.casefold() for name in names]
    has_names = bool(folded) and set(folded) <= numbers.keys()
    is_named = not all(name.startswith("label_") for name in numbers)
    if folded and is_named and not has_names:
        warnings.warn(
            f"the classes of the data ({', '.join(names[:5])}) are not those that the model names "
            f"({', '.join(list(map(str, label2id))[:5])}): their numbers are taken as they are",
            stacklevel=2,
        )
    count = config.num_labels

    def number(label: Any) -> int:
        if isinstance(label, str):
            if label.casefold() not in numbers:
                known = ", ".join(list(map(str, label2id))[:5])
                raise UnusableError(f"the label {label!r} is none of the model's: {known}, ...")
            return numbers[label.casefold()]
        if has_names and 0 <= label < len(folded):
            return numbers[folded[label]]
        if not (isinstance(label, int) and 0 <= label < count):
            raise UnusableError(f"the label {label!r} is none of the model's: 0 to {count - 1}")
        return label

    return lambda some: torch.tensor([number(label) for label in some[column]])


# ----------------------------------------------------------------------------- what models take


def _images(rows: Any, options: DataOptions, model: nn.Module, model_name: str) -> Any:
    import datasets

    processor = _from_pretrained("AutoImageProcessor", model_name, backend="pil")
    labels = _labels(rows, options, model)
    found = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    column = _column(rows, options.image_column, "image_column", found[:1], "the images")
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

    def prepare(some: Any) -> dict[str, Tensor]:
        images = [image.convert(mode) for image in some[column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": labels(some)}

    return prepare


def _sequences(rows: Any, options: DataOptions, model: nn.Module, model_name: str) -> Any:
    tokenizer = _from_pretrained("AutoTokenizer", model_name)
    labels, columns = _labels(rows, options, model), _text_columns(rows, options, most=2)
    most = min(512, _longest(model, tokenizer))

    def prepare(some: Any) -> dict[str, Tensor]:
        texts = [some[column] for column in columns]
        tokens = tokenizer(
            *map(list, texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        return {**tokens, "labels": labels(some)}

    return prepare


def _language(rows: Any, options: DataOptions, model: nn.Module, model_name: str) -> Any:
    tokenizer = _from_pretrained("AutoTokenizer", model_name)
    (column,) = _text_columns(rows, options, most=1)
    most = min(512, _longest(model, tokenizer))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def prepare(some: Any) -> dict[str, Tensor]:
        tokens = tokenizer(
            list(some[column]), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        return {**tokens, "labels": labels}

    return prepare


def _longest(model: nn.Module, tokenizer: Any) -> int:
    """How many tokens the model takes."""
    config: Any = model.config
    return int(min(getattr(config, "max_position_embeddings", 512), tokenizer.model_max_length))


def _text_columns(rows: Any, options: DataOptions, most: int) -> list[str]:
    kinds = ("string", "large_string")
    texts = [n for n, f in rows.features.items() if getattr(f, "dtype", None) in kinds]
    for name in options.text_columns:
        if name not in rows.column_names:
            raise UnusableError(f"--text_column {name!r}: there are {', '.join(rows.column_names)}")
    chosen = list(options.text_columns) or texts[:most]
    if not 0 < len(chosen) <= most:
        raise UnusableError(
            f"{len(chosen)} columns with texts, and the model takes 1 to {most}; there are "
            f"{', '.join(rows.column_names)}: give --text_column"
        )
    return chosen


def _from_pretrained(loader: str, name: str, **options: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, loader).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UnusableError(f"{name} has nothing for {loader}: {error}") from error

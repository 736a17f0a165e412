"""A model and data to measure it on, from names: what `sam-hf` is given."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .inputs import DIGITS, DataOptions, UnusableError, input_maker

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_HEADS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}


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
    rows, prepare = input_maker(rows, options, model, model_name)
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
                if isinstance(found, datasets.DatasetDict):
                    return found[split]
                if options.split is not None:
                    raise UnusableError(f"--split {split}: {options.name} has no splits")
                return found
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

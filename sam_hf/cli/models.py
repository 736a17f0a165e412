"""Loading of models, adapters and plugins that the command line names."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from ..config.file import is_missing_path

# Suffixes of architecture names, and of transformers' auto classes for them.
_IMAGES, _SEQUENCES, _LANGUAGE = _TASKS = (
    "ForImageClassification",
    "ForSequenceClassification",
    "ForCausalLM",
)
_PEFT_TASKS = {"SEQ_CLS": _SEQUENCES, "CAUSAL_LM": _LANGUAGE}
_EXAMPLE_DATA = {_SEQUENCES: "stanfordnlp/sst2", _LANGUAGE: "Salesforce/wikitext:wikitext-2-raw-v1"}
# Last layers of classifiers, whose first dimension is the number of classes.
_HEADS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")


def require(requirement: str, *modules: str) -> None:
    """Raise an ImportError that says how to install the modules that are missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} not installed: pip install {requirement}")


def check_path(name: str, kind: str = "folder") -> None:
    """Raise a ValueError if a name is a path, not a name on the Hub, that does not exist."""
    if is_missing_path(name):
        raise ValueError(f"there is no {kind} {name!r}")


def is_saved_model(name: str) -> bool:
    """Whether a name is that of the folder of a model or of an adapter."""
    return any((Path(name) / f"{kind}config.json").exists() for kind in ("", "adapter_"))


@contextmanager
def _loading(kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"no model {name!r} ({kind} cannot be loaded: {error})") from error


def load(auto_class: str, name: str, **options: Any) -> Any:
    """Load from a folder or the Hub with the given auto class of transformers."""
    with _loading(auto_class, name):
        loaded = getattr(transformers, auto_class).from_pretrained(name, **options)
    return loaded


def task_of(name: str) -> str:
    """Suffix of a model's architecture name, one of `_TASKS`, from its configuration alone."""
    check_path(name)
    adapter, folder, architecture = _adapter(name), Path(name), ""
    if adapter is not None and adapter.task_type:
        architecture = _PEFT_TASKS.get(adapter.task_type, f"{adapter.task_type} adapter")
    elif adapter is not None and adapter.auto_mapping:
        architecture = adapter.auto_mapping["base_model_class"]
    elif adapter is not None:
        return task_of(adapter.base_model_name_or_path)
    elif is_saved_model(name) or not folder.exists():
        config = load("AutoConfig", name)
        (architecture,) = (getattr(config, "architectures", None) or [type(config).__name__])[:1]
    modern_name = architecture.replace("LMHeadModel", "ForCausalLM")  # GPT2LMHeadModel
    task = next((task for task in _TASKS if modern_name.endswith(task)), None)
    if task is None and (folder / "modules.json").exists():
        raise ValueError(
            f"{name} is a model of sentence-transformers, whose training loss is not saved with "
            "it: use sam_hf.diagnostics.Objective(model, batches, loss=...)"
        )
    if not architecture:
        raise ValueError(f"{name} has no config.json: it is not the folder of a saved model")
    if task is None:
        raise ValueError(
            f"{name} is a {architecture}, which is not supported. "
            f"Allowed: {', '.join(_TASKS)}. Others: sam_hf.diagnostics.Objective(..., loss=...)"
        )
    return task


def default_data(name: str) -> str:
    """`digits` for an image model; raises a ValueError for other models, which need data."""
    if (task := task_of(name)) != _IMAGES:
        example = f"for example: sam-hf sharpness {name} {_EXAMPLE_DATA[task]}"
        raise ValueError(f"DATA is needed for a text model (AutoModel{task}), {example}")
    return "digits"


def load_model(name: str) -> Any:
    """Load a model or an adapter from a folder or the Hub, in float32 and evaluation mode.

    For an adapter, only the weights that it stores are trainable.
    """
    task, adapter = task_of(name), _adapter(name)
    if adapter is None:
        return load(f"AutoModel{task}", name, dtype=torch.float32).eval()
    from peft import PeftModel, load_peft_weights

    base_name = adapter.base_model_name_or_path
    with _loading("the adapter", name):
        weights = load_peft_weights(name, device="cpu")
    # The base may have no head, or a head for another number of classes.
    heads = [weight.shape[0] for key, weight in weights.items() if key.endswith(_HEADS)]
    options = {"num_labels": heads[0]} if heads else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new head, which the adapter replaces, is part of the fingerprint
        base, info = load(
            f"AutoModel{task}", base_name, dtype=torch.float32, output_loading_info=True, **options
        )
    stored = {key.removeprefix("base_model.model.") for key in weights}
    if lost := sorted(set(info["missing_keys"]) - stored):
        raise ValueError(f"neither the adapter {name} nor its base {base_name} holds {lost[0]}")
    with _loading("the adapter", name):
        model: Any = PeftModel.from_pretrained(base, name, is_trainable=True).eval()
    processors = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    if any(_has_file(name, file) for file in processors):
        model.name_or_path = name  # where the data look for a tokenizer or image processor
    return model


def _has_file(name: str, file: str) -> bool:
    """Whether a folder, or a repository on the Hub that can be reached, has a file."""
    if Path(name).is_dir():
        return (Path(name) / file).exists()
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{what}": False for what in quiet}
    return cached_file(name, file, **options) is not None


def _adapter(name: str) -> Any:
    """Configuration of the PEFT adapter in a folder or on the Hub; None if it holds none."""
    if not _has_file(name, "adapter_config.json"):
        return None
    require("peft", "peft")
    from peft import PeftConfig

    with _loading("adapter_config.json", name):
        config = PeftConfig.from_pretrained(name)
    if not config.base_model_name_or_path:
        raise ValueError(f"adapter_config.json of {name} has no base_model_name_or_path")
    check_path(config.base_model_name_or_path, f"base model of {name} in the folder")
    return config


def import_plugin(name: str) -> None:
    """Import a module by its name or the path of its file."""
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:  # plugins can raise anything
        raise ValueError(f"--plugin {name}: {error}") from error

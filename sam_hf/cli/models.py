"""Loading of models and plugins that the command line names."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

# Ends of the names of architectures, and of transformers' auto classes for them.
_TASKS = ("ForImageClassification", "ForSequenceClassification", "ForCausalLM")


def load(auto_class: str, name: str, **options: Any) -> Any:
    """Load what a folder or a model on the Hub holds, by its auto class of transformers."""
    try:
        return getattr(transformers, auto_class).from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"no model {name!r} ({auto_class} cannot be loaded: {error})") from error


def load_model(name: str) -> Any:
    """Load a transformers model from a folder or the Hub, in float32 and evaluation mode."""
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        raise ValueError(f"{name} has no config.json: it is not the folder of a saved model")
    config = load("AutoConfig", name)
    (architecture,) = (getattr(config, "architectures", None) or [""])[:1]
    modern_name = architecture.replace("LMHeadModel", "ForCausalLM")  # GPT2LMHeadModel
    task = next((task for task in _TASKS if modern_name.endswith(task)), None)
    if task is None:
        raise ValueError(
            f"{name} is a {architecture or type(config).__name__}, which is not supported. "
            f"Allowed: {', '.join(_TASKS)}. Others: sam_hf.diagnostics.Objective(..., loss=...)"
        )
    return load(f"AutoModel{task}", name, dtype=torch.float32).eval()


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

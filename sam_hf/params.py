"""Which parameters are perturbed, and what kind each of them is."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

PARAMETER_GROUPS = ("norms", "biases", "embeddings", "matrices")

_NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation layer, by its type and never by its parameters' names.

    transformers writes its own (LlamaRMSNorm, T5LayerNorm, ...), one class for each model, without
    a common base: the name of the class tells, if all that the module itself holds are vectors.
    """
    if isinstance(module, _NORM_TYPES):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and all(p.ndim <= 1 for p in own)


def plain(name: str) -> str:
    """A parameter's name without the marks of activation checkpointing and compiled regions."""
    return re.sub(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def parameter_groups(model: nn.Module) -> dict[str, str]:
    """The group of each parameter of the model, by name: one of `PARAMETER_GROUPS`.

    Weights of embedding tables, and whatever an embedding module holds itself (position
    embeddings, class tokens), are "embeddings". A tied weight counts where it stands first. Of the
    rest, vectors and scalars are "biases", and what has two or more dimensions "matrices".
    """
    groups: dict[str, str] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if is_norm(module):
                group = "norms"
            elif "embedding" in type(module).__name__.lower():
                group = "embeddings"
            else:
                group = "biases" if parameter.ndim <= 1 else "matrices"
            groups[plain(f"{module_name}.{name}" if module_name else name)] = group
    return groups


def select_parameters(model: nn.Module, sam_params: str) -> dict[str, nn.Parameter]:
    """The parameters that `sam_params` names, frozen ones included (they never have a gradient).

    Raises:
        ValueError: no trainable parameter is selected.
    """
    groups = parameter_groups(model)
    if sam_params in ("norms", "matrices"):
        chosen = {name for name, group in groups.items() if group == sam_params}
    elif sam_params == "all":
        chosen = set(groups)
    else:
        chosen = {name for name in groups if re.search(sam_params, name)}
    named = [(plain(name), p) for name, p in model.named_parameters()]
    selected = {name: p for name, p in named if name in chosen}
    if not any(p.requires_grad for p in selected.values()):
        trainable = [name for name, p in named if p.requires_grad]
        raise ValueError(
            f"sam_params={sam_params!r} selects no trainable parameter of {type(model).__name__}. "
            f"Allowed: 'all', 'norms', 'matrices' or a regular expression on parameter names, such "
            f"as {', '.join(trainable[:3]) or '(the model has no trainable parameter)'}."
        )
    return selected


def sparse_parameters(model: nn.Module) -> set[str]:
    """The names of trainable embedding tables whose gradients are sparse tensors."""
    return {
        plain(f"{name}.weight" if name else "weight")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.sparse
        and module.weight.requires_grad
    }

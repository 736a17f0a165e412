"""Selection of the perturbed parameters, and the group of each parameter."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

PARAMETER_GROUPS = ("norms", "biases", "embeddings", "matrices")


def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes of activation checkpointing and compiled regions."""
    return re.sub(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def parameter_groups(model: nn.Module) -> dict[str, str]:
    """The group of each parameter of the model, one of `PARAMETER_GROUPS`, by name.

    Parameters of normalisation layers, recognised by their class and not by parameter names, are
    "norms". Embedding tables, and what an embedding module itself holds (position embeddings, class
    tokens), are "embeddings". Of all others, vectors and scalars are "biases", and parameters with
    two or more dimensions "matrices". A tied weight belongs to its first occurrence.
    """
    groups: dict[str, str] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(module_name, recurse=False))
        kind = type(module).__name__.lower()
        # transformers defines one class per model (LlamaRMSNorm, T5LayerNorm, ...), without a base.
        is_norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)) or (
            "norm" in kind and all(p.ndim <= 1 for p in own.values())
        )
        for name, parameter in own.items():
            if parameter not in seen:
                rest = "biases" if parameter.ndim <= 1 else "matrices"
                group = "norms" if is_norm else "embeddings" if "embedding" in kind else rest
                groups[canonical_name(name)] = group
                seen.add(parameter)
    return groups


def select_parameters(model: nn.Module, sam_params: str) -> dict[str, nn.Parameter]:
    """The parameters that `sam_params` selects, by name; frozen ones included.

    ValueError if no trainable parameter is selected.
    """
    selected = named = {canonical_name(name): p for name, p in model.named_parameters()}
    if sam_params in ("norms", "matrices"):
        groups = parameter_groups(model)
        selected = {name: p for name, p in named.items() if groups.get(name) == sam_params}
    elif sam_params != "all":
        selected = {name: p for name, p in named.items() if re.search(sam_params, name)}
    if not any(p.requires_grad for p in selected.values()):
        trainable = [name for name, p in named.items() if p.requires_grad]
        raise ValueError(
            f"sam_params={sam_params!r} selects no trainable parameter of {type(model).__name__}. "
            f"Allowed: 'all', 'norms', 'matrices' or a regular expression on parameter names, such "
            f"as {', '.join(trainable[:3]) or '(the model has no trainable parameter)'}."
        )
    return selected


def sparse_parameters(model: nn.Module) -> set[str]:
    """Names of the trainable embedding tables with sparse gradients."""
    return {
        canonical_name(f"{name}.weight" if name else "weight")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.sparse
        and module.weight.requires_grad
    }


class TrainedParameters:
    """The parameters of a training run by role: trained, stepped by the optimizer, perturbed.

    Attributes:
        selected: what `sam_params` selects, by name; frozen parameters included.
        trained: parameters of the model that require a gradient and are stepped, by name.
        perturbable: those of them that are selected.
        everything: parameters of the model and of the optimizer (a loss may own some).

    ValueError if nothing trainable is selected, or a selected parameter is complex.
    """

    def __init__(self, model: nn.Module, optimizer: Any, sam_params: str) -> None:
        self.selected = select_parameters(model, sam_params)
        if found := [name for name, p in self.selected.items() if p.is_complex()]:
            raise ValueError(
                f"{', '.join(found)}: complex parameters are not supported. Exclude them with "
                "sam_params, or set sam_rho=0."
            )
        self._model, self._optimizer, self._sam_params = model, optimizer, sam_params
        self._in_model: list[nn.Parameter] = []
        self._key: Any = None
        self.trained: dict[str, Tensor] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Update for parameters frozen, unfrozen or added since; returns whether any were.

        The flags are read one by one, since PyTorch reports no change: 0.1 us per parameter.
        """
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        in_optimizer = [p for group in groups for p in group["params"]]
        stepped = list(map(id, in_optimizer))
        if self._key == ([p.requires_grad for p in self._in_model], stepped):
            return False
        self._in_model = list(self._model.parameters())
        self.selected = select_parameters(self._model, self._sam_params)
        self.groups = parameter_groups(self._model)
        self._key = ([p.requires_grad for p in self._in_model], stepped)
        self.everything = list(dict.fromkeys([*self._in_model, *in_optimizer]))
        ids = set(stepped)
        if not any(id(p) in ids for p in self._in_model):
            ids = {id(p) for p in self._in_model}  # DeepSpeed's optimizers step flat copies
        self.trained.clear()  # in place, since other objects hold this dictionary
        named = [(canonical_name(name), p) for name, p in self._model.named_parameters()]
        self.trained.update((n, p) for n, p in named if p.requires_grad and id(p) in ids)
        self.perturbable = {n: p for n, p in self.trained.items() if n in self.selected}
        return True

    @property
    def count(self) -> int:
        """Number of elements of the model's parameters."""
        return sum(p.numel() for p in self._in_model)

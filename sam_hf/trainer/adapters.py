"""Bi-LoRA's auxiliary pair of LoRA factors in a PEFT model: added, activated, removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..engine.state import always_restore
from ..methods.lora.factors import AUXILIARY, is_auxiliary


def require_lora(model: Any, method: str) -> None:
    """Raise ValueError unless this is a PEFT model with LoRA adapters."""
    configs = getattr(model, "peft_config", None)
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in (configs or {}).values()}
    if not isinstance(configs, dict) or kinds != {"LORA"}:
        what = f"has adapters of the type {', '.join(sorted(kinds))}" if kinds else "has none"
        raise ValueError(
            f"sam_method={method!r} needs a model with LoRA adapters of PEFT, and "
            f"{type(model).__name__} {what}. Allowed: get_peft_model(model, LoraConfig(...)), or "
            "peft_config of TRL's trainers; or another sam_method."
        )


# Options copied from the trained adapter; not those of biases, heads, tokens and DoRA.
_COPIED = """
task_type target_modules target_parameters exclude_modules layers_to_transform layers_pattern
fan_in_fan_out lora_dropout
"""


class AuxiliaryAdapter:
    """A second LoRA adapter of scale 1 (it adds B A to a weight) on the layers of the trained one.

    It is active in training passes only, so that evaluations see the trained adapter alone.
    ValueError if the model has it already or has several, or if adapted layers are not linear.
    """

    def __init__(self, model: Any, rank: int) -> None:
        from peft import PeftModel  # an optional dependency, installed if there is such a model

        if AUXILIARY in model.peft_config:
            raise ValueError(
                f"The model has an adapter named {AUXILIARY!r} already, such as that of another "
                "trainer with sam_method='bilora'. Delete it with "
                f"model.delete_adapter({AUXILIARY!r}), or start from a new model."
            )
        if len(model.peft_config) > 1 or len(model.active_adapters) != 1:
            # A trainer that activates another one (TRL: a reference) would deactivate this one.
            raise ValueError(
                f"sam_method='bilora' needs a model with one adapter, and this one has "
                f"{', '.join(model.peft_config)}. Merge the trained ones "
                "(model.merge_and_unload()), delete the others, or choose another sam_method."
            )
        (trained,) = model.active_adapters
        config = model.peft_config[trained]
        same = {name: copy.deepcopy(getattr(config, name)) for name in _COPIED.split()}
        self._model = model
        self._is_trained = {name: p.requires_grad for name, p in model.named_parameters()}
        # The `add_adapter` of models with a classification head would copy the head.
        PeftModel.add_adapter(model, AUXILIARY, type(config)(r=rank, lora_alpha=rank, **same))
        self._layers = [m for m in model.modules() if AUXILIARY in getattr(m, "lora_A", {})]
        others = [m for m in model.modules() if AUXILIARY in getattr(m, "lora_embedding_A", {})]
        for layer in [*self._layers, *others]:
            base = getattr(layer, "base_layer", layer)
            if not isinstance(base, (nn.Linear, Conv1D)):
                model.delete_adapter(AUXILIARY)
                raise ValueError(
                    "sam_method='bilora' adapts linear layers, and target_modules of the adapter "
                    f"names one of the type {type(base).__name__}. Exclude it, or choose another "
                    "sam_method."
                )
        self.make_trainable()

    def make_trainable(self) -> None:
        """Train it next to the other adapter: loading a checkpoint deactivates it."""
        for name, p in self._model.named_parameters():
            p.requires_grad_(self._is_trained.get(name, is_auxiliary(name)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Activate it for a training pass."""
        before = [(layer, layer._active_adapter) for layer in self._layers]

        def undo() -> None:
            for layer, adapters in before:
                layer._active_adapter = adapters

        with always_restore(undo):
            # `set_adapter` would also change `requires_grad`, which DDP does not allow.
            for layer in self._layers:
                layer._active_adapter = [*layer.active_adapters, AUXILIARY]
            yield

    def is_in(self, model: Any) -> bool:
        return model is self._model and AUXILIARY in model.peft_config

    def remove(self) -> None:
        if self.is_in(self._model):
            self._model.delete_adapter(AUXILIARY)

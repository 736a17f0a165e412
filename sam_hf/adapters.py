"""Bi-LoRA's second pair of LoRA factors in the model: added, switched on and off, dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .methods.factors import AUXILIARY, is_auxiliary
from .side_effects import undoing


def refuse_without_lora(model: Any, method: str) -> None:
    """Raise unless the model is one of PEFT's, with LoRA on linear layers.

    Raises:
        ValueError: with what was found, and what is allowed.
    """
    configs = getattr(model, "peft_config", None)
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in (configs or {}).values()}
    if not isinstance(configs, dict) or kinds != {"LORA"}:
        what = f"has adapters of the type {', '.join(sorted(kinds))}" if kinds else "has none"
        raise ValueError(
            f"sam_method={method!r} needs a model with LoRA adapters of PEFT, and "
            f"{type(model).__name__} {what}. Allowed: get_peft_model(model, LoraConfig(...)), or "
            "peft_config of TRL's trainers; or another sam_method."
        )


class AuxiliaryAdapter:
    """A LoRA adapter beside the one that is trained, on the same layers.

    Between training passes it is switched off, so that evaluations see the trained adapter alone.

    Args:
        model: a `PeftModel` with LoRA adapters.
        rank: of the new one. Its scale is 1: what it adds to a weight is B A.

    Raises:
        ValueError: the model has it already, has others, or adapts layers that are not linear.
    """

    def __init__(self, model: Any, rank: int) -> None:
        from peft import PeftModel  # an extra, which is there with such a model

        if AUXILIARY in model.peft_config:
            raise ValueError(
                f"The model has an adapter named {AUXILIARY!r} already, as one has that another "
                "trainer made for sam_method='bilora'. Delete it with "
                f"model.delete_adapter({AUXILIARY!r}), or begin with a new model."
            )
        if len(model.peft_config) > 1 or len(model.active_adapters) != 1:
            # A trainer that switches to another one, as TRL's do to a reference, switches this off.
            raise ValueError(
                f"sam_method='bilora' needs a model with one adapter, and this one has "
                f"{', '.join(model.peft_config)}. Merge those that are trained already "
                "(model.merge_and_unload()), delete the others, or take another sam_method."
            )
        (trained,) = model.active_adapters
        # On the same layers, and in nothing else like the other: no biases, heads, tokens, DoRA.
        names = (
            "task_type",
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "fan_in_fan_out",
            "lora_dropout",
        )
        config = model.peft_config[trained]
        same = {name: copy.deepcopy(getattr(config, name)) for name in names}
        options = type(config)(r=rank, lora_alpha=rank, **same)
        self._model = model
        self._is_trained = {name: p.requires_grad for name, p in model.named_parameters()}
        # The `add_adapter` of models with a classification head would copy the head.
        PeftModel.add_adapter(model, AUXILIARY, options)
        self._layers = [m for m in model.modules() if AUXILIARY in getattr(m, "lora_A", {})]
        others = [m for m in model.modules() if AUXILIARY in getattr(m, "lora_embedding_A", {})]
        for layer in [*self._layers, *others]:
            if not isinstance(getattr(layer, "base_layer", None), (nn.Linear, Conv1D)):
                kind = type(getattr(layer, "base_layer", layer)).__name__
                model.delete_adapter(AUXILIARY)
                raise ValueError(
                    f"sam_method='bilora' adapts linear layers, and target_modules of the adapter "
                    f"names one of the type {kind}. Leave it out, or take another sam_method."
                )
        self.make_trainable()

    def make_trainable(self) -> None:
        """Let it be trained beside the other one: loading a checkpoint makes it inactive."""
        for name, p in self._model.named_parameters():
            p.requires_grad_(self._is_trained.get(name, is_auxiliary(name)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around a training pass."""
        before = [(layer, layer._active_adapter) for layer in self._layers]

        def undo() -> None:
            for layer, adapters in before:
                layer._active_adapter = adapters

        with undoing(undo):
            # `set_adapter` would switch `requires_grad` too, under the eyes of DDP.
            for layer, adapters in before:
                trained = [adapters] if isinstance(adapters, str) else list(adapters)
                layer._active_adapter = [*trained, AUXILIARY]
            yield

    def is_in(self, model: Any) -> bool:
        """Whether it is there, in this model."""
        return model is self._model and AUXILIARY in model.peft_config

    def remove(self) -> None:
        """Drop it. A second call does nothing."""
        if self.is_in(self._model):
            self._model.delete_adapter(AUXILIARY)

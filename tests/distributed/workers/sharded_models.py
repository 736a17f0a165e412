"""Tiny models that `from_pretrained` can shard. Everything is float64."""

from __future__ import annotations

from typing import Any

import torch
from tiny import CLASSES, FEATURES, VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel


class TinyConfig(PreTrainedConfig):
    model_type = "tiny"


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    main_input_name = "x"

    def _init_weights(self, module: nn.Module) -> None:
        pass  # those of torch

    def get_input_embeddings(self) -> nn.Module | None:
        return getattr(self, "embedding", None)


class ShardedClassifier(TinyModel):
    """`tiny.Classifier`. No size of it can be divided by the number of processes."""

    _no_split_modules = ("Linear",)
    base_model_fsdp_plan = {"first": "free_full_weight", "second": "keep_full_weight"}  # noqa: RUF012
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first = nn.Linear(FEATURES, 7, dtype=torch.float64)
        self.layer_norm = nn.LayerNorm(7, dtype=torch.float64)
        self.second = nn.Linear(7, CLASSES, dtype=torch.float64)
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x.to(self.second.weight.dtype)
        logits = self.second(torch.tanh(self.layer_norm(self.first(x)))).double()
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class SeldomClassifier(ShardedClassifier):
    """Has a parameter that only some batches use: those whose first number is positive."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(x * self.extra if x[0, 0] > 0 else x, labels)


class TiedLanguageModel(TinyModel):
    """An embedding that is the head too. The loss is the mean over the tokens of the update."""

    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _no_split_modules = ("Linear",)
    base_model_fsdp_plan = {"middle": "free_full_weight"}  # noqa: RUF012
    main_input_name = "input_ids"
    accepts_loss_kwargs = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.middle = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, VOCABULARY, bias=False, dtype=torch.float64)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None
    ) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.middle(self.embedding(input_ids))))
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}

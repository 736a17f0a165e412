"""Tiny models, data and trainers that the tests share. Everything is float64 unless it says so."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from sam_hf import SAMConfig, SAMTrainer

_FOLDER = tempfile.TemporaryDirectory()  # removed at the end

FEATURES, CLASSES, VOCABULARY = 5, 3, 11


class Rows(Dataset):
    """A data set made of a list of rows."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


class Classifier(nn.Module):
    """Two layers with a norm between them. The loss is the mean over the examples."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7, dtype=dtype)
        self.layer_norm = nn.LayerNorm(7, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(7, CLASSES, dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.tanh(self.layer_norm(self.first(x)))
        logits = self.second(self.dropout(hidden))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class LanguageModel(nn.Module):
    """An embedding and a head. The loss is the mean over the tokens that are not -100."""

    accepts_loss_kwargs = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.head = nn.Linear(6, VOCABULARY, dtype=torch.float64)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None
    ) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}


def examples(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Rows:
    """Rows of `x` (5 numbers) and a label out of 3."""
    g = torch.Generator().manual_seed(seed)
    return Rows(
        [
            {
                "x": torch.randn(FEATURES, generator=g, dtype=torch.float64).to(dtype),
                "labels": torch.randint(CLASSES, (), generator=g),
            }
            for _ in range(n)
        ]
    )


def sentences(n: int, length: int = 6, seed: int = 0) -> Rows:
    """Token rows with 1 to `length` labels that count, the others -100."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        labels = torch.randint(VOCABULARY, (length,), generator=g)
        labels[int(torch.randint(1, length + 1, (), generator=g)) :] = -100
        rows.append(
            {"input_ids": torch.randint(VOCABULARY, (length,), generator=g), "labels": labels}
        )
    return Rows(rows)


OPTIONS = TrainingArguments.__dataclass_fields__
# transformers < 5.2 can only draw examples at random: conftest.py lets it take them in order.
HAS_SAMPLING = "train_sampling_strategy" in OPTIONS
# Older versions of transformers use the second name.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in OPTIONS
)


def arguments(args_class: type = TrainingArguments, **kwargs: Any) -> Any:
    """Plain SGD, no schedule, no clipping, no shuffling, nothing saved; change what you need."""
    defaults = {
        "output_dir": tempfile.mkdtemp(dir=_FOLDER.name),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    given = defaults | kwargs
    if not HAS_SAMPLING:
        del given["train_sampling_strategy"]
    return args_class(**given)


def sam_trainer(
    model: nn.Module,
    data: Dataset,
    trainer_class: type = SAMTrainer,
    trainer_kwargs: dict[str, Any] | None = None,
    sam: SAMConfig | dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    """A `SAMTrainer` (or `trainer_class`) on `arguments(**args)` with `SAMConfig(**sam)`."""
    kwargs = dict(trainer_kwargs or {})
    if hasattr(trainer_class, "sam_config"):
        kwargs["sam_config"] = sam if isinstance(sam, SAMConfig) else SAMConfig(**(sam or {}))
    return trainer_class(model=model, args=arguments(**args), train_dataset=data, **kwargs)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs"


class Spy(TrainerCallback):
    """Copies the weights after every update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.weights.append(weights(model))

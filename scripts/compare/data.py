"""What every task of `compare_methods.py` has: its data, and the labels of each level and seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from common.classification import ClassificationData
from common.labeled_data import add_symmetric_noise, hold_out
from common.script_utils import InputError
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, set_seed

VALIDATION_SHARE = 0.2  # of the training examples, with their right labels, to choose rho by
TUNING_SEEDS = (100, 101, 102)


@dataclass(frozen=True)
class Level:
    """How good the training data are.

    Args:
        noise: the share of wrong labels, or the labels that people gave.
        fraction: the share of the training examples that there are.
    """

    noise: float | np.ndarray
    fraction: float = 1.0


@dataclass
class Task(ABC):
    """One task of the comparison.

    Args:
        data: both sets with their right labels.
        new_model: makes a model, from the global random state what is not pretrained.
        training: options of `TrainingArguments`.
        levels: by name.
        metric: what the table shows, a key of the record of a run.
        processing_class: the Trainer's.
        eval_batch: how many examples are scored at a time.
        settings: all that the results depend on, apart from recipe, level and seed.
    """

    data: ClassificationData
    new_model: Callable[[], PreTrainedModel]
    training: dict[str, Any]
    levels: dict[str, Level]
    metric: str = "accuracy"
    processing_class: Any = None
    eval_batch: int = 512
    settings: dict[str, Any] = field(default_factory=dict)

    tuning_noise: ClassVar[float] = 0.4
    """The share of wrong labels that rho is searched at."""

    def model(self, seed: int) -> PreTrainedModel:
        """The same initial weights for the same seed."""
        set_seed(seed)
        return self.new_model()

    def sets(self, level: str, seed: int, is_tuning: bool) -> tuple[Dataset, Dataset]:
        """The training examples with the labels of this level and seed, and what is scored.

        While rho is tuned, that is a part of the training examples, with their right labels. The
        test examples have no say in it. The seed draws those that are kept, with equal shares of
        each class, and of these the ones with wrong labels.
        """
        train, scored, part = self._tuning_sets if is_tuning else self._final_sets
        return self._at_level(train, part, level, seed), scored

    def plain_examples(self, level: str, seed: int) -> Dataset:
        """The training examples of a final model, with the labels it saw, and not augmented."""
        _, _, part = self._final_sets
        return self._at_level(self._unaugmented, part, level, seed)

    def _at_level(self, train: Dataset, part: np.ndarray, name: str, seed: int) -> Dataset:
        level = self.levels[name]
        right = self.labels(self.data.train)[part]
        kept = np.arange(len(part))
        if level.fraction < 1:
            kept = self._draw(right, level.fraction, seed)
        labels = right.copy()
        if isinstance(level.noise, float):
            classes = len(self.data.class_names)
            labels[kept] = add_symmetric_noise(right[kept], classes, level.noise, seed)
        else:
            labels = level.noise[part]
        relabeled = self.relabel(train, labels)
        return relabeled if len(kept) == len(part) else Subset(relabeled, kept.tolist())

    @staticmethod
    def _draw(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
        everything = np.arange(len(labels))
        try:
            drawn, _ = train_test_split(
                everything, train_size=fraction, stratify=labels, random_state=seed
            )
        except ValueError as error:  # a class with one example, or fewer examples than classes
            raise InputError(f"--train_fraction {fraction} cannot be drawn: {error}") from error
        return np.sort(drawn)

    @cached_property
    def _final_sets(self) -> tuple[Dataset, Dataset, np.ndarray]:
        everything = np.arange(len(self.data.train))
        return self.prepare(self.data.train, True), self.prepare(self.data.test), everything

    @cached_property
    def _tuning_sets(self) -> tuple[Dataset, Dataset, np.ndarray]:
        train = self.data.train
        what = f"--tune: a part of the training {self.data.examples}"
        part, rest = hold_out(len(train), VALIDATION_SHARE, what, self.labels(train))
        return (
            self.prepare(self.take(train, part), True),
            self.prepare(self.take(train, rest)),
            part,
        )

    @cached_property
    def _unaugmented(self) -> Dataset:
        return self.prepare(self.data.train)

    def corrupted_sets(self) -> dict[str, Dataset]:
        """The test examples, damaged in several ways; nothing where that is not defined."""
        return {}

    @abstractmethod
    def labels(self, examples: Any) -> np.ndarray:
        """The class numbers of one of the data's sets."""

    @abstractmethod
    def take(self, examples: Any, indices: np.ndarray) -> Any:
        """Some of them."""

    @abstractmethod
    def prepare(self, examples: Any, is_training: bool = False) -> Dataset:
        """Them as the model takes them."""

    @abstractmethod
    def relabel(self, prepared: Any, labels: np.ndarray) -> Dataset:
        """The same with other labels; what was prepared is shared by all levels and seeds."""


def hash_of(*arrays: np.ndarray) -> str:
    """Tells labels apart, in their order, on every machine."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{len(array)}:{','.join(map(str, array.tolist()))};".encode())
    return digest.hexdigest()[:16]


def noise_levels(options: Any, usual: Sequence[float], tuning: float) -> dict[str, Level]:
    """Those of --label_noise at each --train_fraction; `tuning` alone while rho is tuned."""
    chosen = usual if options.label_noise is None else options.label_noise
    noises = {f"{noise:g}": float(noise) for noise in ([tuning] if options.tune else chosen)}
    return at_fractions(noises, options)


def at_fractions(noises: dict[str, Any], options: Any) -> dict[str, Level]:
    """Each kind of labels at each --train_fraction. `in_words` reads the names."""
    return {
        name if fraction == 1 else f"{name} at {fraction:g}": Level(noise, fraction)
        for fraction in options.train_fraction
        for name, noise in noises.items()
    }

"""What the image and the text classification script share: their data and their course."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from common.experiment import publish, show_results, train_and_compare
from common.labeled_data import add_symmetric_noise
from common.rho_search import VALIDATION_SHARE, search_rho
from common.shared_arguments import LabelArguments, ModelArguments
from common.training_utils import Run
from transformers import PreTrainedModel, Trainer


@dataclass
class ClassificationData(ABC):
    """A training and an evaluation set with the same classes."""

    name: str
    train: Any
    test: Any
    class_names: list[str]
    noise: str = ""  # in words
    labels_changed: int = 0
    metrics: tuple[str, ...] = ("accuracy",)  # the first is what counts

    examples = "examples"

    @property
    def title(self) -> str:
        return f"{self.name}, {self.noise}" if self.noise else self.name

    def describe(self) -> str:
        changed = f"; {self.labels_changed} training labels are wrong" if self.noise else ""
        return (
            f"{self.title}: {len(self.train)} training and {len(self.test)} test {self.examples}, "
            f"{self.kind()}{changed}"
        )

    def kind(self) -> str:
        return f"{len(self.class_names)} classes"

    @abstractmethod
    def divide(self, fraction: float, what: str) -> list[Any]:
        """The training set in two parts, the second with this fraction of the examples.

        Args:
            what: the name of the second part in the error, with the option that asks for it.
        """

    def noisy(self, labels: np.ndarray, args: LabelArguments) -> np.ndarray:
        """The training labels with the noise that the options ask for, of which it keeps note."""
        seed = args.label_noise_seed or 0
        noisy = add_symmetric_noise(labels, len(self.class_names), args.label_noise, seed)
        self.noise = f"{100 * args.label_noise:g}% label noise" if args.label_noise else ""
        self.labels_changed = int((noisy != labels).sum())
        return noisy


def run_classification(
    trainer_on: Callable[[Any, Any], Callable[..., Trainer]],
    model: PreTrainedModel,
    data: ClassificationData,
    data_args: LabelArguments,
    model_args: ModelArguments,
    training_args: Any,
    resume_from: str | None,
    task: str,
    saved: str,
) -> list[Run]:
    """Search for rho if asked, train, compare, save the results, write the card, push if asked.

    Args:
        trainer_on: makes, of a training and an evaluation set, what makes the trainer.
        task: the Hub's name for what the model does.
        saved: what is saved, in words.
    """
    if training_args.process_index == 0:
        print(data.describe())
    if training_args.search_rho:
        parts = data.divide(VALIDATION_SHARE, "--search_rho: a part of the training data")
        build = trainer_on(*parts)
        training_args.sam_rho = search_rho(build, model, training_args, data.metrics[0])
    build = trainer_on(data.train, data.test)
    details = {
        "data": data.describe(),
        "data_arguments": asdict(data_args),
        "model_arguments": asdict(model_args),
    }
    trainer, runs = train_and_compare(
        build, model, training_args, resume_from, data.metrics, details=details
    )
    show_results(trainer, runs, data.title, saved)
    card = {
        "tasks": task,
        "tags": [task, "sam_hf"],
        "dataset": data.title,
        "dataset_tags": data_args.hub_dataset,
    }
    publish(trainer, card)
    return runs

"""The tasks of `compare_methods.py`: data, model, schedule, labels of each level and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
import train_image_classification as images
import train_text_classification as texts
from common.cli import InputError
from common.data import add_symmetric_noise, draw, load_files, require_column
from compare.arguments import OF_FILES, VALIDATION_SHARE
from compare.corruptions import CORRUPTIONS, corrupt
from compare.forecasting import ForecastingOptions, ForecastingTask
from compare.measures import SHARPNESS
from sklearn.model_selection import train_test_split
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

CORRUPTED_IMAGES = 2000  # at most, of the test images
VIT = {"num_attention_heads": 4, "intermediate_size": 256}
DIGITS_VIT = {"patch_size": 4, "hidden_size": 64, "num_hidden_layers": 2, **VIT}
CIFAR10_VIT = {"hidden_size": 128, "num_hidden_layers": 4, **VIT}
COSINE = {"per_device_train_batch_size": 128, "lr_scheduler_type": "cosine"}
DIGITS_ADAMW = {"num_train_epochs": 64, "learning_rate": 2e-3, "weight_decay": 0.05, **COSINE}
CIFAR10_ADAMW = {"num_train_epochs": 30, "learning_rate": 1e-3, "weight_decay": 0.05, **COSINE}
CIFAR10_ADAMW |= {"warmup_steps": 0.1}  # of all
CIFAR10_SGD = {"num_train_epochs": 30, "learning_rate": 0.1, "weight_decay": 5e-4, **COSINE}
CIFAR10_SGD |= {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"}
CIFAR10_SGD |= {"max_grad_norm": 0.0}  # as in the papers: BatchNorm keeps the steps in bounds
TEXTS_ADAMW = {"per_device_train_batch_size": 32, "learning_rate": 5e-5, "weight_decay": 0.01}
TEXTS_ADAMW |= {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
# Tokens: somewhat above the longest text, or for long pairs, above nearly all of them.
MAX_LENGTHS = {"trec6": 64, "cola": 64, "rte": 256, "sst2": 80}
NOISES = {"digits": (0.0, 0.2, 0.4, 0.6), "cifar10": (0.0, 0.4)}  # for texts 0 and 0.2
Level = tuple[float | np.ndarray, float]  # label noise or human labels, and the share of the data


class Relabeled(torch.utils.data.Dataset):
    """Some of the examples of a prepared set, with these labels."""

    def __init__(self, examples: Any, indices: np.ndarray, labels: np.ndarray) -> None:
        self.examples, self.indices, self.labels = examples, indices, labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[int(self.indices[index])]
        return {**example, "labels": int(self.labels[index])}


@dataclass
class Task:
    """One task of the comparison.

    Args:
        train, test: all examples with their right labels, in the column `labels`.
        prepare: examples as the model takes them; augmented if the second argument is True.
        processor: image processor or tokenizer.
        training: options of `TrainingArguments`.
        settings: all that the results depend on, except for recipe, level and seed.
        human_labels: by column of the file.
        metric: what the tables show, a key of a run's record.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    classes: Sequence[str]
    prepare: Callable[[datasets.Dataset, bool], Any]
    processor: Any
    new_model: Callable[[], PreTrainedModel]
    training: dict[str, Any]
    settings: dict[str, Any]
    human_labels: dict[str, np.ndarray] = field(default_factory=dict)
    levels: dict[str, Level] = field(default_factory=dict)
    metric: str = "accuracy"
    eval_batch: int = 512
    lower_is_better = has_prefixes = False
    shifted_key = "corrupted_accuracy"
    trainer_options: ClassVar[dict[str, Any]] = {}  # in addition to those of every task

    @property
    def measures(self) -> tuple[str, ...]:
        """What is recorded of each final model, keys of what the trainer's evaluation returns."""
        return "accuracy", self.metric, "ece", "nll"

    @property
    def kind(self) -> str:
        return "images" if hasattr(self.processor, "image_mean") else "texts"

    @cached_property
    def right_labels(self) -> np.ndarray:
        return np.array(self.train["labels"])

    def model(self, seed: int, level: str) -> PreTrainedModel:
        """The same initial weights for the same seed."""
        set_seed(seed)
        return self.new_model()

    def sets(self, level: str, seed: int, is_tuning: bool) -> tuple[Relabeled, Any]:
        """The training examples with the labels of this level and seed, and what is scored.

        While rho is tuned, a part of the training examples is scored, with right labels, and the
        test examples are not used. The seed draws the training examples, stratified by class, and
        of these the ones with wrong labels.
        """
        train, scored, part = self._tuning_sets if is_tuning else self._final_sets
        return self._at_level(train, part, level, seed), scored

    def plain_examples(self, level: str, seed: int) -> Relabeled:
        """The training examples of a final model with the labels it saw, not augmented."""
        return self._at_level(self._unaugmented, np.arange(len(self.train)), level, seed)

    def _at_level(self, examples: Any, part: np.ndarray, name: str, seed: int) -> Relabeled:
        noise, fraction = self.levels[name]
        right, kept = self.right_labels[part], np.arange(len(part))
        if fraction < 1:
            what = f"--train_fraction {fraction}"
            kept = np.sort(_split(right, what, seed, train_size=fraction)[0])
        if isinstance(noise, float):
            labels = add_symmetric_noise(right[kept], len(self.classes), noise, seed)
        else:
            labels = noise[part][kept]
        return Relabeled(examples, kept, labels)

    @cached_property
    def _final_sets(self) -> tuple[Any, Any, np.ndarray]:
        everything = np.arange(len(self.train))
        return self.prepare(self.train, True), self.prepare(self.test, False), everything

    @cached_property
    def _tuning_sets(self) -> tuple[Any, Any, np.ndarray]:
        part, rest = _split(self.right_labels, "--tune: a set", 0, test_size=VALIDATION_SHARE)
        train, scored = (self.train.select(indices) for indices in (part, rest))
        return self.prepare(train, True), self.prepare(scored, False), part

    @cached_property
    def _unaugmented(self) -> Any:
        return self.prepare(self.train, False)

    def curve_sets(self, level: str) -> dict[str, Any]:
        """What is scored after each epoch: nothing."""
        return {}

    def shifted_sets(self, level: str) -> dict[str, list[dict[str, Any]]]:
        """Corrupted test images; for texts, nothing."""
        if self.kind == "texts":
            return {}
        scored = self._final_sets[1]
        examples = [scored[int(i)] for i in draw(len(scored), CORRUPTED_IMAGES)]
        both = self.processor.image_mean, self.processor.image_std
        mean, std = (torch.tensor(values)[:, None, None] for values in both)
        pixels = torch.stack([example["pixel_values"] for example in examples])
        pixels = (pixels * std + mean).clamp(0, 1)  # as they were before they were normalised
        found = {}
        for kind, severities in CORRUPTIONS.items():
            for severity in severities:
                corrupted = (corrupt(pixels, kind, severity) - mean) / std
                pairs = zip(examples, corrupted, strict=True)
                found[f"{kind} {severity:g}"] = [{**x, "pixel_values": image} for x, image in pairs]
        return found


def _split(labels: np.ndarray, what: str, seed: int, **size: float) -> list[np.ndarray]:
    """Indices of two parts, stratified by class."""
    everything = np.arange(len(labels))
    try:
        return train_test_split(everything, stratify=labels, random_state=seed, **size)
    except ValueError as error:  # a class with one example, or fewer examples than classes
        raise InputError(f"{what} cannot be drawn: {error}") from error


def build_task(options: Any) -> Task | ForecastingTask:
    """The task that --task names; an InputError if its files are missing or do not match."""
    if options.task == "forecasting":
        return ForecastingTask(_forecasting(options))
    task = {"digits": _digits, "cifar10": _cifar10}.get(options.task, _texts)(options)
    for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate"):
        if getattr(options, name) is not None:
            task.training[name] = getattr(options, name)
    task.levels = _levels(task, options)
    kind, examples = task.kind, len(task.train)
    batch, fraction = task.training["per_device_train_batch_size"], min(options.train_fraction)
    if batch > int(int((1 - VALIDATION_SHARE) * examples) * fraction):
        raise InputError(
            f"--per_device_train_batch_size {batch} is more than --train_fraction {fraction:g} of "
            f"the {examples} training {kind}, or than what --tune trains on: choose less"
        )
    task.settings |= {"task": options.task, "training": task.training}
    task.settings |= {f"training_{kind}": examples, f"test_{kind}": len(task.test)}
    # What else may differ with the same options: other files, and how the device rounds.
    task.settings["labels"] = _hash(task.right_labels, np.array(task.test["labels"]))
    others = {
        "bf16": options.bf16,
        "device": "" if options.use_cpu else "gpu",
        "metric": "" if task.metric == "accuracy" else task.metric,
        "sharpness": SHARPNESS if options.sharpness else {},
    }
    task.settings |= {name: value for name, value in others.items() if value}
    return task


def _levels(task: Task, options: Any) -> dict[str, Level]:
    """Each kind of labels with each --train_fraction; `in_words` reads the names."""
    usual, tuned = NOISES.get(options.task, (0.0, 0.2)), 0.4 if task.kind == "images" else 0.2
    kinds: dict[str, float | np.ndarray] = dict(task.human_labels)
    if not kinds or options.label_noise is not None:
        chosen = usual if options.label_noise is None else options.label_noise
        noises = [tuned] if options.tune else chosen
        kinds = {f"{noise:g}": float(noise) for noise in noises} | kinds
    return {
        name if fraction == 1 else f"{name} at {fraction:g}": (labels, fraction)
        for fraction in options.train_fraction
        for name, labels in kinds.items()
    }


def _hash(*arrays: np.ndarray) -> str:
    """Identifies labels and their order, on every machine."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{len(array)}:{','.join(map(str, array.tolist()))};".encode())
    return digest.hexdigest()[:16]


def _image_task(data: Any, model: str, sizes: dict[str, int], augment: bool, **parts: Any) -> Task:
    train, _, classes = data
    overrides = ",".join(f"{name}={size}" for name, size in sizes.items())
    arguments = images.ModelArguments(config_overrides=overrides, model_type=model)

    def build() -> tuple[PreTrainedModel, Any]:
        return images.build_model(arguments, classes, train[0]["image"].size)

    def prepare(examples: datasets.Dataset, is_training: bool) -> images.ImageTensors:
        return images.ImageTensors(examples, processor, "RGB", augment and is_training)

    processor = build()[1]
    return Task(*data, prepare, processor, lambda: build()[0], **parts)


def _digits(options: Any) -> Task:
    """scikit-learn's digits and a small ViT."""
    # Half of the images are for the test, whose score then has a standard error of about 1 %.
    arguments = images.DataArguments(eval_fraction=0.5, max_train_samples=options.max_train_samples)
    _, *data = images.load_data(arguments)
    settings = {"model": {"vit": DIGITS_VIT}}
    training = dict(DIGITS_ADAMW)
    return _image_task(data, "vit", DIGITS_VIT, False, training=training, settings=settings)


def _cifar10(options: Any) -> Task:
    """CIFAR-10 in files, and a Wide-ResNet or a small ViT."""
    files = {name: getattr(options, name) for name in OF_FILES}
    arguments = images.DataArguments(image_column="img", **files)
    _, train, test, classes = images.load_data(arguments)
    kept, human = draw(len(train), options.max_train_samples), {}
    settings: dict[str, Any] = {} if options.augment else {"augment": False}
    if options.labels_file is not None:
        human, settings["labels_file"] = _human_labels(options, np.array(train["labels"]), classes)
    if options.model == "vit":
        model, training = "vit", CIFAR10_ADAMW
        sizes = recorded = {"patch_size": options.patch_size, **CIFAR10_VIT}
    else:
        model, training = "wide_resnet", CIFAR10_SGD
        sizes = {"depth": options.depth, "width": options.width}
        recorded = {**sizes, "dropout": 0.0}
    return _image_task(
        *((train.select(kept), test, classes), model, sizes, options.augment),
        training=dict(training),
        human_labels={name: labels[kept] for name, labels in human.items()},
        settings={**settings, "model": {model: recorded}},
    )


def _human_labels(
    options: Any, right: np.ndarray, classes: Sequence[str]
) -> tuple[dict[str, np.ndarray], str]:
    """The class numbers in each --label_column, one for each training image; a hash of the file."""
    file = f"--labels_file {options.labels_file!r}"
    table = load_files("labels_file", [options.labels_file])
    if len(table) != len(right):
        raise InputError(f"{file} has {len(table)} rows for {len(right)} training images")
    numbers = {name: i for i, name in enumerate(classes)} | {i: i for i in range(len(classes))}

    def column(name: str) -> np.ndarray:
        require_column(table, "label_column", name)
        feature, labels = table.features[name], table[name][:]
        labels = feature.int2str(labels) if isinstance(feature, datasets.ClassLabel) else labels
        unknown = set(labels) - numbers.keys()
        if unknown:
            raise InputError(f"{file}: {name} has labels that are not classes: {unknown}")
        return np.array([numbers[label] for label in labels])

    if "clean_label" in table.column_names and (column("clean_label") != right).any():
        raise InputError(f"{file}: clean_label differs from --train_file: another order of rows")
    identity = _hash(*(np.array(table[name]) for name in sorted(table.column_names)))
    return {name: column(name) for name in options.label_column}, identity


def _forecasting(options: Any) -> ForecastingOptions:
    """The options of a series, from those that `compare_methods.py` has for every task."""
    own = "model config_overrides num_train_epochs per_device_train_batch_size learning_rate"
    given = {name: getattr(options, name) for name in own.split()}
    shared = {f.name for f in fields(ForecastingOptions)} - {"arguments"}
    return ForecastingOptions(
        arguments={name: value for name, value in given.items() if value is not None},
        **{name: getattr(options, name) for name in shared},
    )


def _texts(options: Any) -> Task:
    """TREC-6 or a task of GLUE, and the pretrained --model_name_or_path."""
    is_glue = options.task != "trec6"
    columns = {"task_name": options.task} if is_glue else {"text_column": "sentence"}
    files = {name: getattr(options, name) for name in (*OF_FILES, "max_train_samples")}
    _, train, test, classes = texts.load_data(texts.DataArguments(**files, **columns))
    max_length = options.max_length or MAX_LENGTHS[options.task]
    pretrained = texts.ModelArguments(options.model_name_or_path, ignore_mismatched_sizes=True)

    def build() -> tuple[PreTrainedModel, Any]:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the head is new on purpose
        try:
            return texts.build_model(pretrained, classes, train, max_length)
        finally:
            logging.set_verbosity(verbosity)

    def prepare(examples: datasets.Dataset, is_training: bool) -> list[dict[str, Any]]:
        return texts.encode(examples, tokenizer, max_length).to_list()

    model, tokenizer = build()
    identity = {"pretrained": _identity(options.model_name_or_path, model)}
    return Task(
        *(train, test, classes, prepare, tokenizer, lambda: build()[0]),
        training={"num_train_epochs": 3 if options.task == "sst2" else 5, **TEXTS_ADAMW},
        settings={"model": identity, "max_length": max_length},
        metric="matthews_correlation" if options.task == "cola" else "accuracy",
        eval_batch=64,
    )


def _identity(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Identifies pretrained weights, wherever they are."""
    weights = hashlib.sha256()
    for key, weight in sorted(model.base_model.state_dict().items()):
        weights.update(key.encode() + weight.numpy().tobytes())
    name = "/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name
    sha256 = weights.hexdigest()[:16]
    return {"name": name, "parameters": model.num_parameters(), "sha256": sha256}

"""The options of the text classification script."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.script_utils import closest
from common.shared_arguments import (
    ClassifierArguments,
    LabelArguments,
    SearchArguments,
    output_dir_field,
)

from sam_hf import SAMTrainingArguments

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Task:
    """A task of GLUE: its columns of text, and its metrics, of which the first counts."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    eval_split: str = "validation"


TASKS = {
    "cola": Task(("sentence",), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), eval_split="validation_matched"),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), ("f1", "accuracy")),
    "rte": Task(("sentence1", "sentence2")),
    "sst2": Task(("sentence",)),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman")),
    "wnli": Task(("sentence1", "sentence2")),
}


@dataclass
class DataArguments(LabelArguments):
    """Which texts, from where. With no source at all: docstrings of the standard library."""

    _built_in = "the built-in docstrings"
    _columns = ("text_column", "text_pair_column", "label_column", "problem_type")

    task_name: str | None = field(
        default=None,
        metadata={
            "help": f"GLUE task, which sets columns and metric: {', '.join(TASKS)}. From the Hub "
            "(nyu-mll/glue), or from --train_file and --validation_file."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Text data set on the Hub, such as stanfordnlp/imdb. Without --task_name, "
            "--dataset_name and --train_file: docstrings of Python's standard library, to be "
            "classified by the part of the library that they come from."
        },
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Local csv, json, jsonl or parquet files with the training examples."},
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "Local csv, json, jsonl or parquet files with the evaluation examples."},
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column with the texts. If not given, the only one that holds text."},
    )
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column with the second texts, if the examples are pairs."}
    )
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(PROBLEM_TYPES)}. If not given, by the label column: lists of "
            "classes are several labels, floats are regression, all else is one label."
        },
    )
    max_length: int = field(
        default=128, metadata={"help": "Longer texts, or pairs, are cut to this many tokens."}
    )

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self._apply_task()
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"--problem_type {self.problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}"
            )
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError("--text_pair_column needs --text_column: the first text of each pair")
        if self.text_pair_column is not None and self.text_pair_column == self.text_column:
            raise ValueError(f"--text_pair_column {self.text_column!r} is --text_column too")
        if self.max_length < 8:
            raise ValueError(f"--max_length must be 8 or more, got {self.max_length}")
        super().__post_init__()

    def _apply_task(self) -> None:
        if self.task_name not in TASKS:
            raise ValueError(
                f"--task_name {self.task_name!r} is not a task of GLUE"
                f"{closest(self.task_name, TASKS)}; the tasks: {', '.join(TASKS)}"
            )
        for name in (*self._columns[:2], "problem_type", "dataset_name", "dataset_config_name"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} has no effect with --task_name, which sets it")
        task = TASKS[self.task_name]
        self.text_column, self.text_pair_column = (*task.columns, None)[:2]
        is_regression = "pearson" in task.metrics
        self.problem_type = PROBLEM_TYPES[2 if is_regression else 0]
        if self.train_file is None:
            self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name
            self.eval_split = self.eval_split or task.eval_split


@dataclass
class ModelArguments(ClassifierArguments):
    """Which model: a pretrained one, or a small BERT and its tokenizer, both made on the spot."""

    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens (byte-level BPE) of the untrained model's tokenizer, which is made "
            "from the training texts: at least 260, 4000 if not given."
        },
    )

    _sizes = (*ClassifierArguments._sizes, "vocab_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is not None and self.vocab_size < 260:
            raise ValueError(f"--vocab_size must be 260 (all bytes) or more, got {self.vocab_size}")


@dataclass
class TrainArguments(SearchArguments, SAMTrainingArguments):
    """The Trainer's options with those of SAM, the comparison and the search."""

    output_dir: str = output_dir_field("outputs/text_classification", "tokenizer")

"""The data of the language-model scripts: texts, conversations, and the built-in reference."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import datasets
from common.labeled_data import BUILDERS, draw, hold_out, load_files, load_sets
from common.script_utils import InputError, closest
from common.shared_arguments import SourceArguments
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

KINDS = {".txt": "text", **BUILDERS}
# What TRL trains on beside a column of texts, and what it takes along where it is there.
FORMATS = (("messages",), ("prompt", "completion"))
EXTRAS = ("tools", "chat_template_kwargs")
EOS, PAD = "<|endoftext|>", "<|padding|>"
# A topic that has less text of its own is the heading of sections that stand in another one.
SHORTEST_TOPIC = 300


@dataclass
class DataArguments(SourceArguments):
    """Which texts, from where. With no source at all: the language reference of Python."""

    _built_in = "the built-in language reference"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set on the Hub with a column of texts (--dataset_text_field), or "
            "messages, or prompt and completion. Without --dataset_name and --train_file: the "
            "language reference that ships inside Python."
        },
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Local files with the training texts ({', '.join(KINDS)}); in .txt files, a "
            "blank line ends an example."
        },
    )


def load_source(
    args: SourceArguments, name: str, built_in: Callable[[], datasets.Dataset]
) -> tuple[str, datasets.Dataset, datasets.Dataset]:
    """The source's name, its training and its evaluation examples.

    Args:
        name, built_in: what there is where the options name no source.

    Raises:
        InputError: there is no such source, or one of the two has no examples.
    """
    if args.source is None:
        train, test = built_in(), None
    else:
        name = args.dataset_name or Path(args.train_file[0]).stem
        train, test = load_sets(args, _load_files)
    if test is None:
        fraction = args.eval_fraction or 0.2
        parts = hold_out(len(train), fraction, f"--eval_fraction {fraction}")
        train, test = (train.select(part) for part in parts)
    train = train.select(draw(len(train), args.max_train_samples))
    test = test.select(draw(len(test), args.max_eval_samples))
    for which, data in (("training", train), ("evaluation", test)):
        if not len(data):
            raise InputError(f"{name}: there are no {which} examples")
    return name, train, test


def _load_files(option: str, files: Sequence[str]) -> datasets.Dataset:
    is_text = {Path(file).suffix for file in files} == {".txt"}
    options = {"sample_by": "paragraph"} if is_text else {}
    return load_files(option, files, builders=KINDS, **options)


def load_lm_data(
    args: DataArguments, text_column: str
) -> tuple[str, datasets.Dataset, datasets.Dataset]:
    """The same for a language model, with the columns that it trains on and no others."""
    name = f"language reference of Python {platform.python_version()}"
    name, train, test = load_source(args, name, language_reference)
    columns = _find_columns(train, text_column)
    for which, data in (("training examples", train), ("evaluation examples", test)):
        missing = [column for column in columns if column not in data.column_names]
        if missing:
            raise InputError(f"the {which} have no column {missing[0]!r}")
        require_texts(data, [column for column in columns if column == text_column], which)
    extras = [name for name in EXTRAS if name in train.column_names and name in test.column_names]
    columns += extras if columns != [text_column] else []
    return name, train.select_columns(columns), test.select_columns(columns)


def _find_columns(data: datasets.Dataset, text_column: str) -> list[str]:
    for columns in ((text_column,), *FORMATS):
        if set(columns) <= set(data.column_names):
            return list(columns)
    hint = closest(text_column, data.column_names)
    raise InputError(
        f"--dataset_text_field: the training examples have no column {text_column!r}{hint}, nor "
        f"messages, nor prompt and completion; their columns: {', '.join(data.column_names)}"
    )


def require_texts(data: datasets.Dataset, columns: Sequence[str], which: str) -> None:
    """Raise `InputError` unless all values of these columns are texts."""
    for column in columns:
        kinds = {type(value).__name__ for value in data[column]} - {"str"}
        if kinds:
            raise InputError(
                f"column {column!r} of the {which} holds {' and '.join(sorted(kinds))} where a "
                "text is needed"
            )


def language_reference() -> datasets.Dataset:
    """The topics of `help()`, whose text is that of the language reference.

    Many topics are sections of longer ones. A paragraph is kept in the longest topic that has it,
    so that none stands in training and evaluation.
    """
    seen: set[str] = set()
    texts = []
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = [text for text in topics[topic].split("\n\n") if text.strip() not in seen]
        seen.update(text.strip() for text in paragraphs)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= SHORTEST_TOPIC:
            texts.append(text)
    return datasets.Dataset.from_dict({"text": texts})


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, add_eos: bool = False
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer made from these texts. It reads every other text too.

    Args:
        add_eos: end every text with the end-of-text token, as an encoder-decoder needs it.

    Raises:
        InputError: the vocabulary is too small for all bytes.
    """
    if vocab_size < 260:
        raise InputError(f"--vocab_size must be 260 (all bytes) or more, got {vocab_size}")
    untrained = GPT2Tokenizer(unk_token=EOS, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size, show_progress=False)
    if add_eos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
        )
    return tokenizer


def all_texts(data: datasets.Dataset) -> Iterator[str]:
    """Every text in the data, those of messages included."""
    for row in data:
        for value in row.values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (message["content"] or "" for message in value if "content" in message)

"""Train a text classifier with SAM or ASAM, on the Hub's texts, on GLUE or on your own.

Examples:
    python scripts/train_text_classification.py configs/stdlib_docstrings.yaml
    python scripts/train_text_classification.py --train_file train.csv --validation_file test.csv \\
        --text_column question --label_column topic --output_dir outputs/my_texts

The options come from a YAML file, the command line, or both: the command line wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
from common.arguments import (
    ClassifierArguments,
    LabeledDataArguments,
    SharpnessArguments,
    check_range,
    check_used,
    option,
)
from common.cli import InputError, OptionParser, run_script
from common.data import encode_labels, load_sets, require_texts, split_and_draw, with_label_noise
from common.docstrings import SECTIONS, SOURCE, read_docstrings

from sam_hf import SAMTrainingArguments

if TYPE_CHECKING:
    from common.runs import Run
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

VOCAB_SIZE = 4000  # of an untrained model's tokenizer
# The tasks of GLUE: columns of text, and metrics, of which the first counts.
TASKS = {
    "cola": (("sentence",), ("matthews_correlation",)),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("f1", "accuracy")),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "qqp": (("question1", "question2"), ("f1", "accuracy")),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "sst2": (("sentence",), ("accuracy",)),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}


@dataclass
class DataArguments(LabeledDataArguments):
    """Texts, or pairs of texts. The built-in ones are docstrings of Python's standard library."""

    task_name: Literal[tuple(TASKS)] | None = option(  # type: ignore[valid-type]
        "Task of GLUE, which sets columns and metric. From the Hub (nyu-mll/glue), or from "
        "--train_file and --validation_file."
    )
    text_column: str | None = option("Column with the texts. 'text' if not given.")
    text_pair_column: str | None = option("Column with the second texts, if they are pairs.")
    max_length: int = option("Longer texts, or pairs, are cut to this many tokens.", default=128)

    def __post_init__(self) -> None:
        columns = ("text_column", "text_pair_column")
        if self.task_name is not None:
            set_by_task = (*columns, "dataset_name", "dataset_config_name")
            check_used(self, set_by_task, False, "with --task_name, which sets it")
            self.text_column, self.text_pair_column = (*TASKS[self.task_name][0], None)[:2]
            if self.train_file is None:
                self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name
                of_mnli = "_matched" if self.task_name == "mnli" else ""
                self.eval_split = self.eval_split or f"validation{of_mnli}"
        super().__post_init__()
        check_used(self, columns, not self.is_built_in, "on the built-in examples")
        check_range(self, 8, inf, "max_length")


ModelArguments = ClassifierArguments  # a pretrained model, or an untrained BERT


@dataclass
class TrainArguments(SharpnessArguments, SAMTrainingArguments):
    """The options of training, of SAM, and of the comparison with plain training."""

    output_dir: str = option(
        "Folder for the model, metrics and pictures.", "outputs/text_classification"
    )


def load_data(args: DataArguments) -> tuple[str, datasets.Dataset, datasets.Dataset, list[str]]:
    """The data's name, both sets, and the classes: a single one means regression."""
    label, columns = args.label_column or "label", {args.text_column or "text": "text"}
    if args.text_pair_column in columns:
        raise InputError(f"--text_pair_column {args.text_pair_column!r} holds the first texts too")
    if args.text_pair_column is not None:
        columns[args.text_pair_column] = "text_pair"
    name, sets = load_sets(args, SOURCE, partial(split_docstrings, args.eval_fraction or 0.2))
    given = [data for data in sets if data]
    for data, column in product(given, columns):
        require_texts(data, f"{columns[column]}_column", column)
    if all("float" in getattr(data.features.get(label), "dtype", "") for data in given):
        if args.label_noise:
            raise InputError("--label_noise has no effect on a regression")
        sets, class_names = tuple(data and _read_numbers(data, label) for data in sets), [label]
    else:
        sets, class_names = encode_labels(sets, label)
    train, test = split_and_draw(args, sets, "labels" if len(class_names) > 1 else None)
    train = with_label_noise(train, len(class_names), args.label_noise)
    kept = [*columns, "labels"]
    train, test = (data.select_columns(kept).rename_columns(columns) for data in (train, test))
    return f"GLUE {args.task_name}" if args.task_name else name, train, test, class_names


def split_docstrings(eval_fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Docstrings and their sections; those of one definition, which share phrases, in one set."""
    from sklearn.model_selection import GroupShuffleSplit  # here: importing it takes a second

    texts, sections, definitions = zip(*read_docstrings(), strict=True)
    data = datasets.Dataset.from_dict({"text": texts, "label": sections})
    data = data.cast_column("label", datasets.ClassLabel(names=list(SECTIONS)))
    splitter = GroupShuffleSplit(1, test_size=eval_fraction, random_state=0)
    train, test = next(splitter.split(texts, groups=definitions))
    return data.select(train), data.select(test)


def _read_numbers(data: datasets.Dataset, column: str) -> datasets.Dataset:
    """The numbers of a regression, as `labels`."""
    numbers = np.array(data[column][:], dtype=float)
    if not np.isfinite(numbers).all() or (numbers == numbers[0]).all():
        raise InputError(f"--label_column {column!r} holds missing, infinite or all equal numbers")
    return data.rename_columns({column: "labels"})


def build_model(
    args: ModelArguments, class_names: list[str], train: datasets.Dataset, max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with an output for each class, and its tokenizer."""
    import transformers
    from common.experiment import class_labels, load_pretrained, new_model

    kind = "single_label_classification" if len(class_names) > 1 else "regression"
    options = {**class_labels(class_names), "problem_type": kind}
    if args.model_name_or_path is not None:
        tokenizer = load_pretrained(transformers.AutoTokenizer, args)
        if max_length > tokenizer.model_max_length:
            limit = f"the model's {tokenizer.model_max_length} tokens"
            raise InputError(f"--max_length {max_length} is more than {limit}")
        model = load_pretrained(transformers.AutoModelForSequenceClassification, args, **options)
        if tokenizer.pad_token is None:  # of a language model, which was trained without padding
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer
    texts = (text for row in train.remove_columns("labels") for text in row.values())
    tokenizer = train_tokenizer(texts, max_length)
    options |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    options |= {"max_position_embeddings": max_length, "intermediate_size": 128}  # RoBERTa: + 2
    options |= {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.BertConfig(**options)
    return new_model(transformers.BertForSequenceClassification, config, args), tokenizer


def train_tokenizer(texts: Iterator[str], max_length: int) -> Any:
    """A lower-casing byte-level BPE tokenizer made from these texts, with BERT's special tokens."""
    # No word pieces: their training breaks ties at random, so that no run could be repeated.
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import BertProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer(add_prefix_space=True, lowercase=True)
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokens = list(special.values())
    bpe.train_from_iterator(texts, VOCAB_SIZE, 0, show_progress=False, special_tokens=tokens)
    sep, cls = ((token, bpe.token_to_id(token)) for token in ("[SEP]", "[CLS]"))
    bpe.post_processor = BertProcessing(sep, cls)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"model_max_length": max_length, "model_input_names": inputs, **special}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **options)


def encode(data: datasets.Dataset, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """The columns that the model takes."""
    texts = [name for name in data.column_names if name != "labels"]
    tokenize = partial(tokenizer, truncation=True, max_length=max_length)
    # In memory: else each new tokenizer would leave a file in the cache.
    options = {"input_columns": texts, "remove_columns": texts, "keep_in_memory": True}
    return data.map(tokenize, batched=True, **options)


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Correlations of Pearson and Spearman for a single output, else the metrics of classes."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits  # hidden states follow
    if logits.shape[-1] == 1:
        pearson, spearman = (of(logits[:, 0], labels)[0] for of in (pearsonr, spearmanr))
        return {"pearson": float(pearson), "spearman": float(spearman)}
    predicted, average = logits.argmax(-1), "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, save, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.experiment import build_trainer, prepare, publish, train_and_compare
    from transformers import set_seed

    from sam_hf import SAMTrainer

    resume_from = prepare(training_args, data_args)
    name, train, test, class_names = load_data(data_args)
    title = data_args.title(name)
    summary = f"{title}: {len(train)} training and {len(test)} test texts"
    if training_args.process_index == 0:
        print(f"{summary}, {len(class_names)} classes" if len(class_names) > 1 else summary)

    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, class_names, train, data_args.max_length)
    build = partial(
        build_trainer,
        SAMTrainer,
        train_dataset=encode(train, tokenizer, data_args.max_length),
        eval_dataset=encode(test, tokenizer, data_args.max_length),
        processing_class=tokenizer,  # pads each batch to its own longest text
        compute_metrics=scores,
    )
    metrics = ("pearson", "spearman") if len(class_names) == 1 else ("accuracy",)
    metrics = TASKS[data_args.task_name][1] if data_args.task_name else metrics
    details = {"data": summary, "model_arguments": asdict(model_args)}
    report = {"title": title, "data_args": data_args, "details": details}
    trainer, runs = train_and_compare(build, model, training_args, resume_from, metrics, **report)
    card = {"tasks": "text-classification", "tags": ["text-classification", "sam_hf"]}
    publish(trainer, **card, dataset=title, dataset_tags=data_args.hub_dataset)
    return runs


if __name__ == "__main__":
    run_script(main)

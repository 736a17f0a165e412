"""Train a model that writes summaries with SAM or ASAM, on the Hub's texts or your own.

Examples:
    python scripts/train_summarization.py configs/docstring_summaries.yaml
    python scripts/train_summarization.py --model_name_or_path google-t5/t5-small \\
        --dataset_name EdinburghNLP/xsum --text_column document --predict_with_generate

The options may come from a YAML file, from the command line, or from both: the command line wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from common.experiment import (
    build_trainer,
    load_pretrained,
    prepare,
    publish,
    show_results,
    train_and_compare,
)
from common.labeled_data import require_column
from common.lm_data import all_texts, load_source, require_texts, train_tokenizer
from common.script_utils import InputError, OptionParser, run_script
from common.shared_arguments import (
    ModelArguments,
    SharpnessArguments,
    SourceArguments,
    output_dir_field,
)
from common.stdlib_docstrings import describe_source, read_docstrings
from common.training_utils import Run
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from sam_hf import SAMConfig, SAMSeq2SeqTrainer

# The first sentence, and what follows it if that is enough to be summarised.
SENTENCE_AND_REST = re.compile(r"(.{15,}?[.!?]) (?=[A-Z])(.{80,})")
VOCAB_SIZE = 1024


@dataclass
class DataArguments(SourceArguments):
    """Which texts. With no source: docstrings, which their first sentence summarises."""

    _built_in = "the built-in docstrings"
    _columns = ("text_column", "summary_column")

    text_column: str | None = field(
        default=None, metadata={"help": "Column with the texts. 'text' if not given."}
    )
    summary_column: str | None = field(
        default=None, metadata={"help": "Column with the summaries. 'summary' if not given."}
    )
    max_source_length: int = field(
        default=128, metadata={"help": "Tokens of a text; what follows them is cut off."}
    )
    max_target_length: int = field(
        default=32, metadata={"help": "Tokens of a summary; what follows them is cut off."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name} must be 2 or more, got {getattr(self, name)}")
        if (self.text_column or "text") == (self.summary_column or "summary"):
            raise ValueError(
                "--text_column and --summary_column must be two columns, got "
                f"{self.text_column or 'text'!r} for both"
            )


@dataclass
class TrainArguments(SharpnessArguments, SAMConfig, Seq2SeqTrainingArguments):
    """The options of the Seq2SeqTrainer with those of SAM, and the comparison."""

    output_dir: str = output_dir_field("outputs/summarization", "tokenizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generation_max_length", "generation_num_beams"):
            if getattr(self, name) is not None and not self.predict_with_generate:
                raise ValueError(f"--{name} has no effect without --predict_with_generate")


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, compare, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)
    resume_from = prepare(training_args, data_args)

    name, train, test = load_source(data_args, describe_source(), docstring_summaries)
    columns = {
        "text": data_args.text_column or "text",
        "summary": data_args.summary_column or "summary",
    }
    for which, data in (("training examples", train), ("evaluation examples", test)):
        for kind, column in columns.items():
            require_column(data, f"{kind}_column", column, which)
        require_texts(data, list(columns.values()), which)
    train, test = (data.select_columns(list(columns.values())) for data in (train, test))
    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, train)
    with_rouge = training_args.predict_with_generate
    common: dict[str, Any] = {
        "train_dataset": encode(train, tokenizer, data_args, columns),
        "eval_dataset": encode(test, tokenizer, data_args, columns),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model),
        "compute_metrics": rouge_l(tokenizer) if with_rouge else None,
    }
    description = f"{name}: {len(train)} training and {len(test)} test texts"
    if training_args.process_index == 0:
        print(description)
    details = {
        "data": description,
        "data_arguments": asdict(data_args),
        "model_arguments": asdict(model_args),
    }
    trainer, runs = train_and_compare(
        partial(build_trainer, SAMSeq2SeqTrainer, **common),
        model,
        training_args,
        resume_from,
        metrics=("rouge_l", "loss") if with_rouge else ("loss",),
        details=details,
    )
    show_results(trainer, runs, f"{name}, summaries", "model, tokenizer")
    card = {
        "tasks": "summarization",
        "tags": ["summarization", "sam_hf"],
        "dataset": name,
        "dataset_tags": data_args.hub_dataset,
    }
    publish(trainer, card)
    return runs


def docstring_summaries() -> datasets.Dataset:
    """Real texts that come with Python: a docstring's first sentence sums up the others."""
    found = [SENTENCE_AND_REST.fullmatch(docstring.text) for docstring in read_docstrings()]
    pairs = [match.groups() for match in found if match]
    return datasets.Dataset.from_dict(
        {"summary": [summary for summary, _ in pairs], "text": [text for _, text in pairs]}
    )


def build_model(
    args: ModelArguments, train: datasets.Dataset
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; where none is named, a small T5 made for these texts."""
    if args.model_name_or_path is not None:
        # fp32, whatever it is stored in: bf16 swallows the perturbation.
        model = load_pretrained(AutoModelForSeq2SeqLM, args, dtype=torch.float32)
        return model, load_pretrained(AutoTokenizer, args)
    tokenizer = train_tokenizer(all_texts(train), VOCAB_SIZE, add_eos=True)
    sizes = args.encoder_sizes()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=sizes["hidden_size"],
        d_kv=sizes["hidden_size"] // sizes["num_attention_heads"],
        d_ff=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    # A folder's name instead of none at all: the model card then says "trained from scratch".
    model.config.name_or_path = "."
    return model, tokenizer


def encode(
    data: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    columns: dict[str, str],
) -> datasets.Dataset:
    """The texts as tokens, and as labels the summaries."""

    def tokenize(rows: dict[str, list[str]]) -> Any:
        texts, summaries = rows[columns["text"]], rows[columns["summary"]]
        tokens = tokenizer(texts, max_length=args.max_source_length, truncation=True)
        targets = tokenizer(
            text_target=summaries, max_length=args.max_target_length, truncation=True
        )
        return {**tokens, "labels": targets["input_ids"]}

    return data.map(
        tokenize,
        batched=True,
        remove_columns=data.column_names,
        keep_in_memory=True,  # else each new tokenizer would leave a file in the cache
        desc="Tokenizing",
    )


def rouge_l(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """The mean ROUGE-L (F1, from 0 to 1) of the generated summaries.

    Raises:
        InputError: rouge_score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(
            f"--predict_with_generate: {error}; pip install rouge-score, or leave it out and "
            "compare the loss"
        ) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        written, expected = (
            tokenizer.batch_decode(
                np.where(tokens == -100, tokenizer.pad_token_id, tokens), skip_special_tokens=True
            )
            for tokens in (prediction.predictions, prediction.label_ids)
        )
        scores = map(scorer.score, expected, written)
        return {"rouge_l": float(np.mean([score["rougeL"].fmeasure for score in scores]))}

    return compute


if __name__ == "__main__":
    run_script(main)

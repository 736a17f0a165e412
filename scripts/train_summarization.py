"""Fine-tune or train a summarization model with SAM or ASAM and the Seq2SeqTrainer.

Examples:
    python scripts/train_summarization.py configs/docstring_summaries.yaml
    python scripts/train_summarization.py --model_name_or_path google-t5/t5-small \\
        --dataset_name EdinburghNLP/xsum --text_column document --predict_with_generate

The options come from a YAML file, the command line, or both: the command line wins.
--predict_with_generate reports ROUGE-L; it needs `pip install rouge-score`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from common.arguments import (
    DataArguments,
    ModelArguments,
    SharpnessArguments,
    check_range,
    check_used,
    option,
)
from common.cli import InputError, OptionParser, run_script
from common.data import load_sets, require_texts, split_and_draw, train_tokenizer
from common.docstrings import SOURCE, read_docstrings
from transformers import Seq2SeqTrainingArguments

from sam_hf import SAMConfig

if TYPE_CHECKING:
    from common.runs import Run
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

# The first sentence, and what follows it if that is long enough to be summarised.
SENTENCE_AND_REST = re.compile(r"(.{15,}?[.!?]) (?=[A-Z])(.{80,})")
VOCAB_SIZE = 1024  # of an untrained model


@dataclass
class SummaryDataArguments(DataArguments):
    """Texts and their summaries. The built-in ones are Python's docstrings."""

    text_column: str | None = option("Column with the texts. 'text' if not given.")
    summary_column: str | None = option("Column with the summaries. 'summary' if not given.")
    max_source_length: int = option("Tokens of a text; longer ones are cut off.", default=128)
    max_target_length: int = option("Tokens of a summary; longer ones are cut off.", default=32)

    def __post_init__(self) -> None:
        super().__post_init__()
        columns = ("text_column", "summary_column")
        check_used(self, columns, not self.is_built_in, "on the built-in examples")
        check_range(self, 2, math.inf, "max_source_length", "max_target_length")

    @property
    def columns(self) -> list[str]:
        return [self.text_column or "text", self.summary_column or "summary"]


@dataclass
class TrainArguments(SharpnessArguments, SAMConfig, Seq2SeqTrainingArguments):
    """The options of the Seq2SeqTrainer, of SAM, and of the comparison with plain training."""

    output_dir: str = option("Folder for the model, metrics and pictures.", "outputs/summarization")

    def __post_init__(self) -> None:
        super().__post_init__()
        generation = ("generation_max_length", "generation_num_beams")
        check_used(self, generation, self.predict_with_generate, "without --predict_with_generate")


def load_data(args: SummaryDataArguments) -> tuple[str, datasets.Dataset, datasets.Dataset]:
    """The data's name, and both sets with two columns: the texts and their summaries.

    Raises:
        InputError: there is no such source or column, or it holds no texts.
    """
    name, sets = load_sets(args, SOURCE, lambda: (docstring_summaries(), None))
    train, test = split_and_draw(args, sets)
    for data in (train, test):
        require_texts(data, "text_column", args.columns[0])
        require_texts(data, "summary_column", args.columns[1])
    return name, train.select_columns(args.columns), test.select_columns(args.columns)


def docstring_summaries() -> datasets.Dataset:
    """The first sentences of docstrings, each of which summarises the other sentences."""
    found = [SENTENCE_AND_REST.fullmatch(docstring.text) for docstring in read_docstrings()]
    pairs = [match.groups() for match in found if match]
    return datasets.Dataset.from_dict(
        {"summary": [summary for summary, _ in pairs], "text": [text for _, text in pairs]}
    )


def build_model(
    args: ModelArguments, train: datasets.Dataset
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer. An untrained model's is made from the training texts.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    import transformers
    from common.experiment import load_pretrained, new_model
    from tokenizers.processors import TemplateProcessing

    if args.model_name_or_path is not None:
        model = load_pretrained(transformers.AutoModelForSeq2SeqLM, args)
        return model, load_pretrained(transformers.AutoTokenizer, args)
    texts = (value for row in train for value in row.values())
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)  # of each text, as T5 needs it
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[end]
    )
    config = transformers.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    config.num_decoder_layers = None  # num_layers, after --config_overrides has changed it
    return new_model(transformers.T5ForConditionalGeneration, config, args), tokenizer


def encode(
    data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: SummaryDataArguments
) -> datasets.Dataset:
    """The texts as `input_ids`, and the summaries as `labels`."""

    def tokenize(rows: dict[str, list[str]]) -> Any:
        texts, summaries = (rows[column] for column in args.columns)
        inputs = tokenizer(texts, max_length=args.max_source_length, truncation=True)
        labels = tokenizer(
            text_target=summaries, max_length=args.max_target_length, truncation=True
        )
        return {**inputs, "labels": labels["input_ids"]}

    # In memory: otherwise each new tokenizer would leave a file in the cache.
    return data.map(tokenize, batched=True, remove_columns=args.columns, keep_in_memory=True)


def rouge_l(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """The mean ROUGE-L (F1, from 0 to 1) of the generated summaries.

    Raises:
        InputError: rouge_score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(f"--predict_with_generate: {error}; pip install rouge-score") from error
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


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, save, push."""
    parser = OptionParser((SummaryDataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.experiment import build_trainer, prepare, publish, train_and_compare
    from transformers import DataCollatorForSeq2Seq, set_seed

    from sam_hf import SAMSeq2SeqTrainer

    resume_from = prepare(training_args, data_args)

    name, train, test = load_data(data_args)
    summary = f"{name}: {len(train)} training and {len(test)} test texts"
    if training_args.process_index == 0:
        print(summary)

    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, train)
    generates = training_args.predict_with_generate
    build = partial(
        build_trainer,
        SAMSeq2SeqTrainer,
        train_dataset=encode(train, tokenizer, data_args),
        eval_dataset=encode(test, tokenizer, data_args),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=rouge_l(tokenizer) if generates else None,
    )
    trainer, runs = train_and_compare(
        build,
        model,
        training_args,
        resume_from,
        ["rouge_l", "loss"] if generates else ["loss"],
        title=name,
        data_args=data_args,
        details={"data": summary, "model_arguments": asdict(model_args)},
    )
    card = {"tasks": "summarization", "tags": ["summarization", "sam_hf"]}
    publish(trainer, **card, dataset=name, dataset_tags=data_args.hub_dataset)
    return runs


if __name__ == "__main__":
    run_script(main)

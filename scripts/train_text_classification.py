"""Train a text classifier with SAM or ASAM, on the Hub's texts, on GLUE or on your own.

Examples:
    python scripts/train_text_classification.py configs/stdlib_docstrings.yaml
    python scripts/train_text_classification.py configs/stdlib_docstrings.yaml --search_rho 8
    python scripts/train_text_classification.py configs/glue_rte.yaml --bf16
    python scripts/train_text_classification.py configs/glue_rte.yaml --task_name mrpc
    python scripts/train_text_classification.py --train_file train.csv --validation_file test.csv \\
        --text_column question --label_column topic --output_dir outputs/my_texts

The options may come from a YAML file, from the command line, or from both: the command line wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import datasets
from common.classification import run_classification
from common.experiment import (
    build_trainer,
    class_labels,
    load_classifier,
    load_pretrained,
    prepare,
)
from common.script_utils import InputError, OptionParser, run_script
from common.text_arguments import DataArguments, ModelArguments, TrainArguments
from common.text_data import MULTI, SINGLE, TEXTS, TextData, load_text_data
from common.training_utils import Run, load_metric
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from sam_hf import SAMTrainer


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, search, train, compare, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)
    resume_from = prepare(training_args, data_args)

    data = load_text_data(data_args)
    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, data, data_args.max_length)
    compute_metrics = compute_scores(data.problem_type)

    def trainer_on(train: datasets.Dataset, test: datasets.Dataset) -> Callable[..., SAMTrainer]:
        # With a tokenizer, the Trainer pads each batch to its own longest text.
        return partial(
            build_trainer,
            SAMTrainer,
            train_dataset=encode(train, tokenizer, data_args.max_length),
            eval_dataset=encode(test, tokenizer, data_args.max_length),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )

    return run_classification(
        trainer_on,
        model,
        data,
        data_args,
        model_args,
        training_args,
        resume_from,
        task="text-classification",
        saved="model, tokenizer",
    )


def build_model(
    args: ModelArguments, data: TextData, max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with an output for each of the data's classes, and its tokenizer.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    config = {**class_labels(data.class_names), "problem_type": data.problem_type}
    if args.model_name_or_path is not None:
        tokenizer = load_pretrained(AutoTokenizer, args)
        if max_length > tokenizer.model_max_length:
            raise InputError(
                f"--max_length {max_length} is more than the {tokenizer.model_max_length} tokens "
                f"that {args.model_name_or_path!r} takes"
            )
        model = load_classifier(AutoModelForSequenceClassification, args, **config)
        if tokenizer.pad_token is None:  # of a language model, which was trained without padding
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    texts = (row[name] for row in data.train for name in TEXTS if name in row)
    tokenizer = train_tokenizer(texts, args.vocab_size or 4000, max_length)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=max_length,
            pad_token_id=tokenizer.pad_token_id,
            **args.encoder_sizes(),
            **config,
        )
    )
    # A folder's name instead of none at all: the model card then says "trained from scratch".
    model.config.name_or_path = "."
    return model, tokenizer


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer made from these texts, with BERT's special tokens.

    No word pieces: their training breaks ties at random, so that no run could be repeated.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def encode(
    data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """The columns that the model takes. None is left over for `remove_unused_columns` to drop."""
    return data.map(
        lambda rows: tokenizer(
            rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length
        ),
        batched=True,
        remove_columns=[name for name in TEXTS if name in data.column_names],
        keep_in_memory=True,  # else each new tokenizer would leave a file in the cache
    )


def compute_scores(problem_type: str) -> Callable[[EvalPrediction], dict[str, float]]:
    metric = load_metric("classification", problem_type)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        if isinstance(logits, tuple):  # some models return hidden states beside them
            logits = logits[0]
        if problem_type == SINGLE:
            predicted = logits.argmax(-1)
        elif problem_type == MULTI:
            predicted = logits > 0
        else:
            predicted = logits.squeeze(-1)
        return metric.compute(predictions=predicted, references=prediction.label_ids)

    return compute


if __name__ == "__main__":
    run_script(main)

"""Fine-tune or train a language model with SAM or ASAM through TRL, with or without LoRA.

Examples:
    python scripts/train_causal_lm.py configs/pydoc_lm.yaml
    python scripts/train_causal_lm.py configs/pydoc_lm_lora.yaml
    python scripts/train_causal_lm.py --model_name_or_path Qwen/Qwen3-0.6B --use_lora \\
        --dataset_name trl-lib/Capybara --packing --sam_rho 0.05 --output_dir outputs/capybara
    python scripts/train_causal_lm.py --train_file path/to/texts.jsonl --packing --sam_rho 0.1

With LoRA, the adapters alone are perturbed, for the rest gets no gradient. The options may come
from a YAML file, from the command line, or from both: the command line wins.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common.experiment import (
    build_trainer,
    load_pretrained,
    prepare,
    publish,
    show_results,
    train_and_compare,
)
from common.lm_data import DataArguments, all_texts, load_lm_data, train_tokenizer
from common.script_utils import InputError, OptionParser, leave_for_missing_package, run_script
from common.shared_arguments import ModelArguments, SharpnessArguments, output_dir_field
from common.training_utils import Run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from sam_hf import SAMConfig, with_sam

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    leave_for_missing_package(error, "trl")


@dataclass
class LanguageModelArguments(ModelArguments):
    """Which model: a pretrained one, or a small Llama made from its configuration; and LoRA."""

    _sizes = (*ModelArguments._sizes, "vocab_size")
    _lora = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")

    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the untrained model's tokenizer, which is made from the training "
            "texts. 1024 if not given."
        },
    )
    use_lora: bool = field(
        default=False,
        metadata={"help": "Leave the pretrained model as it is, and train LoRA adapters in it."},
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the adapters. 16 if not given."}
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "The adapters' output is scaled by alpha / r. 32 if not given."},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the adapters. 0.05 if not given."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules that get adapters, or all-linear. What PEFT names for "
            "the architecture if not given."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._lora:
            if getattr(self, name) is not None and not self.use_lora:
                raise ValueError(f"--{name} has no effect without --use_lora")
        if self.use_lora and self.model_name_or_path is None:
            raise ValueError("--use_lora needs --model_name_or_path: a trained model to adapt")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be from 0 to below 1, got {self.lora_dropout}")

    def lora_config(self) -> Any:
        """The adapters as PEFT describes them; None if there are none.

        Raises:
            InputError: PEFT is not installed.
        """
        if not self.use_lora:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise InputError(f"--use_lora: {error}; pip install 'sam-hf[trl]'") from error
        modules = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=16 if self.lora_r is None else self.lora_r,
            lora_alpha=32 if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=0.05 if self.lora_dropout is None else self.lora_dropout,
            # PEFT takes this one word as a text, and every other text as a regular expression.
            target_modules="all-linear" if modules == ["all-linear"] else modules,
        )


@dataclass
class TrainArguments(SharpnessArguments, SAMConfig, SFTConfig):
    """The options of TRL's SFTTrainer with those of SAM, and the comparison."""

    output_dir: str = output_dir_field("outputs/causal_lm", "tokenizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_init_kwargs is not None:
            raise ValueError(
                "--model_init_kwargs has no effect: the model is loaded in float32, which rounding "
                "needs so as not to swallow the perturbation"
            )


class LanguageModelTrainer(with_sam(SFTTrainer)):
    """TRL's SFTTrainer with SAM. It logs the perplexity beside the evaluation loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = torch.tensor(logs["eval_loss"]).exp().item()
        super().log(logs, *args, **kwargs)


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, compare, push."""
    parser = OptionParser((DataArguments, LanguageModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)
    resume_from = prepare(training_args, data_args)

    name, train, test = load_lm_data(data_args, training_args.dataset_text_field)
    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, training_args, all_texts(train))
    description = f"{name}: {len(train)} training and {len(test)} test examples"
    if training_args.process_index == 0:
        print(description)

    def build(args: TrainArguments, model: PreTrainedModel) -> LanguageModelTrainer:
        trainer = build_trainer(
            LanguageModelTrainer,
            args,
            model=model,
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            peft_config=model_args.lora_config(),
        )
        if model_args.use_lora and trainer.is_world_process_zero():
            trainer.model.print_trainable_parameters()
        refuse_nothing_to_predict(trainer)
        warn_of_cut_examples(trainer)
        return trainer

    details = {
        "data": description,
        "data_arguments": asdict(data_args),
        "model_arguments": asdict(model_args),
    }
    trainer, runs = train_and_compare(
        build, model, training_args, resume_from, ("loss", "perplexity"), details=details
    )
    saved = "adapters, tokenizer" if model_args.use_lora else "model, tokenizer"
    show_results(trainer, runs, name, saved)
    card = {
        "model_name": Path(training_args.output_dir).name,
        "tags": ["sam_hf"],
        "dataset_name": data_args.hub_dataset,
    }
    publish(trainer, card)
    return runs


def build_model(
    args: LanguageModelArguments, training_args: TrainArguments, texts: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; where none is named, both are made for these texts.

    Raises:
        InputError: there is no such model, it holds adapters, or the sizes do not fit together.
    """
    if args.model_name_or_path is not None:
        if args.use_lora and (Path(args.model_name_or_path) / "adapter_config.json").exists():
            raise InputError(
                f"--use_lora: {args.model_name_or_path!r} holds adapters, which new ones would "
                "replace: give --model_name_or_path the base, or the model they are merged into"
            )
        trust = {"trust_remote_code": training_args.trust_remote_code}
        # fp32, whatever it is stored in: bf16 swallows the perturbation.
        model = load_pretrained(AutoModelForCausalLM, args, dtype=torch.float32, **trust)
        return model, load_pretrained(AutoTokenizer, args, **trust)
    tokenizer = train_tokenizer(texts, args.vocab_size or 1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=training_args.max_length or 1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **args.encoder_sizes(),
    )
    return LlamaForCausalLM(config), tokenizer


def lengths(data: Any) -> list[int]:
    """The tokens of each example, also of those that were packed into one row."""
    if "seq_lengths" in data.column_names:
        return [length for row in data["seq_lengths"] for length in row]
    return [len(row) for row in data["input_ids"]]


def refuse_nothing_to_predict(trainer: LanguageModelTrainer) -> None:
    """The loss of no token is 0, and the perplexity 1: as if the model knew everything.

    Raises:
        InputError: no text of the training or of the evaluation has two tokens.
    """
    for which, data in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if max(lengths(data)) < 2:
            raise InputError(
                f"the {which} texts are empty, or of one token each: there is nothing to predict"
            )


def warn_of_cut_examples(trainer: LanguageModelTrainer) -> None:
    """Say how many examples --max_length has cut, where it does so."""
    args, data = trainer.args, trainer.train_dataset
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return  # the other packing strategies go on in the next row
    known = lengths(data)
    cut = sum(length == args.max_length for length in known)
    if cut:
        warnings.warn(
            f"{cut} of the {len(known)} training examples are cut off at --max_length "
            f"{args.max_length} (or just fill it). --packing with --packing_strategy wrapped "
            "keeps all text.",
            stacklevel=2,
        )


if __name__ == "__main__":
    run_script(main)

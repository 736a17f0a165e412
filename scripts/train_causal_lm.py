"""Fine-tune or train a language model with SAM or ASAM and TRL's SFTTrainer, with or without LoRA.

Examples:
    python scripts/train_causal_lm.py configs/pydoc_lm.yaml
    python scripts/train_causal_lm.py configs/pydoc_lm_lora.yaml
    python scripts/train_causal_lm.py --model_name_or_path Qwen/Qwen3-0.6B --use_lora \\
        --dataset_name trl-lib/Capybara --packing --sam_rho 0.05 --output_dir outputs/capybara
    python scripts/train_causal_lm.py --train_file path/to/texts.jsonl --packing --sam_rho 0.1 \\
        --config_overrides num_hidden_layers=4,intermediate_size=512

With LoRA, only the adapters are perturbed: the other weights get no gradient. Texts are cut off at
--max_length; --packing with --packing_strategy wrapped keeps all of each text. The options come
from a YAML file, the command line, or both: the command line wins. Needs `pip install
sam-hf[scripts,trl]`.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import datasets
import torch
from common.arguments import (
    DataArguments,
    ModelArguments,
    SharpnessArguments,
    check_range,
    check_used,
    option,
)
from common.cli import OptionParser, run_script
from common.data import load_sets, require_texts, split_and_draw, train_tokenizer
from trl import SFTConfig

from sam_hf import SAMConfig

if TYPE_CHECKING:
    from common.runs import Run
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCAB_SIZE = 1024  # of an untrained model
MIN_TOPIC_LENGTH = 300  # characters; a shorter topic is the heading of sections in another one
# Formats of SFTTrainer in addition to a column of texts, and optional columns of messages.
FORMATS = (("messages",), ("prompt", "completion"))
EXTRAS = ("tools", "chat_template_kwargs")


@dataclass
class LanguageModelArguments(ModelArguments):
    """A pretrained model, or a small untrained Llama, and LoRA."""

    use_lora: bool = option(
        "Train LoRA adapters in the pretrained model, whose own weights stay unchanged.",
        default=False,
    )
    lora_r: int = option("Rank of the adapters.", default=16)
    lora_alpha: int = option("The adapters' output is scaled by lora_alpha / lora_r.", default=32)
    lora_dropout: float = option("Dropout before the adapters.", default=0.05)
    lora_target_modules: list[str] | None = option(
        "Names of the modules that get adapters, or all-linear. PEFT's choice for the architecture "
        "if not given."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lora = [f for f in fields(self) if f.name.startswith("lora_")]
        given = [f.name for f in lora if getattr(self, f.name) != f.default]
        check_used(self, given, self.use_lora, "without --use_lora")
        check_used(self, ["use_lora"], self.model_name_or_path is not None, "on an untrained model")
        check_range(self, 0, 1, "lora_dropout")
        if self.use_lora and Path(str(self.model_name_or_path), "adapter_config.json").exists():
            raise ValueError(
                f"--use_lora: {self.model_name_or_path!r} holds adapters, which new ones would "
                "replace: give --model_name_or_path their base, or the model they are merged into"
            )

    def lora_config(self) -> LoraConfig | None:
        if not self.use_lora:
            return None
        from peft import LoraConfig

        modules = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            # PEFT takes this one word as a string, and any other string as a regular expression.
            target_modules="all-linear" if modules == ["all-linear"] else modules,
        )


@dataclass
class TrainArguments(SharpnessArguments, SAMConfig, SFTConfig):
    """The options of TRL's SFTTrainer, of SAM, and of the comparison with plain training."""

    output_dir: str = option("Folder for the model, metrics and pictures.", "outputs/causal_lm")


def load_data(
    args: DataArguments, text_column: str
) -> tuple[str, datasets.Dataset, datasets.Dataset]:
    """The data's name, and both sets with only the columns that SFTTrainer trains on.

    Raises:
        InputError: there is no such source, or it has no such columns.
    """
    built_in = f"language reference of Python {platform.python_version()}"
    name, sets = load_sets(args, built_in, lambda: (language_reference(), None))
    train, test = split_and_draw(args, sets)
    return name, _select(train, text_column), _select(test, text_column)


def language_reference() -> datasets.Dataset:
    """The topics of `help()`, which come with Python and hold the text of its language reference.

    Many topics are sections of longer ones. A paragraph is kept in the longest topic that has it,
    so that none is in both the training and the evaluation data.
    """
    seen: set[str] = set()
    texts = []
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = [text for text in topics[topic].split("\n\n") if text.strip() not in seen]
        seen.update(text.strip() for text in paragraphs)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= MIN_TOPIC_LENGTH:
            texts.append(text)
    return datasets.Dataset.from_dict({"text": texts})


def _select(data: datasets.Dataset, text_column: str) -> datasets.Dataset:
    if text_column not in data.column_names:
        for columns in FORMATS:
            if set(columns) <= set(data.column_names):
                kept = [name for name in (*columns, *EXTRAS) if name in data.column_names]
                return data.select_columns(kept)
    require_texts(data, "dataset_text_field", text_column)
    return data.select_columns([text_column])


def build_model(
    args: LanguageModelArguments, training_args: TrainArguments, train: datasets.Dataset
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer. An untrained model's is made from the training texts.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    import transformers
    from common.experiment import load_pretrained, new_model

    if args.model_name_or_path is not None:
        trust = {"trust_remote_code": training_args.trust_remote_code}
        model = load_pretrained(transformers.AutoModelForCausalLM, args, **trust)
        return model, load_pretrained(transformers.AutoTokenizer, args, **trust)
    texts = (value for row in train for value in row.values() if isinstance(value, str))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=len(tokenizer),
        max_position_embeddings=training_args.max_length or 1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Derived from the other sizes, after --config_overrides has changed them.
    config.head_dim = config.num_key_value_heads = None
    return new_model(transformers.LlamaForCausalLM, config, args), tokenizer


class PerplexityMixin:
    """Logs the perplexity with the evaluation loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = torch.tensor(logs["eval_loss"]).exp().item()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, save, push."""
    parser = OptionParser((DataArguments, LanguageModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.experiment import build_trainer, prepare, publish, train_and_compare
    from transformers import set_seed
    from trl import SFTTrainer

    from sam_hf import with_sam

    resume_from = prepare(training_args, data_args)

    name, train, test = load_data(data_args, training_args.dataset_text_field)
    summary = f"{name}: {len(train)} training and {len(test)} test examples"
    if training_args.process_index == 0:
        print(summary)

    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, training_args, train)

    class Trainer(PerplexityMixin, with_sam(SFTTrainer)):
        """TRL's SFTTrainer with SAM."""

    build = partial(
        build_trainer,
        Trainer,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=model_args.lora_config(),
    )
    trainer, runs = train_and_compare(
        build,
        model,
        training_args,
        resume_from,
        ["loss", "perplexity"],
        title=name,
        data_args=data_args,
        details={"data": summary, "model_arguments": asdict(model_args)},
    )
    publish(
        trainer,
        model_name=Path(training_args.output_dir).name,
        dataset_name=data_args.hub_dataset,
        tags=["sam_hf"],
    )
    return runs


if __name__ == "__main__":
    run_script(main)

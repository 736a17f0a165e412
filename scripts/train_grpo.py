"""Reinforcement learning with SAM: GRPO through TRL, with a rule as the reward.

The model continues random strings, and is rewarded with the share of digits in what it writes. An
untrained one writes a digit about every fourth time.

Examples:
    python scripts/train_grpo.py configs/grpo_digits.yaml
    python scripts/train_grpo.py configs/grpo_digits.yaml --sam_rho 0
    python scripts/train_grpo.py configs/grpo_digits.yaml --sam_scope micro_batch --seed 1

The options may come from a YAML file, from the command line, or from both: the command line wins.
For another task change `reward` and `make_prompts`.
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from common.experiment import (
    build_trainer,
    load_pretrained,
    prepare,
    publish,
    show_results,
    train_and_compare,
)
from common.script_utils import OptionParser, leave_for_missing_package, run_script
from common.shared_arguments import ModelArguments, ScriptArguments, output_dir_field
from common.training_utils import Run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from sam_hf import SAMConfig, with_sam

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    leave_for_missing_package(error, "trl")

CHARACTERS = string.ascii_lowercase + string.digits
PROMPT_LENGTH = 4
PAD, EOS = "<pad>", "<eos>"


@dataclass
class PromptArguments:
    """How many prompts there are to learn from."""

    _argument_group_name = "data"

    num_prompts: int = field(default=512, metadata={"help": "Random strings to train on."})
    num_eval_prompts: int = field(
        default=64, metadata={"help": "Other random strings, on which the reward is reported."}
    )

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_eval_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")


@dataclass
class TrainArguments(ScriptArguments, SAMConfig, GRPOConfig):
    """The options of TRL's GRPOTrainer with those of SAM, and the comparison."""

    output_dir: str = output_dir_field("outputs/grpo", "tokenizer")
    eval_on_start: bool = field(
        default=True, metadata={"help": "Measure the reward before the training too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta must be 0 or more, got {self.beta}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, make prompts, model and trainer, train, evaluate, compare, push."""
    parser = OptionParser((PromptArguments, ModelArguments, TrainArguments), __doc__)
    prompt_args, model_args, training_args = parser.parse(argv)
    resume_from = prepare(training_args, prompt_args)

    prompts = make_prompts(prompt_args.num_prompts + prompt_args.num_eval_prompts)
    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, training_args.max_completion_length)
    common: dict[str, Any] = {
        "reward_funcs": reward,
        "train_dataset": prompts.select(range(prompt_args.num_prompts)),
        "eval_dataset": prompts.select(range(prompt_args.num_prompts, len(prompts))),
        "processing_class": tokenizer,
    }
    trainer, runs = train_and_compare(
        partial(build_trainer, with_sam(GRPOTrainer), **common),
        model,
        training_args,
        resume_from,
        metrics=("reward",),
        details={"data_arguments": asdict(prompt_args), "model_arguments": asdict(model_args)},
    )
    show_results(trainer, runs, "GRPO for digits", "model, tokenizer")
    if trainer.is_world_process_zero() and training_args.eval_on_start:
        for run in runs:
            print(f"{run.name}: mean reward {run.curve[0][1]:.3f} at first, {run.score:.3f} now")
    publish(trainer, {"model_name": Path(training_args.output_dir).name, "tags": ["sam_hf"]})
    return runs


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of each completion's characters that are digits; 0 for an empty one."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def make_prompts(count: int) -> datasets.Dataset:
    """Different random strings, the same every time."""
    draw = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts["".join(draw.choices(CHARACTERS, k=PROMPT_LENGTH))] = None
    return datasets.Dataset.from_dict({"prompt": list(prompts)})


def build_model(
    args: ModelArguments, completion_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; where none is named, a small Llama that writes characters."""
    if args.model_name_or_path is not None:
        # fp32, whatever it is stored in: bf16 swallows the perturbation.
        model = load_pretrained(AutoModelForCausalLM, args, dtype=torch.float32)
        return model, load_pretrained(AutoTokenizer, args)
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PAD, eos_token=EOS, padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=PROMPT_LENGTH + completion_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **args.encoder_sizes(),
    )
    return LlamaForCausalLM(config), tokenizer


if __name__ == "__main__":
    run_script(main)

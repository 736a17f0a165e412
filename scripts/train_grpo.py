"""Reinforcement learning with SAM: TRL's GRPOTrainer, with a rule as the reward.

The model continues random strings, and the reward is the share of digits in what it writes: about a
quarter for an untrained model. For another task, change `reward` and `make_prompts`.

Examples:
    python scripts/train_grpo.py configs/grpo_digits.yaml
    python scripts/train_grpo.py configs/grpo_digits.yaml --sam_rho 0
    python scripts/train_grpo.py configs/grpo_digits.yaml --sam_scope micro_batch --seed 1

The options come from a YAML file, the command line, or both: the command line wins. Needs
`pip install sam-hf[scripts,trl]`.
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from common.arguments import ModelArguments, ScriptArguments, check_range, option
from common.cli import OptionParser, run_script
from trl import GRPOConfig

from sam_hf import SAMConfig

if TYPE_CHECKING:
    from common.runs import Run
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHARACTERS = string.ascii_lowercase + string.digits
PROMPT_LENGTH = 4
PAD, EOS = "<pad>", "<eos>"


@dataclass
class PromptArguments:
    """The number of prompts."""

    _argument_group_name = "data"

    num_prompts: int = option("Random strings to train on.", default=512)
    num_eval_prompts: int = option(
        "Other random strings, on which the reward is reported.", default=64
    )

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "num_prompts", "num_eval_prompts")


@dataclass
class TrainArguments(ScriptArguments, SAMConfig, GRPOConfig):
    """The options of TRL's GRPOTrainer, of SAM, and of the comparison with plain training."""

    output_dir: str = option("Folder for the model, metrics and pictures.", "outputs/grpo")
    eval_on_start: bool = option("Evaluate the reward before the training too.", default=True)


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of digits among each completion's characters; 0 for an empty completion."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def make_prompts(count: int) -> datasets.Dataset:
    """Distinct random strings, the same in every run."""
    draw = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts["".join(draw.choices(CHARACTERS, k=PROMPT_LENGTH))] = None
    return datasets.Dataset.from_dict({"prompt": list(prompts)})


def build_model(
    args: ModelArguments, training_args: TrainArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer: a pretrained one, or a small Llama that writes characters.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    import transformers
    from common.experiment import load_pretrained, new_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if args.model_name_or_path is not None:
        trust = {"trust_remote_code": training_args.trust_remote_code}
        model = load_pretrained(transformers.AutoModelForCausalLM, args, **trust)
        return model, load_pretrained(transformers.AutoTokenizer, args, **trust)
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PAD, eos_token=EOS, padding_side="left"
    )
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=PROMPT_LENGTH + training_args.max_completion_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Derived from the other sizes, after --config_overrides has changed them.
    config.head_dim = config.num_key_value_heads = None
    return new_model(transformers.LlamaForCausalLM, config, args), tokenizer


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, make prompts, model and trainer, train, evaluate, save, push."""
    parser = OptionParser((PromptArguments, ModelArguments, TrainArguments), __doc__)
    # The automatic radius needs a loss that shows what was learned.
    parser.set_defaults(sam_rho=0.05)
    prompt_args, model_args, training_args = parser.parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.experiment import build_trainer, prepare, publish, train_and_compare
    from transformers import set_seed
    from trl import GRPOTrainer

    from sam_hf import with_sam

    resume_from = prepare(training_args, prompt_args)

    prompts = make_prompts(prompt_args.num_prompts + prompt_args.num_eval_prompts)
    set_seed(training_args.seed)
    model, tokenizer = build_model(model_args, training_args)
    build = partial(
        build_trainer,
        with_sam(GRPOTrainer),
        reward_funcs=reward,
        train_dataset=prompts.select(range(prompt_args.num_prompts)),
        eval_dataset=prompts.select(range(prompt_args.num_prompts, len(prompts))),
        processing_class=tokenizer,
    )
    trainer, runs = train_and_compare(
        build,
        model,
        training_args,
        resume_from,
        ["reward"],
        title="GRPO for digits",
        data_args=prompt_args,
        details={"model_arguments": asdict(model_args)},
    )
    if training_args.eval_on_start and trainer.is_world_process_zero():
        for run in runs:
            print(f"{run.name}: mean reward {run.curve[0][1]:.3f} before, {run.score:.3f} after")
    publish(trainer, model_name=Path(training_args.output_dir).name, tags=["sam_hf"])
    return runs


if __name__ == "__main__":
    run_script(main)

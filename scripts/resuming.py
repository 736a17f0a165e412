"""From which checkpoint a training goes on, and whether it can."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch
from script_utils import InputError, require_writable
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

# What the state of the optimizer overrules, or cannot be loaded into; then what draws the data.
_KEPT_BY_THE_OPTIMIZER = (
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_DRAWS_THE_DATA = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names: a folder, or "last" for the newest.

    Raises:
        InputError: there is none; or there is one, and a fresh run would mix with it; or
            --output_dir cannot be written to.
    """
    asked = args.resume_from_checkpoint
    require_writable(args.output_dir)
    checkpoints = sort_checkpoints(args.output_dir)
    # The Trainer writes its state last: a run that was killed may leave a folder without it.
    complete = [checkpoint for checkpoint in checkpoints if _is_complete(checkpoint)]
    if asked is None and checkpoints:
        raise InputError(
            f"--output_dir {args.output_dir!r} holds {Path(checkpoints[-1]).name} of an earlier "
            "run: go on from it with --resume_from_checkpoint last, or choose another --output_dir"
        )
    if asked == "last" and not complete:
        what = "no complete checkpoint" if checkpoints else "no checkpoint"
        raise InputError(f"--resume_from_checkpoint last: {what} in {args.output_dir!r}")
    if asked == "last":
        if complete[-1] != checkpoints[-1]:
            names = [Path(checkpoint).name for checkpoint in (checkpoints[-1], complete[-1])]
            warnings.warn(f"{names[0]} is not complete: going on from {names[1]}", stacklevel=2)
        asked = complete[-1]
    if asked is not None and not _is_complete(asked):
        raise InputError(f"--resume_from_checkpoint {asked!r} is neither a checkpoint nor 'last'")
    if asked is not None:
        _refuse_finished(asked, args)
        _refuse_other_settings(asked, args)
    return asked


def _refuse_finished(checkpoint: str, args: TrainingArguments) -> None:
    """The Trainer would go on by an update, or find nothing to count."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    option = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    done = state["global_step"] if args.max_steps > 0 else state["epoch"]
    if done >= getattr(args, option):
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} is at update {state['global_step']} (epoch "
            f"{state['epoch']:g}), and --{option} {getattr(args, option):g} ends the training "
            "there or before: nothing is left to do. Give more, or load the folder as a model"
        )


def _is_complete(checkpoint: str) -> bool:
    return (Path(checkpoint) / "trainer_state.json").is_file()


def _refuse_other_settings(checkpoint: str, args: TrainingArguments) -> None:
    """Of those that would be ignored without a word, or that make the rest another training."""
    try:
        before = torch.load(Path(checkpoint) / "training_args.bin", weights_only=False)
    except Exception:  # none, of another version or of another script: nothing to compare with
        return
    for names, why in (
        (_KEPT_BY_THE_OPTIMIZER, "the optimizer goes on as it was saved"),
        (_DRAWS_THE_DATA, "the examples that were seen would be others"),
    ):
        for name in names:
            was, now = getattr(before, name, None), getattr(args, name, None)
            if hasattr(before, name) and was != now:
                was, now = (getattr(value, "value", value) for value in (was, now))
                raise InputError(
                    f"--{name} {now}: {checkpoint} was made with {was}, and {why}. Give what it "
                    "was, or load the folder as a model in a new run"
                )


def load_checkpoint_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load what the Trainer (as of transformers 5.23) leaves out when it resumes.

    `save_pretrained` writes some architectures, ViT among them, with the parameter names of older
    versions. `from_pretrained` knows both; the Trainer takes those that it finds, and would go on
    with untrained layers.

    Raises:
        InputError: the checkpoint is of another model than the options describe.
    """
    if (Path(checkpoint) / "adapter_config.json").is_file():
        return  # the Trainer loads adapters as they are
    try:
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} is of another model than the options describe:"
            f" {str(error)[:200]}"
        ) from error
    # The Trainer still says which names it did not find.
    logging.getLogger("transformers.trainer").addFilter(
        lambda record: "keys in the checkpoint model loaded" not in record.getMessage()
    )

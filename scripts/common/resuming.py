"""From which checkpoint a training goes on, and whether it can."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.script_utils import InputError, require_writable
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import sort_checkpoints

SETTINGS_NAME = "training_settings.json"
_SETTINGS = ("data_arguments", "training_arguments", "examples_per_update")
# What the saved state of the optimizer overrules, or cannot be loaded into.
_OF_THE_OPTIMIZER = (
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_OF_THE_ORDER = ("seed", "data_seed", "dataloader_drop_last")
# Files may have moved, and what is evaluated does not matter to the training.
_NOT_OF_THE_DATA = ("train_file", "validation_file", "train_dir", "validation_dir")
_NOT_OF_THE_DATA += ("data_file", "max_eval_samples", "num_eval_prompts")


def checkpoint_to_resume(args: TrainingArguments, data_args: Any) -> str | None:
    """The checkpoint that --resume_from_checkpoint names: a folder, or True for the newest.

    Raises:
        InputError: there is none; or there is one, and a fresh run would mix with it; or it was
            made with other options than it can go on with; or --output_dir cannot be written to.
    """
    asked = args.resume_from_checkpoint
    if asked in ("True", "true"):  # as in the examples of transformers
        asked = "last"
    require_writable(args.output_dir)
    checkpoints = sort_checkpoints(args.output_dir)
    # The Trainer writes its state last: a run that was killed may leave a folder without it.
    complete = [checkpoint for checkpoint in checkpoints if _is_complete(checkpoint)]
    if asked is None and checkpoints:
        raise InputError(
            f"--output_dir {args.output_dir!r} holds {Path(checkpoints[-1]).name} of an earlier "
            "run: resume with --resume_from_checkpoint True, or choose another --output_dir"
        )
    if asked == "last" and not complete:
        what = "no complete checkpoint" if checkpoints else "no checkpoint"
        given = args.resume_from_checkpoint
        raise InputError(f"--resume_from_checkpoint {given}: {what} in {args.output_dir!r}")
    if asked == "last":
        if complete[-1] != checkpoints[-1]:
            names = [Path(checkpoint).name for checkpoint in (checkpoints[-1], complete[-1])]
            warnings.warn(f"{names[0]} is not complete: going on from {names[1]}", stacklevel=2)
        asked = complete[-1]
    if asked is not None and not _is_complete(asked):
        raise InputError(f"--resume_from_checkpoint {asked!r} is neither a checkpoint nor True")
    if asked is not None:
        _refuse_finished(asked, args)
        _refuse_other_settings(Path(asked), args, data_args)
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


def write_settings(args: TrainingArguments, data: dict[str, Any]) -> None:
    """Write next to the checkpoints to come what they are made with."""
    if args.process_index == 0:
        file = Path(args.output_dir) / SETTINGS_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_settings(args, data), indent=2) + "\n", encoding="utf-8")


def _settings(args: TrainingArguments, data: dict[str, Any]) -> dict[str, Any]:
    per_update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    values = (data, args.to_dict(), per_update)
    return dict(zip(_SETTINGS, values, strict=True))


def _refuse_other_settings(checkpoint: Path, args: TrainingArguments, data_args: Any) -> None:
    """Those that would be ignored without a word, or that would let the rest see other examples."""
    try:
        before = json.loads((checkpoint.parent / SETTINGS_NAME).read_text(encoding="utf-8"))
        before = {name: before[name] for name in _SETTINGS}
    except (OSError, ValueError, KeyError, TypeError):
        return  # of another program, or of another version: there is nothing to compare with
    now = json.loads(json.dumps(_settings(args, asdict(data_args))))
    has_optimizer = any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))
    if has_optimizer:
        why = "and the optimizer goes on as it was saved"
        _refuse_difference(checkpoint, before, now, "training_arguments", _OF_THE_OPTIMIZER, why)
    why = "and the rest of the epoch would have other examples"
    _refuse_difference(checkpoint, before, now, "training_arguments", _OF_THE_ORDER, why)
    names = [name for name in now["data_arguments"] if name not in _NOT_OF_THE_DATA]
    _refuse_difference(checkpoint, before, now, "data_arguments", names, why)
    was, is_now = before["examples_per_update"], now["examples_per_update"]
    if was != is_now:
        raise InputError(
            f"{is_now} examples an update (--per_device_train_batch_size times "
            f"--gradient_accumulation_steps times processes): {checkpoint} was made with {was}, "
            f"{why}"
        )


def _refuse_difference(
    checkpoint: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    part: str,
    names: Sequence[str],
    why: str,
) -> None:
    for name in names:
        if name not in before[part]:
            continue
        was, is_now = (_comparable(name, settings[part]) for settings in (before, now))
        if was != is_now:
            raise InputError(
                f"--{name} {is_now}: {checkpoint} was made with {was}, {why}. Give what it was, or "
                "load the folder as a model in a new run"
            )


def _comparable(name: str, options: dict[str, Any]) -> Any:
    """The value, the same for those that mean the same."""
    value = options[name]
    if name == "optim":
        return value.removesuffix("_fused")  # how AdamW is computed is saved with its state
    if name == "data_seed" and value is None:
        return options["seed"]
    return value or None if name == "optim_args" else value


def load_checkpoint_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load what the Trainer (as of transformers 5.23) leaves out when it resumes.

    `save_pretrained` writes some architectures, ViT among them, with the parameter names of older
    versions. `from_pretrained` knows both; the Trainer takes those that it finds, and would go on
    with untrained layers.

    Raises:
        InputError: the weights are damaged or missing, or those of another model.
    """
    if (Path(checkpoint) / "adapter_config.json").is_file():
        return  # the Trainer loads adapters as they are
    try:
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"--resume_from_checkpoint: the weights in {checkpoint} cannot be loaded into the "
            f"model that the options describe: {str(error)[:200]}"
        ) from error
    # The Trainer still says which names it did not find.
    logging.getLogger("transformers.trainer").addFilter(
        lambda record: "keys in the checkpoint model loaded" not in record.getMessage()
    )

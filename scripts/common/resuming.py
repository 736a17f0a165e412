"""Which checkpoint a training run resumes from, and whether it can."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common.cli import InputError
from common.runs import save_json
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.trainer_utils import sort_checkpoints

# Options that a resumed run would ignore, as the optimizer state has them, or mix with the old.
FIXED = (
    "optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 seed dataloader_drop_last"
)


def prepare(args: Any, data_args: Any) -> str | None:
    """Set the threads, and return the checkpoint to resume: a folder, or for True the newest."""
    if args.torch_num_threads is not None:
        torch.set_num_threads(args.torch_num_threads)
    require_writable(args.output_dir)
    asked, checkpoints = args.resume_from_checkpoint, sort_checkpoints(args.output_dir)
    if asked is None:
        if not checkpoints:
            return None
        found = f"{args.output_dir!r} holds {Path(checkpoints[-1]).name} of an earlier run"
        raise InputError(f"--output_dir {found}: choose another, or --resume_from_checkpoint True")
    # The Trainer writes its state last: a run that was killed may leave a folder without it.
    candidates = checkpoints if asked.lower() in ("true", "last") else [asked]
    complete = [c for c in candidates if (Path(c) / "trainer_state.json").is_file()]
    if not complete:
        raise InputError(f"--resume_from_checkpoint {asked}: no checkpoint in {args.output_dir!r}")
    checkpoint = Path(complete[-1])
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    end, now = ("max_steps", "global_step") if args.max_steps > 0 else ("num_train_epochs", "epoch")
    if state[now] >= getattr(args, end):
        raise InputError(f"--{end} {getattr(args, end):g}: {checkpoint} has already reached it")
    file = checkpoint.parent / "training_settings.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in json.loads(json.dumps(_settings(args, data_args))).items():
        if before.get(name, value) != value:
            change = f"{name} was {before[name]} and is {value}"
            raise InputError(f"{checkpoint}: {change}, which a resumed run cannot change")
    return str(checkpoint)


def _settings(args: Any, data_args: Any) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in FIXED.split()}
    settings["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    micro_batches = args.gradient_accumulation_steps * args.world_size
    settings["batch size of an update"] = args.train_batch_size * micro_batches
    data = asdict(data_args).items()  # files may have moved
    return settings | {k: v for k, v in data if not k.endswith("_file") and "eval" not in k}


def write_settings(args: Any, data_args: Any) -> None:
    """Write the settings that a resumed run must keep, next to the future checkpoints."""
    if args.process_index == 0:
        save_json(_settings(args, data_args), Path(args.output_dir) / "training_settings.json")


def require_writable(output_dir: str) -> None:
    """Raise an InputError if nothing can be written to the folder, which need not exist."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()  # root ignores permissions
    except OSError as error:
        raise InputError(f"--output_dir {output_dir!r} cannot be used: {error.strerror}") from error


def load_checkpoint_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load the weights that the Trainer (as of transformers 5.24) leaves out when it resumes.

    Those of ViT, for example, are saved under older names, which only `from_pretrained` knows.
    """
    if (Path(checkpoint) / "adapter_config.json").is_file():
        return  # the Trainer loads adapters as they are
    # The Trainer still lists the names that it does not know.
    logging.getLogger("transformers.trainer").addFilter(
        lambda record: "keys in the checkpoint model loaded" not in record.getMessage()
    )
    try:
        model.load_state_dict(
            type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"cannot be loaded into the model of the options: {str(error)[:200]}"
        raise InputError(f"--resume_from_checkpoint: {checkpoint} {reason}") from error

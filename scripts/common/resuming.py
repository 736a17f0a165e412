"""From which checkpoint a training resumes, and whether it can."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.cli import InputError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.trainer_utils import sort_checkpoints

# What a resumed run would ignore, since the optimizer's state has it, or would mix with the old.
_FIXED = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2")
_FIXED += ("adam_epsilon", "seed", "data_seed", "dataloader_drop_last")
_FILE = "training_settings.json"


def checkpoint_to_resume(args: Any, data_args: Any) -> str | None:
    """The checkpoint that --resume_from_checkpoint names: a folder, or True for the newest.

    Raises:
        InputError: there is none; a fresh run would mix with those of an earlier one; the
            checkpoint was made with other options; or --output_dir cannot be written to.
    """
    require_writable(args.output_dir)
    asked, checkpoints = args.resume_from_checkpoint, sort_checkpoints(args.output_dir)
    if asked is None and checkpoints:
        raise InputError(
            f"--output_dir {args.output_dir!r} holds {Path(checkpoints[-1]).name} of an earlier "
            "run: resume with --resume_from_checkpoint True, or choose another --output_dir"
        )
    if asked is None:
        return None
    # The Trainer writes its state last: a run that was killed may leave a folder without it.
    candidates = checkpoints if asked.lower() in ("true", "last") else [asked]
    complete = [c for c in candidates if (Path(c) / "trainer_state.json").is_file()]
    if not complete:
        raise InputError(f"--resume_from_checkpoint {asked}: no checkpoint in {args.output_dir!r}")
    checkpoint = Path(complete[-1])
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    end = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    if state["global_step" if args.max_steps > 0 else "epoch"] >= getattr(args, end):
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} is at update {state['global_step']}, and "
            f"--{end} {getattr(args, end):g} ends the training there or before"
        )
    file = checkpoint.parent / _FILE
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in json.loads(json.dumps(_settings(args, data_args))).items():
        if name in before and before[name] != value:
            raise InputError(
                f"--{name} {value}: {checkpoint} was made with {before[name]}, which a resumed "
                "run cannot change. To change it, load the folder as a model in a new run"
            )
    return str(checkpoint)


def _settings(args: Any, data_args: Any) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in _FIXED}
    settings["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    settings["per_device_train_batch_size times accumulation and processes"] = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    data = asdict(data_args).items()  # files may have moved
    return settings | {k: v for k, v in data if not k.endswith("_file") and "eval" not in k}


def write_settings(args: Any, data_args: Any) -> None:
    """Write next to the checkpoints to come what a resumed run has to keep."""
    if args.process_index == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        content = json.dumps(_settings(args, data_args), indent=2)
        (Path(args.output_dir) / _FILE).write_text(content + "\n", encoding="utf-8")


def require_writable(output_dir: str) -> None:
    """Raise an InputError if nothing can be written to the folder, which need not exist."""
    try:
        is_new = not Path(output_dir).exists()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:  # permissions tell root nothing
            file.write(b"x")
        if is_new:
            Path(output_dir).rmdir()  # until there is something to write
    except OSError as error:
        raise InputError(f"--output_dir {output_dir!r} cannot be used: {error.strerror}") from error


def load_checkpoint_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load the weights that the Trainer (as of transformers 5.24) leaves out when it resumes.

    `save_pretrained` writes some architectures, ViT among them, with older parameter names, which
    `from_pretrained` knows and the Trainer does not.

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

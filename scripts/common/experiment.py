"""The steps of a training script: check, load, train, compare with plain training, publish."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common.arguments import ClassifierArguments, ModelArguments
from common.cli import InputError
from common.resuming import load_checkpoint_weights, write_settings
from common.resuming import prepare as prepare
from common.runs import Run, format_runs, plot_curves, save_json, train
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import SaveStrategy

from sam_hf.diagnostics import SharpnessCallback


def load_pretrained(loader: Any, args: ModelArguments, **options: Any) -> Any:
    """Load --model_name_or_path with `loader`: a model, a tokenizer, an image processor.

    Models are loaded in fp32, in which the optimizer's small steps are not rounded away.
    """
    if hasattr(loader, "_model_mapping"):
        options["dtype"] = torch.float32
    if isinstance(args, ClassifierArguments) and "id2label" in options:
        options["ignore_mismatched_sizes"] = args.ignore_mismatched_sizes
    try:
        return loader.from_pretrained(args.model_name_or_path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--model_name_or_path {args.model_name_or_path!r}: {error}") from error


def new_model(model_class: Any, config: Any, args: ModelArguments) -> PreTrainedModel:
    """An untrained model of this configuration, changed by --config_overrides."""
    try:
        config.update_from_string(args.config_overrides) if args.config_overrides else None
        config.__post_init__()  # checks the values, and sets what depends on them
        config.name_or_path = "."  # not a name: the model card then says "trained from scratch"
        return model_class(config)
    except (ArithmeticError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"--config_overrides {args.config_overrides!r}: {e}") from e


def class_labels(names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """The classes as a model's configuration holds them."""
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def build_trainer(trainer_class: type[Trainer], args: Any, **options: Any) -> Any:
    """The trainer, and with --push_to_hub the repository on the Hub."""
    try:
        trainer = trainer_class(args=args, **options)
        if (every := getattr(args, "sharpness_every", None)) is not None:
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise ValueError("--sharpness_every is not supported with FSDP and DeepSpeed")
            examples = args.sharpness_examples
            trainer.add_callback(SharpnessCallback(trainer, every, examples=examples))
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(error) from error
    except Exception as error:  # the Hub's client has no base class for its errors
        if not args.push_to_hub:
            raise
        raise InputError(f"--push_to_hub: no repository can be made: {error}") from error
    if args.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise InputError(
            f"--dataloader_drop_last: no batch in {len(trainer.train_dataset)} examples"
        )
    return trainer


def train_and_compare(
    build: Callable[..., Trainer],
    model: PreTrainedModel,
    args: Any,
    resume_from: str | None,
    metrics: Sequence[str],
    title: str,
    data_args: Any,
    details: dict[str, Any],
    test_dataset: Any = None,
) -> tuple[Trainer, list[Run]]:
    """Train `model` and save it; with --compare_with_plain train its initial copy without SAM too.

    `results.json` is written after each training: an interrupt loses nothing that is finished. It
    holds `details` in addition to the options and the runs. The other parameters are as in `train`.
    """
    initial_model = copy.deepcopy(model) if args.compare_with_plain else None
    if resume_from is not None:
        load_checkpoint_weights(model, resume_from)
    trainer = build(args, model=model)
    is_main, folder, runs = trainer.is_world_process_zero(), Path(args.output_dir), list[Run]()
    if is_main:
        batch = f"{trainer.get_total_train_batch_size(args)} examples an update"
        where = f"{args.world_size} x {args.device.type}, {batch}"
        print(f"{model.config.model_type}: {model.num_parameters():,} parameters; {where}")
    if resume_from is None:  # not earlier: a refused start must leave no file
        write_settings(args, data_args)
    options = {"data_arguments": asdict(data_args), "training_arguments": args.to_dict()}

    def add(trainer: Trainer, *options_of_run: Any) -> None:
        name = method_name(trainer.args)
        runs.append(train(trainer, name, metrics, *options_of_run, test_dataset=test_dataset))
        if is_main:
            results = [asdict(run) | run.scores for run in runs]
            save_json({**details, "runs": results, **options}, folder / "results.json")

    add(trainer, resume_from, True)
    if initial_model is not None:
        plain = copy.copy(args)  # TRL's arguments cannot be rebuilt from their processed values
        plain.sam_rho, plain.push_to_hub, plain.output_dir = 0.0, False, str(folder / "plain")
        # The same compute as with SAM.
        plain.max_steps = round(trainer.state.global_step * runs[0].passes / runs[0].epochs)
        if not args.load_best_model_at_end:
            plain.save_strategy = SaveStrategy.NO
        add(build(plain, model=initial_model))
    if is_main:
        plot_curves(runs, title, folder / "curves.png")
        print(f"\n{title}, final models (pass: one forward and backward over the training set)")
        print(f"{format_runs(runs)}\nsaved in {folder}: model, results.json, curves.png")
    return trainer, runs


def method_name(args: Any) -> str:
    """'ASAM (rho 2)', or the optimizer's name where SAM is off."""
    if args.sam_rho != 0:
        rho = "auto" if args.sam_rho is None else f"{args.sam_rho:.4g}"
        return f"{args.sam_method.upper()} (rho {rho})"
    family = args.optim.value.split("_")[0]
    return {"adamw": "AdamW", "sgd": "SGD"}.get(family, family)


def publish(trainer: Trainer, **card: Any) -> None:
    """Write the model card, and push all that was saved if --push_to_hub asks for it."""
    if not trainer.args.push_to_hub:
        trainer.create_model_card(**card)
        return
    try:
        trainer.push_to_hub(**card)
    except Exception as error:  # the Hub's client has no base class for its errors
        notes = " ".join(getattr(error, "__notes__", []))  # how to push what is on disk
        raise InputError(f"--push_to_hub: {error} {notes}") from error

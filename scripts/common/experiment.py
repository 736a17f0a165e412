"""The course of a training script: check, load, train, compare with plain training, publish."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common.arguments import ClassifierArguments, ModelArguments, check_range
from common.cli import InputError
from common.resuming import checkpoint_to_resume, load_checkpoint_weights, write_settings
from common.runs import Run, format_runs, in_words, plot_curves, save_json, train
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import SaveStrategy

from sam_hf.config.file import is_missing_path
from sam_hf.diagnostics import SharpnessCallback

# The Trainer accepts less, and fails later or trains nothing.
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size")
_AT_LEAST_ONE += ("gradient_accumulation_steps",)
_AT_LEAST_ZERO = ("dataloader_num_workers", "learning_rate", "weight_decay", "adam_epsilon", "seed")
_AT_LEAST_ZERO += ("max_grad_norm",)


def prepare(args: Any, data_args: Any) -> str | None:
    """Check the training's options, set the threads, and return the checkpoint to resume from.

    Raises:
        InputError: an option has no effect here, or would let the evaluation data choose the
            model; or there is no such checkpoint, or it was made with other options.
    """
    try:
        check_range(args, 1, math.inf, *_AT_LEAST_ONE)
        check_range(args, 0, math.inf, *_AT_LEAST_ZERO)
    except ValueError as error:
        raise InputError(error) from error
    if args.max_steps != -1 and args.max_steps < 1:
        raise InputError(f"--max_steps must be 1 or more, or -1 (epochs), got {args.max_steps}")
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(f"--num_train_epochs must be above 0, got {args.num_train_epochs}")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 has no effect without a GPU: choose --bf16, or neither")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.world_size == 1:
        raise InputError("several processes without a GPU each train alone: give --use_cpu")
    if args.save_strategy == SaveStrategy.BEST or args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise InputError(
            "--save_strategy best and --lr_scheduler_type reduce_lr_on_plateau would choose the "
            "model on the test data"
        )
    no_effect = ("do_predict", "prediction_loss_only", "batch_eval_metrics", "label_names")
    choosing = ("load_best_model_at_end", "metric_for_best_model")
    for name in (*no_effect, *choosing):
        if getattr(args, name):
            why = "would choose the model on the test data" if name in choosing else "has no effect"
            raise InputError(f"--{name} {why} in this script, which reports the final model")
    if args.torch_num_threads is not None:
        torch.set_num_threads(args.torch_num_threads)
    return checkpoint_to_resume(args, data_args)


def load_pretrained(loader: Any, args: ModelArguments, **options: Any) -> Any:
    """What `loader` makes of --model_name_or_path: a model, a tokenizer, an image processor.

    Models are loaded in fp32, in which the optimizer's small steps are not rounded away.

    Raises:
        InputError: there is none, or the model's head has another number of classes.
    """
    name = args.model_name_or_path
    if is_missing_path(name):
        raise InputError(f"--model_name_or_path: there is no folder {name!r}")
    if hasattr(loader, "_model_mapping"):
        options["dtype"] = torch.float32
    if isinstance(args, ClassifierArguments) and "id2label" in options:
        options["ignore_mismatched_sizes"] = args.ignore_mismatched_sizes
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason: object = error
        if "ignore_mismatched_sizes" in str(error):
            reason = f"its head is not one for {len(options['id2label'])} classes; "
            reason += "--ignore_mismatched_sizes gives it a new one"
        raise InputError(f"--model_name_or_path {name!r}: {reason}") from error


def new_model(model_class: Any, config: Any, args: ModelArguments) -> PreTrainedModel:
    """An untrained model of this configuration, changed by --config_overrides.

    Raises:
        InputError: there is no such entry, or no such model can be made.
    """
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
    """The trainer, and with --push_to_hub the repository on the Hub.

    Raises:
        InputError: an option needs something that is not there: a package, a login, a connection;
            or there is no update to make.
    """
    try:
        trainer = trainer_class(args=args, **options)
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(error) from error
    except Exception as error:  # the Hub's client has no base class for its errors
        if not args.push_to_hub:
            raise
        raise InputError(f"--push_to_hub: no repository can be made: {error}") from error
    if args.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise InputError(
            f"--dataloader_drop_last leaves no batch of {len(trainer.train_dataset)} examples: "
            "choose a smaller --per_device_train_batch_size"
        )
    return trainer


def train_and_compare(
    build: Callable[..., Trainer],
    model: PreTrainedModel,
    args: Any,
    resume_from: str | None,
    metrics: Sequence[str],
    *,
    title: str,
    data_args: Any,
    details: dict[str, Any],
    test_dataset: Any = None,
) -> tuple[Trainer, list[Run]]:
    """Train `model` and save it; with --compare_with_plain train its initial copy without SAM too.

    `results.json` is written after each training: an interrupt loses nothing that is finished.

    Args:
        build: makes the trainer of `args` and `model`.
        metrics: the names, without `eval_`, of what is reported; the first is what counts.
        title: of the table and of the picture.
        details: what `results.json` holds in addition to the options and the runs.
        test_dataset: what the final models are evaluated on, if not the trainer's `eval_dataset`.

    Returns:
        The trainer of `model`, and one or two runs.
    """
    initial_model = copy.deepcopy(model) if args.compare_with_plain else None
    if resume_from is not None:
        load_checkpoint_weights(model, resume_from)
    trainer = build(args, model=model)
    _measure_sharpness(trainer, args)
    if trainer.is_world_process_zero():
        batch = trainer.get_total_train_batch_size(args)
        print(
            f"{model.config.model_type}: {model.num_parameters():,} parameters; "
            f"{args.world_size} x {args.device.type}, {batch} examples an update"
        )
    if resume_from is None:  # not earlier: a start that is refused leaves no file
        write_settings(args, data_args)
    options = {
        "data_arguments": dataclasses.asdict(data_args),
        "training_arguments": args.to_dict(),
    }
    runs: list[Run] = []

    def add(trainer: Trainer, args: Any, *options_of_run: Any) -> None:
        runs.append(train(trainer, method_name(args), metrics, *options_of_run, test_dataset))
        results = [dataclasses.asdict(run) | run.scores for run in runs]
        if trainer.is_world_process_zero():
            content = {**details, "runs": results, **options}
            save_json(content, Path(output_dir) / "results.json")

    output_dir = args.output_dir
    add(trainer, args, resume_from, True)
    if initial_model is not None:
        plain_args = _plain_arguments(args, runs[0], trainer.state.global_step)
        plain_trainer = build(plain_args, model=initial_model)
        _measure_sharpness(plain_trainer, plain_args)
        add(plain_trainer, plain_args, None, False)
    if trainer.is_world_process_zero():
        plot_curves(
            runs,
            f"{title}: {runs[0].curve_data} {in_words(metrics[0])} against compute",
            Path(output_dir) / "curves.png",
        )
        print(f"\n{title}, final models (pass: one forward and backward over the training set)")
        print(f"{format_runs(runs)}\nsaved in {output_dir}: model, results.json, curves.png")
    return trainer, runs


def _measure_sharpness(trainer: Trainer, args: Any) -> None:
    every = getattr(args, "sharpness_every", None)
    if every is None:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "--sharpness_every is not supported with FSDP and DeepSpeed: measure the saved model "
            "with `sam-hf sharpness`"
        )
    try:
        examples = args.sharpness_examples or 256
        trainer.add_callback(SharpnessCallback(trainer, every, examples=examples))
    except ValueError as error:
        raise InputError(f"--sharpness_every: {error}") from error


def method_name(args: Any) -> str:
    """'ASAM (rho 2)', or the optimizer's name where SAM is off."""
    if args.sam_rho > 0:
        return f"{args.sam_method.upper()} (rho {args.sam_rho:.4g})"
    family = args.optim.value.split("_")[0]
    return {"adamw": "AdamW", "sgd": "SGD"}.get(family, family)


def _plain_arguments(args: Any, sam: Run, sam_steps: int) -> Any:
    """The same training without SAM, lengthened until it has computed as much."""
    plain = copy.copy(args)  # TRL's arguments cannot be built again from what they have become
    loads_best = args.load_best_model_at_end  # from a checkpoint: these are needed then
    vars(plain).update(
        compare_with_plain=False,
        sam_rho=0.0,
        max_steps=round(sam_steps * sam.passes / sam.epochs),
        output_dir=str(Path(args.output_dir) / "plain"),
        save_strategy=args.save_strategy if loads_best else SaveStrategy.NO,
        push_to_hub=False,
        resume_from_checkpoint=None,
    )
    return plain


def publish(trainer: Trainer, **card: Any) -> None:
    """Write the model card, and push all that was saved if --push_to_hub asks for it.

    Raises:
        InputError: the push failed. All is on disk, and the message says how to push it.
    """
    if not trainer.args.push_to_hub:
        trainer.create_model_card(**card)
        return
    try:
        trainer.push_to_hub(**card)
    except Exception as error:  # the Hub's client has no base class for its errors
        notes = " ".join(getattr(error, "__notes__", []))
        raise InputError(f"--push_to_hub: {error} {notes}") from error

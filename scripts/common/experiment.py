"""The course of a training script: check, train, compare with plain training, save, publish."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common.resuming import checkpoint_to_resume, load_checkpoint_weights, write_settings
from common.script_utils import InputError, check_training_arguments
from common.shared_arguments import ClassifierArguments, ModelArguments, SharpnessArguments
from common.training_utils import (
    LayoutLine,
    Run,
    format_runs,
    in_words,
    plot_curves,
    save_json,
    train,
)
from transformers import AutoConfig, PreTrainedModel, Trainer
from transformers.trainer_utils import SaveStrategy

from sam_hf.config.file import is_missing_path
from sam_hf.diagnostics import SharpnessCallback


def prepare(args: Any, data_args: Any) -> str | None:
    """Check the training's options, set the threads, and say from which checkpoint to go on.

    Raises:
        InputError: an option has no effect here, or there is no such checkpoint, or it was made
            with other options or other data.
    """
    check_training_arguments(args)
    resume_from = checkpoint_to_resume(args, data_args)
    if args.torch_num_threads is not None:
        torch.set_num_threads(args.torch_num_threads)
    return resume_from


def load_pretrained(loader: Any, args: ModelArguments, **options: Any) -> Any:
    """What `loader` makes of --model_name_or_path: a model, a tokenizer, an image processor.

    Raises:
        InputError: there is none, or the model's head has another number of classes.
    """
    if is_missing_path(args.model_name_or_path):
        raise InputError(f"--model_name_or_path: there is no folder {args.model_name_or_path!r}")
    try:
        return loader.from_pretrained(args.model_name_or_path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason: object = error
        if "ignore_mismatched_sizes" in str(error):
            reason = f"no head for {len(options['id2label'])} classes; see the report above. "
            reason += "--ignore_mismatched_sizes gives it a new one"
        raise InputError(f"--model_name_or_path {args.model_name_or_path!r}: {reason}") from error


def load_classifier(loader: Any, args: ClassifierArguments, **config: Any) -> PreTrainedModel:
    """The pretrained model, in fp32 whatever it is stored in: bf16 swallows the perturbation."""
    model = load_pretrained(
        loader,
        args,
        dtype=torch.float32,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **config,
    )
    _warn_of_other_classes(args, list(config.get("id2label", {}).values()))
    return model


def _warn_of_other_classes(args: ClassifierArguments, names: list[str]) -> None:
    """A head with as many classes keeps its weights, whatever they were the weights of."""
    before = load_pretrained(AutoConfig, args)
    has_head = any("Classification" in name for name in before.architectures or [])
    known = [name for _, name in sorted(before.id2label.items())]
    is_named = known != [f"LABEL_{i}" for i in range(len(known))]
    if has_head and is_named and len(known) == len(names) and known != names:
        old, new = (", ".join(map(str, each[:5])) for each in (known, names))
        warnings.warn(
            f"--model_name_or_path {args.model_name_or_path!r}: its head was trained for the "
            f"classes {old}, in this order, and goes on as that of {new}",
            stacklevel=3,
        )


def class_labels(names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """The classes as a model's configuration holds them."""
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def build_trainer(trainer_class: type[Trainer], args: Any, **options: Any) -> Any:
    """The trainer. It makes the Hub's repository too, if it is to push.

    Raises:
        InputError: an option needs something that is not there: a package, a login, a connection;
            or there is no update to make.
    """
    try:
        trainer = trainer_class(args=args, **options)
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(error) from error
    except Exception as error:  # the Hub's client has no base class for what may go wrong
        if not args.push_to_hub:
            raise
        raise InputError(f"--push_to_hub: no repository can be made: {error}") from error
    if args.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise InputError(
            f"--dataloader_drop_last leaves nothing of {len(trainer.train_dataset)} training "
            f"examples in batches of {args.train_batch_size}, one for each of {args.world_size} "
            "processes: choose a smaller --per_device_train_batch_size"
        )
    return trainer


def train_and_compare(
    build: Callable[..., Trainer],
    model: PreTrainedModel,
    args: Any,
    resume_from: str | None = None,
    metrics: Sequence[str] = ("accuracy",),
    *,
    details: dict[str, Any],
    test_dataset: Any = None,
) -> tuple[Trainer, list[Run]]:
    """Train `model` and save it; with --compare_with_plain train its initial copy without SAM too.

    `results.json` is written after each training: an interrupt loses nothing that is finished.

    Args:
        build: makes the trainer of `args` and `model`.
        metrics: the names, without `eval_`, of what is reported; the first is what counts.
        details: what `results.json` is to hold in addition to the runs and the training's options;
            `data_arguments` among it.
        test_dataset: what the final models are evaluated on, if not the trainer's `eval_dataset`.

    Returns:
        The trainer of `model`, and one or two runs.
    """
    initial_model = copy.deepcopy(model) if args.compare_with_plain else None
    if resume_from is not None:
        load_checkpoint_weights(model, resume_from)
    trainer = build(args, model=model)
    watch_sharpness(trainer, args)
    if trainer.is_world_process_zero():
        print(f"{model.config.model_type}: {model.num_parameters():,} parameters")
    trainer.add_callback(LayoutLine(trainer))
    if resume_from is None:  # not earlier: a start that is refused leaves no file
        write_settings(args, details["data_arguments"])
    test = {"test_dataset": test_dataset}
    runs = [train(trainer, method_name(args), resume_from, metrics, save=True, **test)]
    _write_results(trainer, runs, details)
    if initial_model is not None:
        plain_args = plain_arguments(args, runs[0], trainer.state.global_step)
        plain_trainer = build(plain_args, model=initial_model)
        watch_sharpness(plain_trainer, plain_args)
        runs.append(train(plain_trainer, method_name(plain_args), metrics=metrics, **test))
        _write_results(trainer, runs, details)
    return trainer, runs


def _write_results(trainer: Trainer, runs: Sequence[Run], details: dict[str, Any]) -> None:
    if trainer.is_world_process_zero():
        results = {
            **details,
            "runs": [dataclasses.asdict(run) | run.scores for run in runs],
            "training_arguments": trainer.args.to_dict(),
        }
        save_json(results, Path(trainer.args.output_dir) / "results.json")


def watch_sharpness(trainer: Trainer, args: Any) -> None:
    """Let --sharpness_every have its way, in scripts that have this option.

    Raises:
        InputError: the weights are not whole, or there are no examples to measure on.
    """
    if not isinstance(args, SharpnessArguments) or args.sharpness_every is None:
        return
    layouts = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    for layout, is_used in layouts.items():
        if is_used:
            raise InputError(
                f"--sharpness_every does not go with {layout}: measure the saved model with "
                "`sam-hf sharpness`"
            )
    examples = args.sharpness_examples or 256
    try:
        trainer.add_callback(SharpnessCallback(trainer, args.sharpness_every, examples=examples))
    except ValueError as error:
        raise InputError(f"--sharpness_every: {error}") from error


def method_name(args: Any) -> str:
    """'ASAM (rho 2)', or the optimizer's name where SAM is off."""
    if args.sam_rho > 0:
        return f"{args.sam_method.upper()} (rho {args.sam_rho:.4g})"
    family = args.optim.value.split("_")[0]
    return {"adamw": "AdamW", "sgd": "SGD"}.get(family, family)


def plain_arguments(args: Any, sam: Run, sam_steps: int) -> Any:
    """The same training without SAM, lengthened until it has computed as much."""
    plain = copy.copy(args)  # TRL's arguments cannot be built anew from what they have become
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


def show_results(trainer: Trainer, runs: Sequence[Run], title: str, saved: str) -> None:
    """Print the scores, and draw the curves."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    metric = in_words(runs[0].metric)
    heading = f"{title}: {runs[0].curve_data} {metric} against compute"
    plot_curves(runs, heading, folder / "curves.png")
    print(f"\n{title}, final models (pass: one forward and backward over the training set)")
    callbacks = trainer.callback_handler.callbacks
    is_measured = any(isinstance(callback, SharpnessCallback) for callback in callbacks)
    pictures = "curves.png, sharpness.png" if is_measured else "curves.png"
    print(f"{format_runs(runs)}\nsaved in {folder}: {saved}, results, {pictures}")


def publish(trainer: Trainer, card: dict[str, Any]) -> None:
    """Write the model card, and push all that was saved if --push_to_hub asks for it.

    Raises:
        InputError: the push failed. All is on disk, and the message says how to push it.
    """
    if not trainer.args.push_to_hub:
        trainer.create_model_card(**card)
        return
    try:
        trainer.push_to_hub(**card)
    except Exception as error:  # the Hub's client has no base class for what may go wrong
        notes = " ".join(getattr(error, "__notes__", []))
        raise InputError(f"--push_to_hub: {error} {notes}") from error

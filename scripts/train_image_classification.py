"""Train an image classifier with SAM or ASAM, on the Hub's images or your own.

Examples:
    python scripts/train_image_classification.py configs/digits_asam.yaml
    python scripts/train_image_classification.py configs/digits_asam.yaml --sam_rho 1.0 --seed 1
    python scripts/train_image_classification.py configs/vit_cifar10.yaml --bf16
    python scripts/train_image_classification.py --train_dir path/to/folder --image_size 32 \\
        --sam_rho 0.1 --output_dir outputs/my_images

The options may come from a YAML file, from the command line, or from both: the command line wins.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from image_arguments import DataArguments, ModelArguments, TrainArguments
from image_data import ImageData, ImageTensors, load_image_data
from script_utils import (
    InputError,
    OptionParser,
    check_training_arguments,
    checkpoint_to_resume,
    run_script,
)
from training_utils import (
    Run,
    format_runs,
    load_checkpoint_weights,
    load_metric,
    plot_curves,
    save_json,
    train,
)
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from sam_hf import SAMTrainer


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, compare, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)
    check_training_arguments(training_args)
    resume_from = checkpoint_to_resume(training_args)
    if training_args.torch_num_threads is not None:
        torch.set_num_threads(training_args.torch_num_threads)

    data = load_image_data(data_args)
    set_seed(training_args.seed)
    model, processor = build_model(model_args, data)
    mode = "L" if model.config.num_channels == 1 else "RGB"
    common: dict[str, Any] = {
        "train_dataset": ImageTensors(data.train, processor, mode, data_args.augment),
        "eval_dataset": ImageTensors(data.test, processor, mode),
        "processing_class": processor,
        "compute_metrics": compute_accuracy(),
    }
    initial_model = copy.deepcopy(model) if training_args.compare_with_plain else None
    if resume_from is not None:
        load_checkpoint_weights(model, resume_from)
    trainer = build_trainer(model, training_args, common)
    if trainer.is_world_process_zero():
        print(
            f"{data.describe()}\n{model.config.model_type}: {model.num_parameters():,} parameters"
        )

    runs = [train(trainer, method_name(training_args), resume_from)]
    trainer.save_model()
    if initial_model is not None:
        plain_args = plain_arguments(training_args, runs[0], trainer.state.global_step)
        plain_trainer = build_trainer(initial_model, plain_args, common)
        runs.append(train(plain_trainer, method_name(plain_args)))

    if trainer.is_world_process_zero():
        save_results(runs, data, data_args, model_args, training_args)
    card: dict[str, Any] = {
        "tasks": "image-classification",
        "tags": ["image-classification", "sam_hf"],
        "dataset": data.name,
        "dataset_tags": data_args.hub_dataset,
    }
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return runs


def build_model(args: ModelArguments, data: ImageData) -> tuple[PreTrainedModel, Any]:
    """The model, with a class for each of the data's, and the image processor that goes with it.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    labels = {
        "id2label": dict(enumerate(data.class_names)),
        "label2id": {name: i for i, name in enumerate(data.class_names)},
    }
    if args.model_name_or_path is not None:
        try:
            # Pillow's processors are the same on every machine; torchvision need not be there.
            # fp32, whatever the checkpoint is stored in: bf16 weights swallow the perturbation.
            processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, backend="pil")
            model = AutoModelForImageClassification.from_pretrained(
                args.model_name_or_path,
                dtype=torch.float32,
                ignore_mismatched_sizes=args.ignore_mismatched_sizes,
                **labels,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason: object = error
            if "ignore_mismatched_sizes" in str(error):
                reason = f"no head for {len(labels['id2label'])} classes; see the report above. "
                reason += "--ignore_mismatched_sizes gives it a new one"
            raise InputError(
                f"--model_name_or_path {args.model_name_or_path!r}: {reason}"
            ) from error
        return model, processor

    width, height = data.train.image(0).size
    if args.image_size is None and width != height:
        raise InputError(
            f"--image_size is needed: the first image is {width} x {height}, no square"
        )
    image_size = args.image_size or width
    patch_size = args.patch_size or max(1, image_size // 4)
    hidden_size, heads = args.hidden_size or 64, args.num_attention_heads or 4
    for name, size, part, parts in (
        ("image_size", image_size, patch_size, "patch_size"),
        ("hidden_size", hidden_size, heads, "num_attention_heads"),
    ):
        if size % part:  # the model would silently leave out the rest
            raise InputError(f"--{name} {size} must be a multiple of --{parts}, which is {part}")
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=args.num_hidden_layers or 4,
        num_attention_heads=heads,
        intermediate_size=args.intermediate_size or 2 * hidden_size,
        **labels,
    )
    model = ViTForImageClassification(config)
    # A folder's name instead of none at all: the model card then says "trained from scratch".
    model.config.name_or_path = "."
    processor = ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,  # grey images too: `pipeline` hands over three channels in any case
    )
    return model, processor


def build_trainer(
    model: PreTrainedModel, args: TrainArguments, common: dict[str, Any]
) -> SAMTrainer:
    """The trainer. It makes the Hub's repository too, if it is to push.

    Raises:
        InputError: an option needs something that is not there: a package, a login, a connection.
    """
    try:
        return SAMTrainer(model=model, args=args, **common)
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(error) from error
    except Exception as error:  # the Hub's client has no base class for what may go wrong
        if not args.push_to_hub:
            raise
        raise InputError(f"--push_to_hub: no repository can be made: {error}") from error


def compute_accuracy() -> Callable[[EvalPrediction], dict[str, float]]:
    metric = load_metric("accuracy")
    return lambda prediction: metric.compute(
        predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
    )


def method_name(args: TrainArguments) -> str:
    """'ASAM (rho 2)', or the optimizer's name where SAM is off."""
    if args.sam_rho > 0:
        return f"{args.sam_method.upper()} (rho {args.sam_rho:g})"
    family = args.optim.value.split("_")[0]
    return {"adamw": "AdamW", "sgd": "SGD"}.get(family, family)


def plain_arguments(args: TrainArguments, sam: Run, sam_steps: int) -> TrainArguments:
    """The same training without SAM, lengthened until it has computed as much."""
    return dataclasses.replace(
        args,
        compare_with_plain=False,
        sam_rho=0.0,
        max_steps=round(sam_steps * sam.passes / sam.epochs),
        output_dir=str(Path(args.output_dir) / "plain"),
        save_strategy="no",
        push_to_hub=False,
        resume_from_checkpoint=None,
    )


def save_results(
    runs: list[Run],
    data: ImageData,
    data_args: DataArguments,
    model_args: ModelArguments,
    training_args: TrainArguments,
) -> None:
    """Print the accuracies; save them with the settings and the picture of the curves."""
    folder = Path(training_args.output_dir)
    results = {
        "data": data.describe(),
        "runs": [dataclasses.asdict(r) for r in runs],
        "data_arguments": dataclasses.asdict(data_args),
        "model_arguments": dataclasses.asdict(model_args),
        "training_arguments": training_args.to_dict(),
    }
    save_json(results, folder / "results.json")
    plot_curves(runs, f"{data.title}: test accuracy against compute", folder / "curves.png")
    print(f"\n{data.title}, final models (pass: one forward and backward over the training set)")
    print(f"{format_runs(runs)}\nsaved in {folder}: model, image processor, results, curves.png")


if __name__ == "__main__":
    run_script(main)

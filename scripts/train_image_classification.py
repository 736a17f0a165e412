"""Train an image classifier with SAM or ASAM, on the Hub's images or your own.

Examples:
    python scripts/train_image_classification.py configs/digits_asam.yaml
    python scripts/train_image_classification.py configs/digits_asam.yaml --sam_rho 1.0 --seed 1
    python scripts/train_image_classification.py configs/vit_cifar10.yaml --bf16
    python scripts/train_image_classification.py --model_type wide_resnet --depth 10 --width 1 \\
        --optim sgd --learning_rate 0.1 --sam_rho 0.1
    python scripts/train_image_classification.py --train_dir path/to/folder --image_size 32 \\
        --sam_rho 0.1 --output_dir outputs/my_images

The options may come from a YAML file, from the command line, or from both: the command line wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common.classification import run_classification
from common.experiment import (
    build_trainer,
    class_labels,
    load_classifier,
    load_pretrained,
    prepare,
)
from common.image_arguments import DataArguments, ModelArguments, TrainArguments
from common.image_data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    ImageData,
    ImageTensors,
    LabeledImages,
    load_image_data,
)
from common.script_utils import InputError, OptionParser, run_script
from common.shared_arguments import require_multiple
from common.training_utils import Run, load_metric
from common.wide_resnet import WideResNetConfig, WideResNetForImageClassification
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

# A model, and the mean and the standard deviation that its images are normalised with.
_Untrained = tuple[PreTrainedModel, Sequence[float], Sequence[float]]


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, search, train, compare, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)
    resume_from = prepare(training_args, data_args)

    data = load_image_data(data_args)
    set_seed(training_args.seed)
    model, processor = build_model(model_args, data)
    mode = "L" if model.config.num_channels == 1 else "RGB"

    compute_metrics = compute_accuracy()

    def trainer_on(train: LabeledImages, test: LabeledImages) -> Callable[..., SAMTrainer]:
        return partial(
            build_trainer,
            SAMTrainer,
            train_dataset=ImageTensors(train, processor, mode, data_args.augment),
            eval_dataset=ImageTensors(test, processor, mode),
            processing_class=processor,
            compute_metrics=compute_metrics,
        )

    return run_classification(
        trainer_on,
        model,
        data,
        data_args,
        model_args,
        training_args,
        resume_from,
        task="image-classification",
        saved="model, image processor",
    )


def build_model(args: ModelArguments, data: ImageData) -> tuple[PreTrainedModel, Any]:
    """The model, with a class for each of the data's, and the image processor that goes with it.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    labels = class_labels(data.class_names)
    if args.model_name_or_path is not None:
        model = load_classifier(AutoModelForImageClassification, args, **labels)
        # Pillow's processors are the same on every machine; torchvision need not be there.
        return model, load_pretrained(AutoImageProcessor, args, backend="pil")

    width, height = data.train.image(0).size
    if args.image_size is None and width != height:
        raise InputError(
            f"--image_size is needed: the first image is {width} x {height}, no square"
        )
    image_size = args.image_size or width
    build = _wide_resnet if args.model_type == "wide_resnet" else _vit
    model, mean, std = build(args, image_size, labels)
    # A folder's name instead of none at all: the model card then says "trained from scratch".
    model.config.name_or_path = "."
    processor = ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,  # grey images too: `pipeline` hands over three channels in any case
    )
    return model, processor


def _vit(args: ModelArguments, image_size: int, labels: dict[str, Any]) -> _Untrained:
    patch_size = args.patch_size or max(1, image_size // 4)
    require_multiple("image_size", image_size, "patch_size", patch_size)
    config = ViTConfig(
        image_size=image_size, patch_size=patch_size, **args.encoder_sizes(), **labels
    )
    return ViTForImageClassification(config), [0.5] * 3, [0.5] * 3


def _wide_resnet(args: ModelArguments, image_size: int, labels: dict[str, Any]) -> _Untrained:
    try:
        config = WideResNetConfig(image_size=image_size, **args.wide_resnet_sizes(), **labels)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    return WideResNetForImageClassification(config), CIFAR10_MEAN, CIFAR10_STD


def compute_accuracy() -> Callable[[EvalPrediction], dict[str, float]]:
    metric = load_metric("classification", "single_label_classification")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        scores = metric.compute(
            predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
        )
        return {"accuracy": scores["accuracy"]}

    return compute


if __name__ == "__main__":
    run_script(main)

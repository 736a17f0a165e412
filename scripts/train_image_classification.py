"""Train an image classifier with SAM or ASAM, on the Hub's images or your own.

Examples:
    python scripts/train_image_classification.py configs/digits_asam.yaml
    python scripts/train_image_classification.py configs/vit_cifar10.yaml --bf16
    python scripts/train_image_classification.py --model_type wide_resnet \\
        --config_overrides depth=10,width=1 --optim sgd --learning_rate 0.1 --sam_rho 0.1
    python scripts/train_image_classification.py --dataset_name path/to/folder \\
        --eval_fraction 0.2 --config_overrides image_size=32 --output_dir outputs/my_images

The options come from a YAML file, the command line, or both: the command line wins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import datasets
import torch
from common.arguments import (
    ClassifierArguments,
    LabeledDataArguments,
    SharpnessArguments,
    check_used,
    option,
)
from common.cli import InputError, OptionParser, run_script
from common.data import encode_labels, load_sets, require_column, split_and_draw, with_label_noise

from sam_hf import SAMTrainingArguments

if TYPE_CHECKING:
    from common.runs import Run
    from transformers import EvalPrediction, PreTrainedModel

# Statistics of the channels of CIFAR-10's training images, in [0, 1].
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CACHE_BYTES = 2**30  # tensors of a data set up to this size are made once: all of CIFAR-10


@dataclass
class DataArguments(LabeledDataArguments):
    """Images. The built-in ones are the 1,797 handwritten digits of scikit-learn."""

    image_column: str | None = option("Column with the images. 'image' if not given.")
    augment: bool = option(
        "Train on random crops (padding: 1/8 of the side) and flips. Wrong for digits.", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_used(self, ["image_column"], not self.is_built_in, "on the built-in examples")


@dataclass
class ModelArguments(ClassifierArguments):
    """A pretrained model, or an untrained ViT or Wide-ResNet."""

    model_type: Literal["vit", "wide_resnet"] | None = option(
        "Which untrained model is made. It takes images of the size of the first training image, "
        "unless --config_overrides names an image_size. vit if not given."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_used(self, ["model_type"], not self.model_name_or_path, "with --model_name_or_path")


@dataclass
class TrainArguments(SharpnessArguments, SAMTrainingArguments):
    """The options of training, of SAM, and of the comparison with plain training."""

    output_dir: str = option(
        "Folder for the model, metrics and pictures.", "outputs/image_classification"
    )


def load_data(args: DataArguments) -> tuple[str, datasets.Dataset, datasets.Dataset, list[str]]:
    """The data's name, both sets with the columns `image` and `labels`, and the classes.

    Raises:
        InputError: there is no such source or column, or it holds no images or labels.
    """
    image, label = args.image_column or "image", args.label_column or "label"
    name, (train, test) = load_sets(args, "digits", _digits)
    sets = (_select(train, image, label), test and _select(test, image, label))
    sets, class_names = encode_labels(sets, label)
    train, test = split_and_draw(args, sets, stratify="labels")
    train = with_label_noise(train, len(class_names), args.label_noise)
    train, test = (data.rename_columns({image: "image"}) for data in (train, test))
    return name, train, test, class_names


def _digits() -> tuple[datasets.Dataset, None]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = (digits.images * (255 / 16)).round().astype("uint8")  # 17 grey levels
    label = datasets.ClassLabel(names=[str(i) for i in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": list(scans), "label": digits.target}
    return datasets.Dataset.from_dict(columns, features), None


def _select(data: datasets.Dataset, image: str, label: str) -> datasets.Dataset:
    """The image column, cast to images, and the label column."""
    require_column(data, "image_column", image)
    require_column(data, "label_column", label)
    try:
        data = data.select_columns([image, label]).cast_column(image, datasets.Image())
        data[0][image].load()
    except Exception as error:  # not bytes or a path, or not those of an image
        raise InputError(f"--image_column {image!r} does not hold images: {error}") from error
    return data


class ImageTensors(torch.utils.data.Dataset):
    """`pixel_values` from the model's image processor, and `labels`.

    A small set is processed once. A large one is processed on access, by the loader's workers.
    """

    def __init__(self, data: datasets.Dataset, processor: Any, mode: str, augment: bool = False):
        self.images, self.labels = data.select_columns(["image"]), data["labels"][:]
        self._processor, self._mode, self._augment = processor, mode, augment
        self._kept: torch.Tensor | None = None
        first = self._process(0)
        if first.nbytes * len(data) <= CACHE_BYTES:
            # One tensor: the workers of a data loader share its memory.
            self._kept = first.new_empty((len(data), *first.shape))
            for i in range(len(data)):
                self._kept[i] = self._process(i)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._process(index) if self._kept is None else self._kept[index]
        pixels = random_crop_and_flip(pixels) if self._augment else pixels
        return {"pixel_values": pixels, "labels": int(self.labels[index])}

    def _process(self, index: int) -> torch.Tensor:
        try:
            image = self.images[int(index)]["image"].convert(self._mode)
        except (OSError, AttributeError) as error:  # broken, or none at all
            raise InputError(f"image {index} of its data set cannot be read: {error}") from error
        return self._processor(image, return_tensors="pt")["pixel_values"][0]


def random_crop_and_flip(pixels: torch.Tensor) -> torch.Tensor:
    """A crop of (channels, height, width) after padding by 1/8, flipped half of the time."""
    _, height, width = pixels.shape
    pad_y, pad_x = height // 8, width // 8
    padded = torch.nn.functional.pad(pixels, (pad_x, pad_x, pad_y, pad_y))  # with the mean colour
    top, left = int(torch.randint(2 * pad_y + 1, ())), int(torch.randint(2 * pad_x + 1, ()))
    cropped = padded[:, top : top + height, left : left + width]
    return cropped.flip(-1) if torch.rand(()) < 0.5 else cropped


def build_model(
    args: ModelArguments, class_names: list[str], image_size: tuple[int, int]
) -> tuple[PreTrainedModel, Any]:
    """The model, with an output for each class, and its image processor.

    Raises:
        InputError: there is no such model, or the sizes do not fit together.
    """
    import transformers
    from common.experiment import class_labels, load_pretrained, new_model
    from models.wide_resnet import WideResNetConfig, WideResNetForImageClassification

    labels = class_labels(class_names)
    if args.model_name_or_path is not None:
        model = load_pretrained(transformers.AutoModelForImageClassification, args, **labels)
        # Pillow's processors are the same on every machine, and do not need torchvision.
        return model, load_pretrained(transformers.AutoImageProcessor, args, backend="pil")

    side, height = image_size
    if side != height and "image_size=" not in (args.config_overrides or ""):
        raise InputError(f"--config_overrides image_size=... is needed: {side} x {height} images")
    if args.model_type == "wide_resnet":
        mean, std = CIFAR10_MEAN, CIFAR10_STD
        wide_resnet = WideResNetConfig(image_size=side, **labels)
        model = new_model(WideResNetForImageClassification, wide_resnet, args)
    else:
        mean = std = (0.5, 0.5, 0.5)
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 128, "image_size": side, "patch_size": max(1, side // 4)}
        vit = transformers.ViTConfig(**sizes, **labels)
        model = new_model(transformers.ViTForImageClassification, vit, args)
        of = model.config.to_dict()
        for a, b in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if of[a] % of[b]:  # the model would cut off the remainder
                raise InputError(f"--config_overrides: {b}={of[b]} must divide {a}={of[a]}")
    processor = transformers.ViTImageProcessorPil(
        size={"height": model.config.image_size, "width": model.config.image_size},
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,  # grey images too: `pipeline` always passes three channels
    )
    return model, processor


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> list[Run]:
    """Parse the options, build data, model and trainer, train, evaluate, save, push."""
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments), __doc__)
    data_args, model_args, training_args = parser.parse(argv)

    # Not at the top: they take seconds to import, and `--help` does not need them.
    from common.experiment import build_trainer, prepare, publish, train_and_compare
    from transformers import set_seed

    from sam_hf import SAMTrainer

    resume_from = prepare(training_args, data_args)
    name, train, test, class_names = load_data(data_args)
    title = data_args.title(name)
    summary = f"{title}: {len(train)} training and {len(test)} test images"
    if training_args.process_index == 0:
        print(f"{summary}, {len(class_names)} classes")

    set_seed(training_args.seed)
    model, processor = build_model(model_args, class_names, train[0]["image"].size)
    mode = "L" if model.config.num_channels == 1 else "RGB"
    build = partial(
        build_trainer,
        SAMTrainer,
        train_dataset=ImageTensors(train, processor, mode, data_args.augment),
        eval_dataset=ImageTensors(test, processor, mode),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    details = {"data": summary, "model_arguments": asdict(model_args)}
    report = {"title": title, "data_args": data_args, "details": details}
    trainer, runs = train_and_compare(
        build, model, training_args, resume_from, ["accuracy"], **report
    )
    card = {"tasks": "image-classification", "tags": ["image-classification", "sam_hf"]}
    publish(trainer, **card, dataset=title, dataset_tags=data_args.hub_dataset)
    return runs


if __name__ == "__main__":
    run_script(main)

"""Train an image classifier in a custom loop: `sam.backward` replaces `accelerator.backward`.

Examples:
    python scripts/train_loop.py
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train_loop.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from common.arguments import ClassifierArguments, check_range, option
from common.cli import InputError, OptionParser, run_script

from sam_hf import SAMConfig


@dataclass
class LoopArguments:
    dataset_name: str | None = option("Labelled images; scikit-learn's digits if not given.")
    num_train_epochs: int = option("Epochs.", default=10)
    batch_size: int = option("Examples of a micro-batch, on each process.", default=64)
    accumulation_steps: int = option("Micro-batches of an update.", default=1)
    learning_rate: float = option("Peak learning rate of AdamW; cosine decay.", default=1e-3)
    seed: int = option("Seed of the model, of the order and of dropout.", default=42)
    use_cpu: bool = option("Train on the CPU, even if there is a GPU.", default=False)
    output_dir: str = option("Folder of the model and of its checkpoints.", default="outputs/loop")
    resume_from_checkpoint: str | None = option("Folder of a checkpoint, such as .../epoch_3.")

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "num_train_epochs", "batch_size", "accumulation_steps")
        check_range(self, 0, math.inf, "learning_rate", "seed")
        folder = self.resume_from_checkpoint
        if folder is not None and not (Path(folder) / "custom_checkpoint_0.pkl").is_file():
            raise ValueError(f"--resume_from_checkpoint {folder!r}: there is no checkpoint")


def load_data(name: str | None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test images, in the columns `image` and `labels`."""
    if name is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = datasets.ClassLabel(names=[str(i) for i in range(10)])
        columns = {"image": list(digits.images.astype("uint8") * 15), "labels": digits.target}
        kinds = datasets.Features({"image": datasets.Image(), "labels": labels})
        data = datasets.Dataset.from_dict(columns, kinds)
        return tuple(data.train_test_split(0.2, stratify_by_column="labels", seed=0).values())
    try:
        sets = [datasets.load_dataset(name, split=split) for split in ("train", "test")]
        kinds = {type(feature): name for name, feature in sets[0].features.items()}
        columns = {kinds[datasets.Image]: "image", kinds[datasets.ClassLabel]: "labels"}
    except Exception as error:  # there are a dozen kinds
        raise InputError(f"--dataset_name {name!r}: {error!r}") from error
    train, test = (data.select_columns([*columns]).rename_columns(columns) for data in sets)
    return train, test


def build_model(args: ClassifierArguments, train: datasets.Dataset) -> tuple[Any, Any]:
    """The model, with an output for each class, and its image processor."""
    import transformers
    from common.experiment import class_labels, load_pretrained, new_model

    labels = class_labels(train.features["labels"].names)
    if args.model_name_or_path is not None:
        model = load_pretrained(transformers.AutoModelForImageClassification, args, **labels)
        return model, load_pretrained(transformers.AutoImageProcessor, args, backend="pil")
    side = train[0]["image"].height
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "image_size": side, "patch_size": side // 4}
    config = transformers.ViTConfig(**sizes, **labels)
    size = {"height": side, "width": side}
    processor = transformers.ViTImageProcessorPil(size=size, do_convert_rgb=True)
    return new_model(transformers.ViTForImageClassification, config, args), processor


def main(argv: list[str] | None = None) -> float:
    """Train, evaluate after every epoch, save; returns the accuracy on the test images."""
    parser = OptionParser((LoopArguments, ClassifierArguments, SAMConfig), __doc__)
    args, model_args, sam_config = parser.parse(argv)
    from accelerate import Accelerator, DataLoaderConfiguration
    from common.resuming import require_writable
    from transformers import get_scheduler, set_seed

    from sam_hf import SAM

    require_writable(args.output_dir)
    accelerator = Accelerator(
        cpu=args.use_cpu,
        gradient_accumulation_steps=args.accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(args.seed)
    train_set, test_set = load_data(args.dataset_name)
    model, processor = build_model(model_args, train_set)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        labels = torch.tensor([row["labels"] for row in rows])
        return {**processor(images, return_tensors="pt"), "labels": labels}

    train, test = (
        torch.utils.data.DataLoader(data, args.batch_size, shuffle, collate_fn=collate)
        for data, shuffle in ((train_set, True), (test_set, False))
    )
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    updates = args.num_train_epochs * math.ceil(len(train) / args.accumulation_steps)
    steps = updates * accelerator.num_processes  # a prepared scheduler steps for each of them
    scheduler = accelerator.prepare(get_scheduler("cosine", optimizer, 0, steps))
    sam = SAM(model, optimizer, sam_config, accelerator=accelerator, total_steps=updates)
    accelerator.register_for_checkpointing(sam)

    first = 0
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)
        first = int(args.resume_from_checkpoint.rstrip("/").rpartition("_")[2])
    for epoch in range(first, args.num_train_epochs):
        model.train()
        train.set_epoch(epoch)
        for batch in train:
            with accelerator.accumulate(model):
                loss = sam.backward(lambda: model(**batch).loss)  # noqa: B023
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        hits = []
        for batch in test:
            with torch.no_grad():
                predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            hits.append(accelerator.gather_for_metrics(predicted == batch["labels"]))
        accuracy = torch.cat(hits).float().mean().item()
        metrics = {name: round(value, 3) for name, value in sam.metrics().items()}
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.4f}", metrics)
        accelerator.save_state(f"{args.output_dir}/epoch_{epoch + 1}")

    if accelerator.is_main_process:
        for part in (accelerator.unwrap_model(model), processor, sam_config):
            part.save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()  # a process that ends before the others may abort
    accelerator.end_training()
    return accuracy


if __name__ == "__main__":
    run_script(main)

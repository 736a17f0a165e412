"""The part of a model card that says how SAM trained the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import metadata_load, metadata_save

from . import __version__
from .config import SAMConfig
from .methods import METHODS, Method
from .options_file import replacing

if TYPE_CHECKING:
    from transformers import Trainer

# Comments, so that they are not seen, and a part that others append stays outside.
_BEGIN, _END = "<!-- sam_hf: begin -->", "<!-- sam_hf: end -->"
_FOUND = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_TAG = "sharpness-aware-minimization"

_READINGS = {
    "sam_sharpness": "L(w + e) − L(w), the mean over the updates since the log before",
    "sam_perturbation_norm": "‖e‖₂ as it was applied",
    "sam_ascent_grad_norm": "‖g‖₂ at w",
    "sam_grad_cosine": "cosine between the gradients at w and at w + e",
}
_SHARE = "part of ‖e‖²"


def describe(path: Path, config: SAMConfig, trainer: Trainer) -> None:
    """Put the tags and the section of SAM in a model card, in the place of those it has.

    Args:
        path: the card, which is made if there is none.
        config: the options of the run.
        trainer: it knows the layout, the metrics and the readings.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {repository_name(trainer)}\n"
    section = f"{_BEGIN}\n{_section(path, config, trainer)}\n{_END}\n"
    if _FOUND.search(text):
        text = _FOUND.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    _write(path, text, tags=[config.sam_method, _TAG])


def forget(path: Path) -> None:
    """Take the section and the tags of an earlier run with SAM out of a card that has them."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _FOUND.search(text):
        _write(path, _FOUND.sub("", text).rstrip() + "\n", tags=[])


def _write(path: Path, text: str, tags: list[str]) -> None:
    """Write the card, with these tags in the place of those that `describe` gave it before."""
    with replacing(path) as card:
        card.write_text(text, encoding="utf-8")
        data = metadata_load(card) or {}
        others = data.get("tags") or []
        others = [others] if isinstance(others, str) else others
        kept = [tag for tag in others if tag not in (*METHODS, _TAG)]
        metadata_save(card, data | {"tags": [*kept, *tags]})


def _section(path: Path, config: SAMConfig, trainer: Trainer) -> str:
    method = METHODS[config.sam_method]
    ignored = config.options_of_other_methods()
    settings = [(f"`{k}`", f"`{v}`") for k, v in config.to_sam_dict().items() if k not in ignored]
    parts = [
        "## Sharpness-aware minimization",
        f"Trained with {method.__name__} (`sam_hf` {__version__}): w are the weights, g is the "
        f"gradient at w, e the perturbation. In one line: {_summary(method)}",
        _table(("setting", "value"), settings),
        _table(("layout", ""), _layout(trainer)),
    ]
    latest = _latest(trainer.state.log_history)
    metrics = [
        (f"`{name}`", *seen)
        for name, seen in latest.items()
        if name in ("loss", "train_loss")
        or (name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")))
    ]
    if metrics:
        parts += ["The last metrics:", _table(("metric", "value", "step"), metrics)]
    readings = [
        (f"`{name}`", *seen, _READINGS.get(name, _SHARE if "_share_" in name else ""))
        for name, seen in latest.items()
        if name.startswith("sam_")
    ]
    if readings:
        parts += [
            "The last readings of SAM:",
            _table(("reading", "value", "step", "meaning"), readings),
        ]
    for callback in trainer.callback_handler.callbacks:
        if more := getattr(callback, "model_card_section", lambda folder: None)(path.parent):
            parts.append(more)
    parts += [
        "To train on with the same settings:",
        "```python\n"
        "from sam_hf import SAMConfig, SAMTrainer\n\n"
        f'sam_config = SAMConfig.from_pretrained("{repository_name(trainer)}")\n'
        "trainer = SAMTrainer(..., sam_config=sam_config)  # or with_sam(SFTTrainer)(...)\n"
        "```",
        f"Cite {method.__name__} as:",
        f"```bibtex\n{method.citation}\n```",
    ]
    return "\n\n".join(parts)


def _summary(method: type[Method]) -> str:
    """The first line of the method's docstring."""
    return (inspect.getdoc(method) or "").splitlines()[0].replace("ε", "e")


def _layout(trainer: Trainer) -> list[tuple[str, Any]]:
    accelerator, args = trainer.accelerator, trainer.args
    return [
        ("distributed type", accelerator.distributed_type.value),
        ("processes", accelerator.num_processes),
        ("device", accelerator.device.type),
        ("mixed precision", accelerator.mixed_precision),
        ("micro-batch", trainer.state.train_batch_size or args.train_batch_size),
        ("micro-batches accumulated", args.gradient_accumulation_steps),
        ("examples in an update", trainer.get_total_train_batch_size(args)),
    ]


def _latest(history: list[dict[str, Any]]) -> dict[str, tuple[str, Any]]:
    """The last value of each entry of the logs, and the step at which it was logged."""
    latest = {}
    for entry in history:
        for name, value in entry.items():
            number = f"{value:.4g}" if isinstance(value, float) else str(value)
            latest[name] = (number, entry.get("step", ""))
    return latest


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    # A bar or a line break would end the cell: a regular expression may have them.
    cells = ([str(x).replace("|", r"\|").replace("\n", " ") for x in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def repository_name(trainer: Trainer) -> str:
    """The name of the model's repository, or what the Trainer would call it."""
    name = trainer.hub_model_id or trainer.args.hub_model_id
    return str(name or Path(str(trainer.args.output_dir)).absolute().name)

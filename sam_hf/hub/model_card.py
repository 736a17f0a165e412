"""Section and tags of SAM in a model card."""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save
from transformers import Trainer

from .. import __version__
from ..config import SAMConfig
from ..config.checks import method_options
from ..config.file import replacing
from ..methods import METHODS

# HTML comments, invisible in the rendered card, delimit the section. Text around it is kept.
_BEGIN, _END = "<!-- sam_hf: begin -->", "<!-- sam_hf: end -->"
_SECTION_PATTERN = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_TAG = "sharpness-aware-minimization"
_METRIC_PATTERN = re.compile(r"(train_)?loss|eval_.*(?<!_runtime)(?<!_per_second)")

_MEANINGS = {
    "sam_sharpness": "L(w + e) − L(w), averaged over the updates since the previous log",
    "sam_rho": "radius of the update",
    "sam_perturbation_norm": "‖e‖₂ as applied",
    "sam_ascent_grad_norm": "‖g‖₂ at w",
    "sam_grad_cosine": "cosine similarity of the gradients at w and w + e",
}


def update_card(path: Path, config: SAMConfig, trainer: Trainer) -> None:
    """Add or replace the section and the tags of SAM in a model card, created if it is missing.

    With `sam_rho=0`, those that an earlier SAM run added are removed.

    ValueError, yaml.YAMLError: the card is not valid UTF-8, or its front matter not valid YAML.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {repository_name(trainer)}\n"
    before, *after = _SECTION_PATTERN.split(text)
    tags = [config.sam_method, _TAG] if config.sam_rho != 0 else []
    if tags:
        section = f"{_BEGIN}\n{_section(path.parent, config, trainer)}\n{_END}\n"
        text = (before if after else f"{before.rstrip()}\n\n") + section + "".join(after)
    elif after:
        text = (before + "".join(after)).rstrip() + "\n"
    else:
        return
    with replacing(path) as card:
        card.write_text(text, encoding="utf-8")
        data = metadata_load(card) or {}
        others = data.get("tags") or []
        others = [others] if isinstance(others, str) else others
        kept = [tag for tag in others if tag not in (*METHODS, _TAG)]
        metadata_save(card, data | {"tags": [*kept, *tags]})


def repository_name(trainer: Trainer) -> str:
    """Name of the model's repository on the Hub; by default that of its output folder."""
    name = trainer.hub_model_id or trainer.args.hub_model_id
    return str(name or Path(str(trainer.args.output_dir)).absolute().name)


def _section(folder: Path, config: SAMConfig, trainer: Trainer) -> str:
    method = METHODS[config.sam_method]
    summary = (inspect.getdoc(method) or "").splitlines()[0].replace("ε", "e")
    # Options that have an effect, with all options of the method, also those left at defaults.
    built, unused = config.build_method(), config.options_without_effect()
    method_args = {name: getattr(built, name) for name in method_options(method)}
    settings = config.to_sam_dict() | {"sam_method_args": method_args}
    settings["sam_rho"] = "auto" if config.sam_rho is None else config.sam_rho
    rows = [(f"`{k}`", f"`{v}`") for k, v in settings.items() if k not in unused and v != {}]
    accelerator, args = trainer.accelerator, trainer.args
    layout = [
        ("distributed type", accelerator.distributed_type.value),
        ("processes", accelerator.num_processes),
        ("device", accelerator.device.type),
        ("mixed precision", accelerator.mixed_precision),
        ("micro-batch size", trainer.state.train_batch_size or args.train_batch_size),
        ("gradient accumulation steps", args.gradient_accumulation_steps),
        ("examples per update", trainer.get_total_train_batch_size(args)),
    ]
    parts = [
        "## Sharpness-aware minimization",
        f"Trained with {method.__name__} (`sam_hf` {__version__}), where w are the weights, g is "
        f"the gradient at w, and e the perturbation. Summary: {summary}",
        markdown_table(("setting", "value"), rows),
        markdown_table(("layout", ""), layout),
    ]
    latest: dict[str, tuple[Any, ...]] = {}
    for entry in trainer.state.log_history:
        step = entry.get("step", "")
        latest |= {name: (f"`{name}`", value, step) for name, value in entry.items()}
    header = ("metric", "value", "step")
    if metrics := [row for name, row in latest.items() if _METRIC_PATTERN.fullmatch(name)]:
        parts += ["Last logged metrics:", markdown_table(header, metrics)]
    sam_metrics = [
        (*row, _MEANINGS.get(name, "share of ‖e‖²" if "_share_" in name else ""))
        for name, row in latest.items()
        if name.startswith("sam_")
    ]
    if sam_metrics:
        parts += ["Last logged metrics of SAM:", markdown_table((*header, "meaning"), sam_metrics)]
    for callback in trainer.callback_handler.callbacks:
        if more := getattr(callback, "model_card_section", lambda folder: None)(folder):
            parts.append(more)
    parts += [
        "To continue training with the same SAM settings:",
        "```python\n"
        "from sam_hf import SAMConfig, SAMTrainer\n\n"
        f'sam_config = SAMConfig.from_pretrained("{repository_name(trainer)}")\n'
        "trainer = SAMTrainer(..., sam_config=sam_config)  # or with_sam(SFTTrainer)(...)\n"
        "```",
        f"Cite {method.__name__} as:",
        f"```bibtex\n{method.citation}\n```",
    ]
    return "\n\n".join(parts)


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Markdown table. Bars and line breaks, which would end a cell, are escaped or replaced."""
    lines = [header, ("---",) * len(header), *rows]
    texts = ([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in lines)
    cells = ([text.replace("|", r"\|").replace("\n", " ") for text in row] for row in texts)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)

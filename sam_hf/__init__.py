"""sam_hf: sharpness-aware minimization for Hugging Face.

from sam_hf import SAMConfig, SAMTrainer

trainer = SAMTrainer(model=model, args=args, train_dataset=data, sam_config=SAMConfig())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# transformers imports its Trainer, and torch with it, on first access. So does this package:
# `import sam_hf` is as quick as `import transformers`.
_MODULES = {
    "SAM": "loop",
    "SAMConfig": "config",
    "SAMTrainingArguments": "config",
    "SAMSeq2SeqTrainer": "trainer",
    "SAMTrainer": "trainer",
    "SAMTrainerMixin": "trainer",
    "with_sam": "trainer",
}

if TYPE_CHECKING:
    from .config import SAMConfig, SAMTrainingArguments
    from .loop import SAM
    from .trainer import SAMSeq2SeqTrainer, SAMTrainer, SAMTrainerMixin, with_sam

__all__ = [
    "SAM",
    "SAMConfig",
    "SAMSeq2SeqTrainer",
    "SAMTrainer",
    "SAMTrainerMixin",
    "SAMTrainingArguments",
    "with_sam",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
    except AttributeError as error:  # Python would report a missing attribute of this module
        raise ImportError(f"{__name__}.{_MODULES[name]} cannot be imported: {error}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""The options of SAM, their checks, and the file that stores them with a model."""

from .sam_config import SAMConfig, SAMTrainingArguments

__all__ = ["SAMConfig", "SAMTrainingArguments"]

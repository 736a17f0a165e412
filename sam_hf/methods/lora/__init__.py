"""Methods for LoRA adapters."""

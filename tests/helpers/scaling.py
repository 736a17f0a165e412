"""Runs with a gradient scaler, alone or under DDP, in which gradients overflow where told."""

from __future__ import annotations

import math
from typing import Any

import torch
from faulty import Faulty, bad_gradient
from tiny import Classifier, arguments, examples, weights
from torch import Tensor
from transformers import Trainer, TrainerCallback

from sam_hf import SAMConfig, SAMTrainer

UPDATES = 4


class _Scaled:
    """Does on a CPU what Accelerate does for fp16 on a GPU alone."""

    scaling: list[Any] | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.scaling is not None:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", *self.scaling)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        before = weights(self.model)
        loss = super().training_step(model, *args, **kwargs)
        after = self.model.state_dict()
        self.is_restored &= all(torch.equal(after[name], w) for name, w in before.items())
        return loss


class Log(TrainerCallback):
    """What there is to compare after each update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        optimizer, scaler = objects["optimizer"], objects["optimizer"].scaler
        states = optimizer.state_dict()["state"]
        self.updates.append(
            {
                "skipped": optimizer.step_was_skipped,
                "scale": scaler and scaler.get_scale(),
                "growth_tracker": scaler and scaler._get_growth_tracker(),
                "scheduler": objects["lr_scheduler"].last_epoch,
                "update": state.global_step,
                "optimizer": [
                    torch.as_tensor(value).clone()
                    for _, entries in sorted(states.items())
                    for _, value in sorted(entries.items())
                ],
                "weights": weights(objects["model"]),
            }
        )


def run(
    sam: dict[str, Any] | None,
    scaling: list[Any] | None,
    faults: list[int] | None = None,
    model: str = "faulty",
    **args: Any,
) -> dict[str, Any]:
    """Train, and tell what was seen; the plain Trainer where `sam` is None.

    Args:
        scaling: the arguments of the scaler after the device, or None for a run without one.
            Autocast leaves the numbers of a float64 model as they are.
        faults: the forward passes whose gradient overflows.
        model: "faulty" (in float64), or "autocast" for a float32 one.
    """
    torch.manual_seed(0)
    log, dtype = Log(), torch.float64 if model == "faulty" else torch.float32
    if model == "faulty":
        module = Faulty(dict.fromkeys(faults or [], bad_gradient(math.inf)), noise=0.0)
    else:
        module = Classifier(dtype=dtype)
    base = Trainer if sam is None else SAMTrainer
    trainer_class = type("ScaledTrainer", (_Scaled, base), {"scaling": scaling})
    trainer_class.is_restored = sam is not None
    trainer = trainer_class(
        model=module,
        args=arguments(fp16=scaling is not None, **{"max_steps": UPDATES, **args}),
        train_dataset=examples(4 * 2 * 2 * UPDATES, dtype=dtype),
        callbacks=[log],
        **({} if sam is None else {"sam_config": SAMConfig(**sam)}),
    )
    trainer.train()
    return {
        "updates": log.updates,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "is_restored": trainer.is_restored,
        "wrapper": type(trainer.model_wrapped).__name__,
        "faults_left": len(getattr(module, "faults", ())),
    }

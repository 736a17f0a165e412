"""Training loops with `SAM`, with and without Accelerate, for comparison with the twins."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from method_twins import RHO
from torch import Tensor, nn
from torch.utils.data import default_collate

from sam_hf import SAM, SAMConfig

KINDS = ("plain", "accelerate")


def new_accelerator(steps: int = 1, **options: Any) -> Accelerator:
    """An accelerator on the CPU that knows of no other one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=steps, **options)


class Loop:
    """A loop as users write it.

    Args:
        kind: "plain" or "accelerate".
        model: trained by SGD with learning rate 0.1, or by the optimizer given.
        sam: options of SAM.
        steps: micro-batches of an update.
    """

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        sam: dict[str, Any] | None = None,
        steps: int = 1,
        optimizer: Any = None,
        **options: Any,
    ) -> None:
        self.steps = steps
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
        self.accelerator = new_accelerator(steps) if kind == "accelerate" else None
        if self.accelerator is not None:
            model, optimizer = self.accelerator.prepare(model, optimizer)
            options["accelerator"] = self.accelerator
        self.model, self.optimizer = model, optimizer
        config = SAMConfig(**{"sam_rho": RHO, **(sam or {})})
        self.sam = SAM(model, optimizer, config, **options)
        self._moved: SimpleQueue[list[str]] = SimpleQueue()  # no state that SAM would restore

    @property
    def selected(self) -> list[str]:
        """The parameters that were not at w in the latest pass that moved any."""
        found = []
        while not self._moved.empty():
            found = self._moved.get() or found
        return found

    def update(self, window: list[list[dict[str, Tensor]]]) -> list[float]:
        """Make an update of micro-batches of rows; returns their losses."""
        model, sam, optimizer = self.model, self.sam, self.optimizer
        w = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses = []
        for number, rows in enumerate(window, 1):
            batch = default_collate(rows)

            def closure() -> Any:
                moved = [n for n, p in model.named_parameters() if not torch.equal(p, w[n])]
                self._moved.put(moved)
                loss = model(**batch)["loss"]  # noqa: B023 - as loops do
                return loss if self.accelerator is not None else loss / len(window)

            is_end = number == len(window)
            if self.accelerator is not None:
                with self.accelerator.accumulate(model):
                    losses.append(sam.backward(closure).item())
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            losses.append(sam.backward(closure, end_of_update=is_end).item() * len(window))
            if is_end:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

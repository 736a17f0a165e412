"""What holds from the beginning of one `train()` to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .backends import Backend
from .config import SAMConfig
from .params import parameter_groups, select_parameters
from .readings import Readings
from .replay import BufferGuard, Tape


class Run:
    """The method, the parameters, the tape and the readings of one `train()`.

    Args:
        config: the options in force.
        model: the model, not wrapped, so that its parameters have their own names.
        optimizer: the optimizer, or None where there is none yet.
    """

    def __init__(
        self, config: SAMConfig, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.method = config.build_method()
        self.perturbed = select_parameters(model, config.sam_params)
        self.groups = parameter_groups(model)
        self.backend = Backend(list(self.perturbed.values()))
        self.tape = Tape(self.backend.rng_devices)
        self.buffers = BufferGuard(model)
        self.readings = Readings()
        self.ascent_loss: Tensor | None = None
        self.was_reached = False
        # A loss may own parameters that are not the model's: their gradients are replayed too.
        groups = optimizer.param_groups if optimizer is not None else []
        in_optimizer = (p for group in groups for p in group["params"])
        self._parameters = list(dict.fromkeys([*model.parameters(), *in_optimizer]))

    # `.grad` can only be read and set one parameter at a time, here and below.
    def perturbed_with_gradient(self) -> tuple[list[str], list[Tensor]]:
        """The names and weights of the perturbed parameters that have a gradient."""
        names = [name for name, p in self.perturbed.items() if p.grad is not None]
        if not names:
            raise RuntimeError(
                "No perturbed parameter has a gradient after the ascent pass. Either the loss does "
                "not depend on those that sam_params selects, or the optimizer consumes the "
                "gradients inside backward: choose an optim that steps after it, or set sam_rho=0."
            )
        return names, [self.perturbed[name] for name in names]

    def clear_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None

    @contextmanager
    def gradients_set_aside(self) -> Iterator[None]:
        """Start without gradients; at the end, add those that were there before.

        If the block fails, its gradients are dropped.
        """
        kept = [(p, p.grad) for p in self._parameters if p.grad is not None]
        for p, _ in kept:
            p.grad = None
        try:
            yield
            both = [(g, p.grad) for p, g in kept if p.grad is not None]
            if both:
                torch._foreach_add_([g for g, _ in both], [new for _, new in both])
        except BaseException:
            self.tape.take()
            self.ascent_loss = None
            self.clear_gradients()
            raise
        finally:
            for p, g in kept:
                p.grad = g

"""What holds from the beginning of one `train()` to its end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend_for, reshard
from .config import SAMConfig
from .methods import Dot
from .params import parameter_groups, select_parameters
from .perturbation import Perturbation, step_size
from .readings import Readings, measure
from .replay import BufferGuard, RecordedCall, Tape
from .side_effects import undoing


class Run:
    """The method, the parameters, the tape and the readings of one `train()`.

    Args:
        config: the options in force.
        trainer: the Trainer, with its model and its optimizer as they are while it trains.
    """

    def __init__(self, config: SAMConfig, trainer: Any) -> None:
        model: nn.Module = trainer.model  # not wrapped: its parameters have their own names
        reshard(model)
        self.method = config.build_method()
        self.perturbed = select_parameters(model, config.sam_params)
        self.groups = parameter_groups(model)
        self.backend = backend_for(trainer, list(self.perturbed.values()))
        self.tape = Tape(self.backend.rng_devices)
        self.buffers = BufferGuard(model)
        self.readings = Readings()
        self.was_reached = False
        self._has_perturbed = False
        self._loss_scale: Tensor | None = None
        self._is_loss_scale_checked = False
        self._ascent_loss: Tensor | None = None
        self._sharpness: Tensor | None = None
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        # A loss may own parameters that are not the model's: their gradients are replayed too.
        groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
        in_optimizer = (p for group in groups for p in group["params"])
        self._in_model = list(model.parameters())
        self._parameters = list(dict.fromkeys([*self._in_model, *in_optimizer]))

    def add_ascent_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of L(w)."""
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()  # the difference to L(w + e) would be rounding
        self._ascent_loss = loss if self._ascent_loss is None else self._ascent_loss + loss

    def take_ascent_loss(self) -> Tensor:
        """L(w) of the calls that are replayed together."""
        loss, self._ascent_loss = self._ascent_loss, None
        assert loss is not None
        return loss

    def add_sharpness(self, difference: Tensor, is_last: bool) -> None:
        """Add a share of L(w + e) - L(w) to that of the update, and note it when complete."""
        self._sharpness = difference if self._sharpness is None else self._sharpness + difference
        if is_last:
            self.readings.add_sharpness(self._sharpness)
            self._sharpness = None

    def note_loss_scale(self, calls: list[RecordedCall], returned: Tensor) -> None:
        """Remember by what a training step multiplied the loss of its calls."""
        if self._loss_scale is None:
            losses = [call.loss for call in calls if call.loss is not None]
            self._loss_scale = returned / torch.stack(losses).sum()

    def check_loss_scale(self, trainer: str, call: RecordedCall, returned: Tensor) -> None:
        """Once, since it waits for the device: whether Trainer's own step multiplies by the same.

        Raises:
            RuntimeError: it does not, so the replay would not be that of the training step.
        """
        if self._is_loss_scale_checked or self._loss_scale is None or call.loss is None:
            return
        ours, theirs = float(returned / call.loss), float(self._loss_scale)
        if not (math.isfinite(ours) and math.isfinite(theirs)):  # the loss was 0 or no number
            self._loss_scale = None
            return
        self._is_loss_scale_checked = True
        if abs(ours - theirs) > 0.02 * abs(ours):  # a loss in bfloat16 is no more exact
            raise RuntimeError(
                f"{trainer}.training_step returned {theirs:.4g} times what compute_loss returned; "
                f"Trainer's own returns {ours:.4g} times it. SAM replays compute_loss through "
                "Trainer.training_step, so that what is done to the loss elsewhere would be lost "
                "in the second pass. Do it in compute_loss, or set sam_rho=0."
            )

    # `.grad` can only be read and set one parameter at a time, here and below.
    def perturbed_with_gradient(self) -> dict[str, Tensor]:
        """The perturbed parameters that have a gradient, by their names.

        Raises:
            RuntimeError: none ever had one, or a gradient is sparse.
        """
        found: dict[str, Tensor] = {n: p for n, p in self.perturbed.items() if p.grad is not None}
        self._has_perturbed |= bool(found)
        if not self._has_perturbed:
            raise RuntimeError(
                "No perturbed parameter has a gradient after the first ascent pass. Either the "
                "loss does not depend on those that sam_params selects, or the optimizer consumes "
                "gradients inside backward: choose an optim that steps after it, or set sam_rho=0."
            )
        if sparse := [name for name, p in found.items() if _has_sparse_gradient(p)]:
            raise RuntimeError(
                f"{', '.join(sparse)}: the gradient is sparse, and SAM needs dense ones. Make it "
                "with sparse=False, or set sam_rho=0."
            )
        return found

    @torch.no_grad()
    def perturb(
        self,
        perturbed: dict[str, Tensor],
        perturbation: Perturbation,
        rho: float,
        is_measured: bool,
    ) -> Tensor:
        """Write w + e, from the gradients in `.grad`; the factor that made e of the direction.

        What is made of g dies here, so that its memory is free for g_s.
        """
        parameters = list(perturbed.values())
        dot = self.backend.dot_over(parameters)
        grads = self.backend.gradients(parameters)
        if is_measured:
            norm = dot(grads, grads).sqrt()
            self.readings.set(ascent_grad_norm=self.backend.unscaled(norm))
        direction, squared_norm = self.method.direction(
            list(perturbed), perturbation.weights, grads, dot
        )
        scale = step_size(rho, squared_norm)
        perturbation.apply(direction, scale)
        return scale

    @torch.no_grad()
    def measure(self, perturbed: dict[str, Tensor], perturbation: Perturbation) -> None:
        """Take the readings that need e and g_s. w must be put back afterwards."""
        assert perturbation.saved is not None
        names, parameters = list(perturbed), list(perturbed.values())
        w, e = perturbation.saved, perturbation.difference_()
        g_s = self.backend.descent_gradients(parameters)
        groups = [self.groups[name] for name in names]

        def dot_over(members: Sequence[int]) -> Dot:
            return self.backend.dot_over([parameters[i] for i in members])

        self.readings.set(**measure(self.method, names, groups, w, e, g_s, dot_over))

    def forget_calls_without_gradient(self) -> None:
        """Drop recorded calls if somebody has cleared the gradients that they left.

        That is so after a failure that the trainer's caller has swallowed.
        """
        if len(self.tape) and not self.backend.holds_gradients(self._in_model):
            self.discard_update()

    def discard_update(self) -> None:
        """Forget what the update has computed so far."""
        self.tape.take()
        self._ascent_loss = self._sharpness = None
        if not self._is_loss_scale_checked:
            self._loss_scale = None
        self.clear_gradients()

    def clear_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None

    @contextmanager
    def gradients_set_aside(self) -> Iterator[None]:
        """Start without gradients; at the end, add those that were there before.

        If the block fails, its gradients are dropped.
        """
        self._set_aside = [(p, p.grad) for p in self._parameters if p.grad is not None]
        is_complete = False

        def undo() -> None:
            if not is_complete:
                self.discard_update()
            self.put_back_gradients()

        with undoing(undo):
            for p, _ in self._set_aside:
                p.grad = None
            yield
            both = [(g, p.grad) for p, g in self._set_aside if p.grad is not None]
            if both:
                kept, new = (self.backend.local(side) for side in zip(*both, strict=True))
                torch._foreach_add_(kept, new)
            is_complete = True

    def put_back_gradients(self) -> None:
        """Put what was set aside in the place of the gradients, to be added to by what comes."""
        for p, g in self._set_aside:
            p.grad = g
        self._set_aside = []


def _has_sparse_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and weight.grad.is_sparse

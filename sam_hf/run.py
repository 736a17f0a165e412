"""What holds from the beginning of one `train()` to its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend_for, reshard
from .combination import Combination
from .config import SAMConfig
from .loss_scale import LossScale
from .memory import Memory
from .methods import Dot
from .params import parameter_groups, plain, select_parameters
from .perturbation import Perturbation, step_size
from .readings import Readings, measure
from .replay import BufferGuard, RecordedCall, Tape
from .sampling import AscentPart
from .schedule import GradientNormTrigger
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
        self._seed: int = trainer.args.seed
        self.perturbed = select_parameters(model, config.sam_params)
        self.groups = parameter_groups(model)
        _refuse_complex(self.perturbed)
        self.backend = backend_for(trainer, list(self.perturbed.values()))
        self._model, self._optimizer = model, trainer.optimizer
        self.trained: dict[str, Tensor] = {}
        self._find_weights()
        self.ascent = AscentPart(trainer)
        # Frozen ones too: those that a callback has unfrozen in the run before may have a state.
        everything = {plain(name): p for name, p in model.named_parameters()}
        self.memory = Memory(config, self.method, self.backend, everything)
        self.trigger = GradientNormTrigger.of(config, self.memory.state)
        self.combination = Combination(
            self.method, self.memory.state, self.backend, self.trained, trainer.optimizer
        )
        self.tape = Tape(self.backend.rng_devices)
        self.buffers = BufferGuard(model)
        self.readings = Readings()
        self.was_reached = False
        self._has_perturbed = False
        self.loss_scale = LossScale()
        self._ascent_loss: Tensor | None = None
        self._sharpness: Tensor | None = None
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self.micro_batches = 0
        """How many of the update have begun."""
        self._passes = 0.0

    def close(self) -> None:
        self.combination.close()

    def _find_weights(self) -> None:
        """See which weights there are, and which of them are trained."""
        self._in_model = list(self._model.parameters())
        self.trained.clear()  # others hold it too
        named = self._model.named_parameters()
        self.trained.update((plain(name), p) for name, p in named if p.requires_grad)
        # A loss may own parameters that are not the model's: their gradients are replayed too.
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        in_optimizer = [p for group in groups for p in group["params"]]
        self._parameters = list(dict.fromkeys([*self._in_model, *in_optimizer]))
        self._counts = self._count_weights()

    def _count_weights(self) -> tuple[int, int]:
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        # One read for each weight: nobody tells of what a callback freezes or adds.
        trained = sum(p.requires_grad for p in self._in_model)
        return trained, sum(len(group["params"]) for group in groups)

    # ---- Counting ---------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around each micro-batch of each update. One that fails does not count."""
        if self.micro_batches == 0:
            self._passes = 0.0
            self.combination.forget()
            if self._count_weights() != self._counts:
                self._find_weights()
        before = self.micro_batches, self._passes
        self.micro_batches += 1
        try:
            yield
        except BaseException:
            if self.micro_batches:  # else the whole update was discarded
                self.micro_batches, self._passes = before
            raise
        if self.backend.is_end_of_update:
            self.readings.add_passes(self._passes / self.micro_batches)
            if self._sharpness is not None:
                self.readings.add_sharpness(self._sharpness)
            self.micro_batches, self._sharpness = 0, None
            self.loss_scale.forget()

    def count_passes(self, passes: float) -> None:
        """Count forward and backward passes, in units of those over one micro-batch."""
        self._passes += passes

    # ---- The losses -------------------------------------------------------------------------

    def add_ascent_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of L(w)."""
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()  # the difference to L(w + e) would be rounding
        self._ascent_loss = loss if self._ascent_loss is None else self._ascent_loss + loss

    def mean_ascent_loss(self) -> Tensor:
        """The mean share in L(w) of the micro-batches of the update that had their ascent."""
        assert self._ascent_loss is not None
        return self._ascent_loss / self.tape.count_recorded()

    def take_ascent_loss(self, calls: list[RecordedCall]) -> Tensor:
        """L(w) of the calls that are replayed together."""
        loss, self._ascent_loss = self._ascent_loss, None
        assert loss is not None
        recorded = sum(call.random_state is not None for call in calls)
        return loss * (len(calls) / recorded) if recorded < len(calls) else loss

    def add_sharpness(self, difference: Tensor) -> None:
        """Add a share of L(w + e) - L(w) to that of the update."""
        self._sharpness = difference if self._sharpness is None else self._sharpness + difference

    # ---- The perturbation -------------------------------------------------------------------

    def chosen(self, update: int) -> dict[str, nn.Parameter]:
        """The parameters that the method perturbs in this update."""
        trained = [name for name, p in self.perturbed.items() if p.requires_grad]
        names = self.method.choose(trained, update, self._seed)
        return {name: self.perturbed[name] for name in names}

    def taken_alone(self, update: int) -> list[Tensor]:
        """The parameters whose gradients are all that the ascent needs, or an empty list.

        It needs all of them where the optimizer may get what it computes.
        """
        weights: list[Tensor] = list(self.chosen(update).values())
        needs_all = self.method.keeps_gradient() or self.trigger is not None
        if needs_all or len(weights) == len(self.trained):
            return []
        return weights if self.backend.can_take_some_gradients else []

    def cost_of_ascent(self, update: int) -> float:
        """The floating-point operations of an ascent pass, in units of a whole pass.

        Of a pass's 6 operations a parameter and token, 2 are those of the parameter's gradient.
        """
        taken = sum(w.numel() for w in self.taken_alone(update))
        total = sum(p.numel() for p in self._in_model)
        return (4 + 2 * taken / total) / 6 if taken else 1.0

    # `.grad` can only be read and set one parameter at a time, here and below.
    def perturbed_with_gradient(self, update: int) -> dict[str, Tensor]:
        """The parameters to be perturbed that have a gradient, by their names.

        Raises:
            RuntimeError: none ever had one, or a gradient is sparse.
        """
        found: dict[str, Tensor] = {
            name: p for name, p in self.chosen(update).items() if p.grad is not None
        }
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

        What is made of g dies here, so that its memory is free for g_s; unless the method needs g.
        """
        self.combination.keep()
        parameters = list(perturbed.values())
        dot = self.backend.dot_over(parameters)
        grads = self.backend.gradients(parameters)
        if is_measured:
            norm = dot(grads, grads).sqrt()
            self.readings.set(ascent_grad_norm=self.backend.unscaled(norm))
        if self.method.remembers_gradients:
            grads = [g.float() if g.dtype is torch.bfloat16 else g for g in grads]
            self.backend.unscale_(grads)
        return self._move(list(perturbed), perturbation, grads, dot, rho)

    @torch.no_grad()
    def perturb_along_momentum(
        self, momentum: Mapping[str, Tensor], perturbation: Perturbation, rho: float
    ) -> Tensor:
        """Write w + e, from the optimizer's momentum; the factor that made e of it."""
        parameters = [self.perturbed[name] for name in momentum]
        dot = self.backend.dot_over(parameters)
        moments = self.backend.local_as(parameters, list(momentum.values()))
        return self._move(list(momentum), perturbation, moments, dot, -rho)

    def _move(
        self,
        names: list[str],
        perturbation: Perturbation,
        grads: list[Tensor],
        dot: Dot,
        rho: float,
    ) -> Tensor:
        direction, squared_norm = self.method.direction(
            names, perturbation.weights, grads, dot, self.memory.state
        )
        scale = step_size(rho, squared_norm)
        perturbation.apply(direction, scale, self.method.keeps_direction())
        return scale

    @torch.no_grad()
    def is_triggered(self, update: int, max_updates: int) -> bool:
        """Whether the rule of `sam_trigger` lets this update be perturbed."""
        if self.trigger is None:
            return True
        # Of all that may be perturbed: what a method chooses differs from update to update.
        parameters = [p for p in self.perturbed.values() if p.grad is not None]
        grads = self.backend.gradients(parameters)
        norm = self.backend.unscaled(self.backend.dot_over(parameters)(grads, grads).sqrt())
        return self.trigger(norm.square(), update, max_updates)

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
        self.combination.forget()
        self.micro_batches = 0
        self._ascent_loss = self._sharpness = None
        self.loss_scale.forget()
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


def _refuse_complex(perturbed: Mapping[str, Tensor]) -> None:
    found = [name for name, p in perturbed.items() if p.is_complex()]
    if found:
        raise ValueError(
            f"{', '.join(found)}: complex weights are not perturbed rightly. Leave them out with "
            "sam_params, or set sam_rho=0."
        )


def _has_sparse_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and weight.grad.is_sparse

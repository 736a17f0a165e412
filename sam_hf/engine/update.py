"""One update: a recorded ascent pass at w, and the replay of its calls at w + e."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import SAMConfig
from ..methods import Dot
from ..methods.base import Radius
from .combiner import GradientCombiner, momentum_of
from .gradients import GradientLedger
from .layout import Layout
from .method_state import MethodStateCheckpoint
from .metrics import Metrics, measure
from .parameters import TrainedParameters
from .perturbation import HALF, Perturbation, step_size
from .radius import AutomaticRadius
from .random_state import RandomState
from .recorder import CallRecorder, RecordedCall
from .schedule import GradientNormTrigger, interval_of
from .state import StateTracker, always_restore, call_and_restore


class MicroBatch(Protocol):
    """A micro-batch, as the engine sees it.

    Attributes:
        update: number of the update, from 0.
        total_updates: number of updates in the run.
        rho: size of the perturbation; 0 where the update is plain, None for the automatic radius.
        is_end: whether it is the last micro-batch of its update.
        is_deferred: whether it has no ascent pass.
        divisor: the number of micro-batches by which each loss is divided, if an update may have
            fewer; None where the losses of an update add up to their mean.
    """

    update: int
    total_updates: int
    rho: float | None
    is_end: bool
    is_deferred: bool
    divisor: int | None

    def plain(self) -> Tensor:
        """Run forward and backward; returns the detached loss."""

    def ascent(self) -> Tensor:
        """Like `plain`, with every loss recorded by `UpdateEngine.record`."""

    def defer(self) -> None:
        """Record the loss without running it."""

    def is_measured(self) -> bool:
        """Whether a log shows the metrics of this update."""


class UpdateEngine:
    """Makes SAM updates from closures that compute a loss and its gradient.

    In one update, with the symbols of the SAM paper: the ascent pass runs at w and is recorded;
    when the scope is complete, `.grad` holds g and the method turns it into e; the recorded calls
    are replayed at w + e, which leaves g_s in `.grad`; w is restored. Clipping and the optimizer
    step are left to the caller.

    Args:
        is_watched: foreign code may write gradients within the ascent closure (`GradientLedger`).

    Attributes:
        latest_ascent_cost: floating-point operations of the latest micro-batch's ascent pass, in
            units of a whole pass; 0 where the pass of a plain update was its only one.
        has_replayed: whether the latest micro-batch completed a scope and ran the descent pass.
        is_in_descent_pass: whether a recorded call is being replayed at w + e.
        perturbed_updates: how many updates were perturbed.
    """

    def __init__(
        self,
        config: SAMConfig,
        layout: Layout,
        parameters: TrainedParameters,
        optimizer: Any,
        tracker: StateTracker,
        is_watched: bool,
        seed: int,
        state: MethodStateCheckpoint,
    ) -> None:
        self.config, self.layout, self.parameters = config, layout, parameters
        self.method = config.build_method()
        self.method_state = state
        self.trigger = GradientNormTrigger.of(config, state.state)
        self.radius = AutomaticRadius(
            config.sam_target_sharpness,
            state.state,
            layout.device,
            layout.accumulate_in,
            interval_of(config),
        )
        self.combiner = GradientCombiner(
            self.method, state.state, layout, parameters.trained, optimizer
        )
        self.metrics = Metrics()
        self.recorder = CallRecorder()
        self.ledger = GradientLedger(layout, parameters.everything, is_watched)
        self.is_in_descent_pass = False
        self.perturbed_updates = 0
        self.micro_batches = 0
        """How many of the current update have started."""
        self.latest_ascent_cost = 0.0
        self.has_replayed = False
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._tracker, self._seed = tracker, seed
        self._each_alone = config.sam_scope == "micro_batch"
        self._chosen: tuple[int, dict[str, Any], list[Tensor]] | None = None
        self._has_seen_gradient = self._has_warned_of_rounding = False
        self._passes = 0.0
        self._ascent_loss: Tensor | None = None  # of the scope
        self._finds_all_state = True  # whether a replay finds all that its recorded call found
        self._rho: Radius = 0.0  # of the update
        self._scale: Tensor | float = 0.0  # of the scope: e = scale * d
        self._loss: Tensor | None = None  # of the update, if the automatic radius needs it
        # Of the scopes of the update: the part of L(w + e) - L(w), and the scale of e.
        self._rises: list[tuple[Tensor, Tensor | float]] = []

    def close(self) -> None:
        self.combiner.close()

    # ---- A micro-batch -----------------------------------------------------------------------

    def step(self, batch: MicroBatch) -> Tensor:
        """Run a micro-batch at w and, where it completes the scope, the replay at w + e.

        Returns the loss at w, detached (for a method along the momentum, which is never at w, that
        at w + e). Whatever happens, the weights are w afterwards.
        """
        if self.ledger.was_cleared():
            self.discard_update()  # after a failure that the caller handled, gradients are cleared
        if self.micro_batches == 0:
            self._begin_update()
        self._rho = self.combiner.rho = self.radius.rho if batch.rho is None else batch.rho
        before = self.micro_batches, self._passes
        self.latest_ascent_cost, self.has_replayed = 0.0, False
        try:
            self.micro_batches += 1
            loss = self._run(batch)
            if self.config.sam_rho is None:
                wide = loss.float() if loss.dtype in HALF else loss
                self._loss = wide.clone() if self._loss is None else self._loss + wide
        except BaseException:
            if self.ledger.is_lost:
                self.discard_update()
            if self.micro_batches:  # otherwise the whole update was discarded
                self.micro_batches, self._passes = before
            raise
        if batch.is_end:
            self._end_update(batch)
        return loss

    def _run(self, batch: MicroBatch) -> Tensor:
        method, state = self.method, self.method_state.state
        if batch.rho != 0 and method.along_momentum:
            return self._along_momentum(batch)
        if batch.rho != 0 and method.perturbs:
            if method.should_perturb(batch.update, state):
                return self._two_passes(batch)
            return self._reused(batch)
        self._passes += 1
        return batch.plain()

    def _begin_update(self) -> None:
        self._passes, self._loss, self._rises = 0.0, None, []
        self.combiner.discard()
        if self.parameters.refresh():
            self.ledger.parameters = self.parameters.everything
            self._chosen = None

    def _end_update(self, batch: MicroBatch) -> None:
        if batch.rho != 0 and batch.is_measured():
            self.metrics.set(rho=torch.as_tensor(self._rho, dtype=self.layout.accumulate_in))
        if batch.divisor is not None and batch.divisor != self.micro_batches:
            factor = batch.divisor / self.micro_batches
            self._rises = [(factor * rise, scale) for rise, scale in self._rises]
            self._loss = None if self._loss is None else factor * self._loss
        if self._loss is not None:
            scopes = self.micro_batches if self._each_alone else 1
            total = self.layout.sum_over_processes
            self.radius.add(batch.update, self._loss, self._rises, total, scopes)
        self.metrics.add_passes(self._passes / self.micro_batches)
        if self._rises:
            rises = [rise for rise, _ in self._rises]
            self.metrics.add_sharpness(rises[0] if len(rises) == 1 else torch.stack(rises).sum())
            self.perturbed_updates += 1
        self.micro_batches = 0

    def discard_update(self) -> None:
        """Forget what the update has computed so far, gradients included."""
        self.recorder.take()
        self.combiner.discard()
        self.micro_batches = 0
        self._ascent_loss, self._finds_all_state = None, True
        self.ledger.discard()

    # ---- One pass ----------------------------------------------------------------------------

    def _reused(self, batch: MicroBatch) -> Tensor:
        """An update without a descent pass, whose gradient the method changes at its end."""
        loss = self._apart(batch.ascent, batch.is_end)
        self._passes += 1
        self.recorder.take()
        if batch.is_end:
            self.ledger.take()
            self._require_no_foreign(True)
            self.combiner.reuse()
            self.ledger.finish()
        return loss

    def _along_momentum(self, batch: MicroBatch) -> Tensor:
        self._passes += 1
        momentum = momentum_of(self._optimizer, self.parameters.perturbable)
        if not momentum:
            return batch.plain()
        is_measured = batch.is_measured()
        perturbed: dict[str, Tensor] = {n: self.parameters.perturbable[n] for n in momentum}
        parameters = list(perturbed.values())
        perturbation = Perturbation(self.layout.local(parameters))
        is_complete = False

        def undo() -> None:
            if is_measured and is_complete:
                self._measure(perturbed, perturbation)
            perturbation.restore()
            if not is_complete:
                self.layout.recover()

        with always_restore(undo):
            moments = self.layout.local_as(parameters, list(momentum.values()))
            dot = self.layout.dot_over(parameters)
            with torch.no_grad():
                self._apply(list(momentum), perturbation, moments, dot, -self._rho)
            loss = batch.plain()
            is_complete = True
        if batch.is_end:
            self.perturbed_updates += 1
        return loss

    # ---- Two passes --------------------------------------------------------------------------

    def _two_passes(self, batch: MicroBatch) -> Tensor:
        is_complete = self._each_alone or batch.is_end
        if self._each_alone:
            self.ledger.reset()  # its e must not depend on the gradients of earlier micro-batches
        try:
            if batch.is_deferred:
                batch.defer()
                loss = self._mean_ascent_loss()
                if batch.is_end:
                    self.ledger.take()
                    self.layout.reduce_ascent(list(self.parameters.trained.values()))
            else:
                loss = self._apart(functools.partial(self._ascent, batch), is_complete)
            if is_complete:
                self._descent(batch)
        except BaseException:
            if self._each_alone:
                self.discard_update()  # earlier micro-batches have their g_s, this one has none
            self.ledger.show()
            raise
        return loss

    def _apart(self, ascent: Callable[[], Tensor], is_complete: bool) -> Tensor:
        """Run an ascent pass whose gradients are accumulated separately from foreign ones.

        Afterwards `.grad` holds g, if that is complete. Otherwise, and if the pass fails, it holds
        what it holds in plain training.
        """
        ledger, calls_before = self.ledger, len(self.recorder)
        try:
            ledger.take()
            if ledger.is_watched:
                ledger.show()  # each recorded loss takes its gradients itself
            loss = ascent()
            if not is_complete:
                ledger.show()
        except BaseException:
            del self.recorder.calls[calls_before:]
            if not self._each_alone:
                ledger.show()
                if not calls_before:
                    ledger.reset()
            raise
        return loss

    def _ascent(self, batch: MicroBatch) -> Tensor:
        """The pass at w, whose losses are recorded."""
        calls_before = len(self.recorder)
        some = self.ascent_parameters(batch.update)
        with self.layout.ascent(self._each_alone, some):
            loss = batch.ascent()
            self.ledger.take()  # the layout may reduce g at the end of the block
        calls = self.recorder.calls[calls_before:]
        examples = 0.0
        for call in calls:
            assert call.state is not None
            self._finds_all_state &= self._tracker.observe(call.state)
            call.weight = 1 / len(calls)
            examples += call.share * call.weight
        self._passes += examples
        self.latest_ascent_cost = examples * self._cost_of_ascent(some)
        loss = loss.clone()  # a captured CUDA graph writes every loss into the same memory
        wide = loss.float() if loss.dtype in HALF else loss  # L(w + e) - L(w) would be rounding
        self._ascent_loss = wide if self._ascent_loss is None else self._ascent_loss + wide
        return loss

    def record(self, call: RecordedCall) -> None:
        """Add a call to the scope, as it is about to run for the first time."""
        call.random_state = RandomState(self.layout.rng_devices)
        call.state = self._tracker.capture()
        self.recorder.calls.append(call)

    def _mean_ascent_loss(self) -> Tensor:
        """Mean loss of the micro-batches with an ascent pass, unbiased for the deferred ones."""
        assert self._ascent_loss is not None
        return self._ascent_loss / sum(c.random_state is not None for c in self.recorder.calls)

    def _descent(self, batch: MicroBatch) -> None:
        """Complete the scope: leave what the optimizer gets in `.grad`, and w in the weights."""
        perturbation = Perturbation([])
        is_complete = False
        with_gradients = torch.is_grad_enabled()

        def undo() -> None:
            if torch.is_grad_enabled() != with_gradients:  # a `no_grad` block was interrupted
                torch.set_grad_enabled(with_gradients)
            perturbation.restore()
            if not is_complete:
                self.discard_update()  # a part of g_s is not a gradient to step with
                self.layout.recover()

        def complete() -> None:
            nonlocal is_complete
            calls = self.recorder.take()
            self.ledger.take()
            perturbed = self._with_gradient(batch.update)
            if self._replays(batch, calls, perturbed):
                perturbation.weights = self.layout.local(list(perturbed.values()))
                self._second_pass(batch, calls, perturbed, perturbation)
            else:
                self._require_no_foreign(True)
            self._ascent_loss, self._finds_all_state = None, True
            self.ledger.finish()
            is_complete = True

        call_and_restore(complete, undo)

    def _replays(
        self, batch: MicroBatch, calls: list[RecordedCall], perturbed: dict[str, Tensor]
    ) -> bool:
        """Whether there is a second pass; otherwise the optimizer gets g.

        It may get g if that is the whole gradient, and no other process waits for the second pass.
        It does where these examples reach no perturbed parameter, where a replay would not find the
        state that its call found (once for each such tensor), and where the rule of `sam_trigger`
        does not perturb the update.
        """
        may_get_g = not self._is_partial(calls, batch.update) and not (
            self.layout.must_replay(self._each_alone)
        )
        finds_state = self._finds_all_state or self.layout.processes > 1
        if may_get_g and not (perturbed and finds_state):
            return False
        return not perturbed or self._is_triggered(batch)

    def _second_pass(
        self,
        batch: MicroBatch,
        calls: list[RecordedCall],
        perturbed: dict[str, Tensor],
        perturbation: Perturbation,
    ) -> None:
        """Replay the calls at w + e, which leaves g_s, or what the method makes of it, in `.grad`.

        Without a perturbed parameter w + e is w.
        """
        self._require_no_foreign(self.method.combines)
        if not self._finds_all_state:
            warnings.warn(
                "A large tensor or a long list that the trainer or a module holds was written for "
                "the first time in this run: in this update only, the second pass sees it as the "
                "first pass left it.",
                stacklevel=2,
            )
        is_measured = bool(perturbed) and batch.is_measured()
        if perturbed:
            with torch.no_grad():
                self._perturb(perturbed, perturbation, is_measured)
        self.ledger.clear()
        is_mixed = self.layout.reduces_kept_gradients and self.ledger.has_foreign
        if is_mixed:
            self.ledger.put_foreign()
        count, recorded = len(calls), sum(call.random_state is not None for call in calls)

        def restore() -> None:
            if is_measured:
                self._measure(perturbed, perturbation, is_mixed)
            perturbation.restore()

        descent_loss = self.layout.descent(functools.partial(self._replay, calls), restore)
        if self.method.combines:
            self.combiner.combine()
        if perturbed:
            ascent_loss = self._ascent_loss
            assert ascent_loss is not None
            if recorded < count:  # deferred calls are expected to have the mean loss
                ascent_loss = ascent_loss * (count / recorded)
            self._rises.append((descent_loss - ascent_loss, self._scale))

    def _require_no_foreign(self, is_apart: bool) -> None:
        """Refuse a foreign gradient that several processes cannot reduce separately from g_s."""
        is_reduced = self.layout.reduces_kept_gradients and not self._each_alone
        if is_apart and is_reduced and self.ledger.has_foreign:
            raise RuntimeError(
                f"Code outside of compute_loss computes gradients in training_step, which several "
                f"processes cannot separate with sam_method={self.config.sam_method!r} "
                f"and sam_trigger={self.config.sam_trigger!r}. Compute that loss in compute_loss, "
                "or set sam_method='sam' and sam_trigger='always', or sam_rho=0."
            )

    def _replay(self, calls: list[RecordedCall]) -> Tensor:
        """Run the recorded calls, each from the state that it found; the sum of their losses."""
        replays_random_numbers = self.config.sam_replay_rng
        random_state = first_random_state = RandomState(self.layout.rng_devices)
        latest = next((call.state for call in reversed(calls) if call.state is not None), None)
        state = self._tracker.capture(since=latest)
        is_complete = False

        def undo() -> None:
            self.is_in_descent_pass = False
            state.restore()
            # A pass with its own masks advances the generators, unless it failed.
            if replays_random_numbers or not is_complete:
                (random_state if is_complete else first_random_state).restore()

        def replay() -> Tensor:
            nonlocal random_state, is_complete
            self.is_in_descent_pass = True
            total: Tensor | None = None
            count = len(calls)
            calls.reverse()
            for number in range(1, count + 1):
                call = calls.pop()  # its inputs are freed with it
                if replays_random_numbers:
                    # A first pass over a subset has drawn fewer numbers than this one: the calls
                    # after it continue from here, or they would repeat its numbers.
                    continues = call.random_state is None or (call.share < 1 and number > 1)
                    found = random_state if continues else call.random_state
                    assert found is not None
                    found.restore(first_random_state if number == 1 else None)
                if call.state is not None and (number > 1 or call.state is not state):
                    call.state.restore()
                with self.layout.replaying(number == count, self._each_alone):
                    loss = call.closure()
                if loss.dtype in HALF:
                    loss = loss.float()
                elif number < count:
                    loss = loss.clone()
                total = loss if total is None else total + loss
                if call.share < 1:
                    random_state = RandomState(self.layout.rng_devices)
                self._passes += call.weight
            is_complete = True
            assert total is not None
            return total

        total = call_and_restore(replay, undo)
        self.has_replayed = True
        return total

    # ---- The perturbation --------------------------------------------------------------------

    def _choose(self, update: int) -> tuple[int, dict[str, Any], list[Tensor]]:
        """The parameters to perturb in this update, and those whose gradients the ascent needs."""
        if self._chosen is None or (self.method.chooses and self._chosen[0] != update):
            chosen = self.parameters.perturbable
            if self.method.chooses:
                names = self.method.choose(list(chosen), update, self._seed)
                chosen = {name: chosen[name] for name in names}
            some: list[Tensor] = list(chosen.values())
            # All gradients are needed where the optimizer may get what the ascent computes.
            needs_all = self.method.combines or self.trigger is not None
            if needs_all or len(some) == len(self.parameters.trained):
                some = []
            self._chosen = (update, chosen, some)
        return self._chosen

    def ascent_parameters(self, update: int) -> list[Tensor]:
        """The parameters whose gradients are all that the ascent pass computes; empty for all."""
        # Not if others run backward passes in the training step, which need all gradients.
        can = self.layout.can_take_some_gradients and not self.ledger.is_watched
        return self._choose(update)[2] if can else []

    def _cost_of_ascent(self, some: list[Tensor]) -> float:
        """Floating-point operations of an ascent pass, in units of a whole pass.

        Of 6 operations per parameter and token, 2 compute the gradient of the parameter.
        """
        if not some:
            return 1.0
        taken = sum(w.numel() for w in some)
        return (4 + 2 * taken / self.parameters.count) / 6

    def _is_partial(self, calls: Sequence[RecordedCall], update: int) -> bool:
        """Whether g is not the whole gradient of the calls, so that it cannot be stepped with."""
        return bool(self.ascent_parameters(update)) or any(
            call.random_state is None or call.share < 1 for call in calls
        )

    def _with_gradient(self, update: int) -> dict[str, Tensor]:
        """The parameters to be perturbed that have a gradient, by name.

        Raises:
            RuntimeError: no parameter ever had a gradient, or a gradient is sparse.
        """
        chosen = self._choose(update)[1]
        found: dict[str, Tensor] = {n: p for n, p in chosen.items() if p.grad is not None}
        is_known = found or self._has_seen_gradient or self.ascent_parameters(update)
        if not is_known and all(p.grad is None for p in self.ledger.parameters):
            raise RuntimeError(
                "No parameter has a gradient after the first ascent pass: the optimizer consumes "
                "gradients inside backward. Choose an optim that steps after it, or set sam_rho=0."
            )
        self._has_seen_gradient = True
        if sparse := [name for name, p in found.items() if p.grad.is_sparse]:  # type: ignore[union-attr]
            raise RuntimeError(
                f"{', '.join(sparse)}: the gradient is sparse, and SAM needs dense ones. Set "
                "sparse=False in the embedding, or sam_rho=0."
            )
        return found

    def _perturb(
        self, perturbed: dict[str, Tensor], perturbation: Perturbation, is_measured: bool
    ) -> None:
        """Write w + e, with e made of the gradients in `.grad`.

        What is made of g is freed here, so that its memory is free for g_s; unless g is needed.
        """
        if self.method.combines:
            self.combiner.keep()
        parameters = list(perturbed.values())
        dot = self.layout.dot_over(parameters)
        grads = self.layout.gradients(parameters)
        if is_measured:
            norm = dot(grads, grads).sqrt()
            self.metrics.set(ascent_grad_norm=self.layout.unscaled(norm))
        if self.method.remembers_gradients:
            grads = [g.float() if g.dtype is torch.bfloat16 else g for g in grads]
            self.layout.unscale_(grads)
        scale = self._scale = self._apply(list(perturbed), perturbation, grads, dot, self._rho)
        # Waits for the device until it has warned. An e of 0 (fp16 overflow) changes no weight.
        if self.layout.has_half_weights and not self._has_warned_of_rounding and float(scale) != 0:
            self._has_warned_of_rounding = True
            warnings.warn(
                f"Some perturbed weights are stored in half precision, where "
                f"{perturbation.swallowed_share():.1%} of them are the same at w + e as at w: "
                "rounding swallowed the perturbation. Load the model in float32 and train with "
                "bf16=True or fp16=True, which compute in half precision and store in float32.",
                stacklevel=2,
            )

    def _apply(
        self,
        names: list[str],
        perturbation: Perturbation,
        grads: list[Tensor],
        dot: Dot,
        rho: Radius,
    ) -> Tensor | float:
        """The gradient becomes e, and the weights w + e; returns the factor rho / |d|*."""
        direction, squared_norm = self.method.direction(
            names, perturbation.weights, grads, dot, self.method_state.state
        )
        scale = step_size(rho, squared_norm)
        perturbation.apply(direction, scale, self.method.keeps_direction)
        return scale

    @torch.no_grad()
    def _is_triggered(self, batch: MicroBatch) -> bool:
        """Whether the rule of `sam_trigger` perturbs this update."""
        if self.trigger is None:
            return True
        # Over all perturbable parameters: those that a method chooses differ between updates.
        parameters = [p for p in self.parameters.perturbable.values() if p.grad is not None]
        grads = self.layout.gradients(parameters)
        norm = self.layout.unscaled(self.layout.dot_over(parameters)(grads, grads).sqrt())
        return self.trigger(norm.square(), batch.update, batch.total_updates)

    @torch.no_grad()
    def _measure(
        self, perturbed: dict[str, Tensor], perturbation: Perturbation, is_mixed: bool = False
    ) -> None:
        """Measure what needs e and g_s. Writes into the weights: they must be restored next.

        Args:
            is_mixed: `.grad` holds foreign gradients too: no cosine.
        """
        assert perturbation.saved is not None
        names, parameters = list(perturbed), list(perturbed.values())
        w, e = perturbation.saved, perturbation.difference_()
        g_s: Sequence[Tensor | None] = [None] * len(names)
        if not is_mixed:
            g_s = self.layout.descent_gradients(parameters)
        groups = [self.parameters.groups[name] for name in names]

        def dot_over(members: Sequence[int]) -> Dot:
            return self.layout.dot_over([parameters[i] for i in members])

        self.metrics.set(**measure(self.method, names, groups, w, e, g_s, dot_over))

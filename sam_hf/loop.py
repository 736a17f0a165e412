"""`SAM`, for custom training loops."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .config import SAMConfig
from .distributed import reshard, validate_loop
from .distributed.loop import (
    PlainAccelerator,
    accumulating,
    gathered,
    is_deepspeed,
    loop_layout,
    unwrapped,
)
from .engine.closure import ClosureKeeper, loss_of
from .engine.method_state import MethodStateCheckpoint
from .engine.parameters import TrainedParameters, canonical_name
from .engine.radius import RadiusCheck
from .engine.recorder import RecordedCall
from .engine.schedule import interval_of, learning_rate_share, rho_at
from .engine.state import StateTracker
from .engine.subset import AscentSubset
from .engine.update import UpdateEngine
from .methods.base import State

_SEED = 0  # of the methods' random choices: the same on all processes and in a resumed run


class SAM:
    """Sharpness-aware updates in a training loop: `sam.backward` replaces `loss.backward`.

    ::

        sam = SAM(model, optimizer, accelerator=accelerator)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = sam.backward(lambda: model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    Without Accelerate, leave `accelerator` out; clipping, `optimizer.step()`, the scheduler and
    `zero_grad()` stay in the loop in both cases. Several models that are trained in one loop (a
    GAN) need one `SAM` each; gradients that one model's loss leaves in parameters of another
    optimizer come from both passes, so clear them before they are used. A model has one
    optimizer and one `SAM`.

    Args:
        model: the model as the loop calls it: as `accelerator.prepare` returned it, or plain,
            compiled, in DDP, or sharded with `fully_shard`.
        optimizer: the optimizer of the model, likewise prepared or plain.
        config: the options; `SAMConfig()` if None.
        accelerator: the `Accelerator` that prepared both.
        scaler: the `torch.amp.GradScaler` of a loop without Accelerate.
        total_steps: number of updates of the run, for the options that depend on it.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.
        ValueError: an option, the optimizer or the layout is not supported; says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: SAMConfig | None = None,
        accelerator: Any = None,
        scaler: Any = None,
        total_steps: int | None = None,
    ) -> None:
        self.config = config = SAMConfig() if config is None else config
        validate_loop(model, optimizer, config, accelerator, scaler, total_steps)
        self._total = 0 if total_steps is None else total_steps
        self._accelerator = PlainAccelerator(model, scaler) if accelerator is None else accelerator
        self._model, self._optimizer = model, optimizer
        self._shares_loss = is_deepspeed(accelerator)
        self._updates = 0
        self._read_at, self._next_reading = 0, 1  # numbers of updates
        self._interval = interval_of(config)
        if config.sam_rho == 0:
            return
        inner = unwrapped(model)
        reshard(inner)
        parameters = TrainedParameters(inner, optimizer, config.sam_params)
        self._layout = loop_layout(model, self._accelerator, list(parameters.selected.values()))
        everything = {canonical_name(name): p for name, p in inner.named_parameters()}
        self._state = MethodStateCheckpoint(config, config.build_method(), self._layout, everything)
        modules, trained = list(inner.modules()), list(parameters.trained.values())
        self._closures = ClosureKeeper(budget=sum(w.nbytes for w in trained))
        tracked, ignored = (modules, []) if config.sam_freeze_norm_stats else ([], modules)
        variables = self._closures.variables
        tracker = StateTracker([], tracked, (), [*ignored, *trained], variables=variables)
        self._engine = UpdateEngine(
            config, self._layout, parameters, optimizer, tracker, False, _SEED, self._state
        )
        steps = self._accelerator.gradient_accumulation_steps
        self._check, self._loss = RadiusCheck(config), torch.tensor(math.inf)
        self._subset = AscentSubset(config.sam_ascent_fraction, 1, steps, False, True, _SEED)
        unwrapped_optimizer = getattr(optimizer, "optimizer", optimizer)
        # Whether the optimizer has stepped since the latest update, as far as it can be seen.
        self._has_stepped, self._watches_steps = True, False
        # DeepSpeed steps within the update.
        if not self._shares_loss and hasattr(unwrapped_optimizer, "register_step_pre_hook"):
            unwrapped_optimizer.register_step_pre_hook(self._on_step)
            # A scaler skips the steps whose gradients overflowed.
            self._watches_steps = not self._accelerator.scaler

    @property
    def is_in_descent_pass(self) -> bool:
        """Whether the closure runs at w + e, for closures that log or count."""
        return self.config.sam_rho != 0 and self._engine.is_in_descent_pass

    def backward(self, closure: Callable[[], Any], end_of_update: bool = True) -> Tensor:
        """Compute the gradients of a micro-batch, instead of ``loss.backward()``.

        The closure runs at w, and at the end of the update again at w + e, for all micro-batches of
        the update (in scope `micro_batch`: for each one right away). The second pass sees the same
        variables, random numbers and module state as the first one, so that a loop may rebind
        `batch`. Afterwards `.grad` holds g_s, and the weights are w, whatever the closure does.

        Args:
            closure: runs the forward pass; returns the loss, one number, or an output with
                `.loss`. Unless Accelerate does so, it divides the loss by the number of micro-
                batches, as in any loop.
            end_of_update: False for all micro-batches of an update but the last, unless
                `accelerator.accumulate` sets it.

        Returns:
            The loss at w that the closure returned, detached.

        Raises:
            TypeError: `closure` is not callable, or returns no loss.
            ValueError: the loss is not one number or has no graph; `end_of_update` is given where
                Accelerate sets it; or the last micro-batch of an update is not reduced.
            RuntimeError: the closure cannot be replayed: it reads from an iterator, or from a
                tensor that was computed with gradients before the call.
        """
        if not callable(closure) or isinstance(closure, nn.Module):
            raise TypeError(
                f"sam.backward takes a function that computes the loss, got a "
                f"{type(closure).__name__}: sam.backward(lambda: model(**batch).loss)."
            )
        if self._steps > 1 and not end_of_update:
            raise ValueError(
                f"end_of_update=False has no effect with gradient_accumulation_steps={self._steps} "
                "of the accelerator, where accelerator.accumulate(model) marks the end. Leave it "
                "out."
            )
        is_reduced = getattr(self._model, "require_backward_grad_sync", True)
        if end_of_update and self._accelerator.sync_gradients and not is_reduced:
            raise ValueError(
                "The last micro-batch of an update is run in no_sync(), which skips the reduction "
                "over the processes. Pass end_of_update=False for the others instead."
            )
        accelerator = self._accelerator
        with nullcontext() if end_of_update else accumulating(accelerator, self._model):
            if self.config.sam_rho == 0:
                loss = loss_of(closure())
                accelerator.backward(loss)
                self._updates += bool(accelerator.sync_gradients)
                return loss.detach()
            self._require_step()
            batch = _LoopBatch(self, closure)
            with batch.autocast(enabled=False):
                mean = self._engine.step(batch)
        if batch.is_end:
            self._updates += 1
            self._closures.is_first = False
            self._has_stepped = not self._watches_steps
        self._loss = mean * self._steps if batch.loss is None else batch.loss
        return self._loss

    def metrics(self) -> dict[str, float]:
        """The metrics since the last call, as the Trainer logs them: `sam_sharpness`, ...

        Waits for the device. Every process must call it. Norms and the cosine cost passes over the
        weights: they are measured in the first update, and then in the update after which the next
        call is expected if calls are equally spaced.
        """
        if self.config.sam_rho == 0:
            return {}
        distance = max(self._updates - self._read_at, 1)
        self._read_at, self._next_reading = self._updates, self._updates + distance
        metrics = self._engine.metrics.pop(self._layout.sum_over_processes)
        if self._layout.place[0] == 0:
            self._check.add(metrics, float(self._loss), self._updates)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Number of updates, options, and the state of the method on every process.

        ``accelerator.register_for_checkpointing(sam)`` saves and loads it. Every process must call
        it.
        """
        mine: State = {}
        if self.config.sam_rho != 0:
            state = self._engine.method_state.state
            mine = {s: {n: t.cpu() for n, t in ts.items()} for s, ts in state.items()}
        return {
            "updates": self._updates,
            "config": self.config.to_sam_dict(),
            "states": gathered(mine, 1 if self._shares_state else self._layout.processes),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it is that of another method, or of another number of processes.
        """
        if state_dict.keys() != (expected := {"updates", "config", "states"}):
            raise ValueError(
                f"The state has the keys {sorted(state_dict)}. Allowed: those of SAM.state_dict(), "
                f"{sorted(expected)}."
            )
        config, states = state_dict["config"], state_dict["states"]
        if config["sam_method"] != self.config.sam_method:
            raise ValueError(
                f"The state is that of sam_method={config['sam_method']!r}, and this SAM has "
                f"sam_method={self.config.sam_method!r}. Make it with the same method."
            )
        changed = [k for k, v in self.config.to_sam_dict().items() if config.get(k, v) != v]
        if changed:
            options = ", ".join(
                f"{k}={getattr(self.config, k)!r} (was {config[k]!r})" for k in changed
            )
            warnings.warn(
                f"Resuming with SAM options that differ from the state's: {options}.", stacklevel=2
            )
        self._updates = self._read_at = state_dict["updates"]
        self._next_reading = self._updates + 1
        if self.config.sam_rho == 0:
            return
        rank, processes = (0, 1) if self._shares_state else self._layout.place
        if len(states) != processes:
            raise ValueError(
                f"The state was saved by {len(states)} processes, each with its own part, and is "
                f"loaded by {processes}. Resume with the same number of processes."
            )
        self._engine.method_state.set(states[rank])

    # ---- Internals ---------------------------------------------------------------------------

    @property
    def _steps(self) -> int:
        return int(self._accelerator.gradient_accumulation_steps)

    @property
    def _shares_state(self) -> bool:
        return self.config.sam_rho == 0 or self._engine.method_state.is_shared

    def _require_step(self) -> None:
        """Warn of a second update before the optimizer's step; refuse it where gradient is lost."""
        if self._engine.micro_batches:
            return
        problem = "sam.backward has started another update before optimizer.step()"
        remedy = "Pass end_of_update=False for all micro-batches of an update but the last."
        if self._engine.combiner.is_pending and not self._accelerator.scaler:
            raise RuntimeError(
                f"{problem}: with sam_method={self.config.sam_method!r} a part of the previous "
                f"update's gradient is applied in the step, and would be lost. {remedy}"
            )
        if not self._has_stepped:
            self._has_stepped, self._watches_steps = True, False  # warn once
            message = "each call has a perturbation of its own and counts as an update."
            warnings.warn(f"{problem}: {message} {remedy}", stacklevel=3)

    def _on_step(self, *_: Any) -> None:
        self._has_stepped = True
        if self._engine.micro_batches:
            raise RuntimeError(
                "optimizer.step() was called in an incomplete update (micro-batches so far: "
                f"{self._engine.micro_batches}). Step after its last one, for which end_of_update "
                "is True; after a failure, call optimizer.zero_grad() and start again."
            )


class _LoopBatch:
    """One call of `SAM.backward` (an `engine.update.MicroBatch`)."""

    def __init__(self, sam: SAM, closure: Callable[[], Any]) -> None:
        config, update = sam.config, sam._updates
        self._sam, self._closure = sam, closure
        self.update, self.total_updates = update, sam._total
        follows_rate = config.sam_rho_schedule == "learning_rate"
        share = learning_rate_share(sam._optimizer) if follows_rate else 1.0
        self.rho = rho_at(
            config, min(update, sam._total) if sam._total else update, sam._total, share
        )
        self.is_end = bool(sam._accelerator.sync_gradients)
        self.is_deferred = sam._subset.skips(sam._engine.micro_batches + 1, sam._steps)
        self.divisor = sam._steps if sam._steps > 1 else None  # Accelerate divides by it
        self.loss: Tensor | None = None
        # Autocast of the region that called `backward`; the engine's arithmetic runs without it.
        kind = sam._layout.device_type
        self._has_autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if self._has_autocast else None
        self._autocast = functools.partial(torch.autocast, kind, dtype=dtype)

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        return self._autocast(enabled=enabled) if self._has_autocast else nullcontext()

    def is_measured(self) -> bool:
        return self.is_end and 0 < self._sam._next_reading - self.update <= self._sam._interval

    def plain(self) -> Tensor:
        return self._run(self._closure)

    def ascent(self) -> Tensor:
        sam = self._sam
        kept = sam._closures.keep(self._closure)
        sam._engine.record(RecordedCall(functools.partial(kept.replay, self._run)))
        loss = self._run(self._closure)
        kept.observe()
        return loss

    def defer(self) -> None:
        kept = self._sam._closures.keep(self._closure)
        call = RecordedCall(functools.partial(kept.replay, self._run), share=0.0)
        self._sam._engine.recorder.calls.append(call)

    def _run(self, closure: Callable[[], Any]) -> Tensor:
        """Forward and backward; returns the micro-batch's part of the loss of the update."""
        sam = self._sam
        with self.autocast(enabled=True):
            loss = loss_of(closure())
        whole, steps = loss.detach(), sam._steps
        if self.loss is None and not self.is_deferred:
            # A captured CUDA graph writes every loss into the same memory.
            self.loss = whole.clone() if sam._layout.grads_live_in_buffers else whole
        part = whole if steps == 1 else whole / steps
        try:
            if sam._shares_loss:  # otherwise Accelerate divides it
                sam._accelerator.backward(loss / steps, scale_wrt_gas=False)
            else:
                sam._accelerator.backward(loss)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                error.add_note("If the closure calls backward() itself, remove that call.")
            raise
        return part

"""The automatic radius, and a warning about an unsuitable fixed one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import SAMConfig
from ..methods.base import Radius, State
from ..methods.lists import reading_is_free

_SLOT = "radius"
_SUMS = ("loss_sum", "losses", "rise_sum", "rises")


class AutomaticRadius:
    r"""Adapts rho so that e undoes a share of what the run has learned, for `sam_rho=None`.

    With the smoothed loss :math:`\bar L` and its first value :math:`L_0`, the run has learned
    :math:`L_0 - \bar L`, and :math:`\bar L` is left. The sharpness L(w + e) - L(w) is held at the
    share c of the smaller one. To first order it is proportional to rho, hence

    .. math:: \log \rho \leftarrow \log \rho + k \, \log
              \frac{c \, \min(L_0 - \bar L, \; \bar L)}{L(w + e) - L(w)}

    The rule uses losses alone, whatever the norm of e and the perturbed parameters. A model that
    has not started to learn keeps a small rho, so that e does not undo every step away from the
    start; when hardly any loss is left, rho falls with it.

    rho changes once every four updates that may be perturbed, by the means since its last change:
    by a factor of exp(1) at most (k = 1/4), within 1e-6 and 1e4. :math:`\bar L` moves by k towards
    them too; plain updates count for it. The share is taken of at least 1 % of :math:`L_0`. Of a
    negative loss, the absolute value counts. Non-finite values do not count, nor does a rise where
    e is 0 (a zero or overflowed gradient). All is averaged over micro-batches and processes, stays
    on the device, and is saved with the state of the method.

    Args:
        target_sharpness: c, above 0 and at most 1.
        state: where rho and the losses are kept.
        device, dtype: of rho.
        interval: distance in updates between two that may be perturbed.
    """

    START = 0.01
    GAIN = 0.25  # k
    EVERY = 4  # updates that may be perturbed: the losses of a single one are too noisy
    LIMIT = 4.0  # of a logarithm
    LEAST = 0.01  # of the first loss
    LOWEST, HIGHEST = 1e-6, 1e4

    def __init__(
        self,
        target_sharpness: float,
        state: State,
        device: torch.device,
        dtype: torch.dtype,
        interval: int = 1,
    ) -> None:
        self._target, self._state, self._interval = target_sharpness, state, interval
        self._start = torch.tensor(self.START, device=device, dtype=dtype)
        nothing = torch.zeros_like(self._start)
        unknown = nothing / 0
        self._initial = {"rho": self._start, "first_loss": unknown, "loss": unknown}
        # Since rho moved last: sums, and over how many updates.
        self._initial |= dict.fromkeys(_SUMS, nothing)

    @property
    def rho(self) -> Radius:
        """rho of the current update: a number where it can be read without waiting for a device."""
        rho = self._state.get(_SLOT, self._initial)["rho"]
        return rho.item() if reading_is_free(rho) else rho

    @torch.no_grad()
    def add(
        self,
        update: int,
        loss: Tensor,
        rises: Sequence[tuple[Tensor, Tensor | float]],
        total: Callable[[Sequence[Tensor]], Tensor],
        scopes: int = 1,
    ) -> None:
        """Add the losses of an update, and change rho if that is due.

        Args:
            update: its number.
            loss: L(w).
            rises: for each scope that this process has perturbed, what it adds to
                L(w + e) - L(w), and a factor of e.
            total: sums numbers over the processes, all of which call this.
            scopes: number of scopes in the update.
        """
        nothing = torch.zeros_like(self._start)
        is_finite = loss.isfinite()
        numbers = [torch.where(is_finite, loss, 0), is_finite, nothing, nothing]
        if rises:
            each = torch.stack([rise for rise, _ in rises])
            sizes = [torch.as_tensor(size, device=each.device) for _, size in rises]
            counts = each.isfinite() & (torch.stack(sizes) != 0)
            # The others are assigned the mean of the scopes that count.
            rise = torch.where(counts, each, 0).sum() * (scopes / counts.sum())
            numbers[2:] = torch.where(counts.any(), rise, 0), counts.any()
        values = dict(self._state.get(_SLOT, self._initial))
        for name, x in zip(_SUMS, total(numbers), strict=True):
            values[name] = values[name] + x
        number, rest = divmod(update, self._interval)
        if rest == 0 and number % self.EVERY == self.EVERY - 1:
            self._move(values)
        self._state[_SLOT] = values

    def goal(self, first_loss: Tensor, loss: Tensor) -> Tensor:
        """The target sharpness at a smoothed loss: 0-dimensional tensors."""
        share = torch.minimum(first_loss - loss, loss.abs())
        return self._target * torch.maximum(share, self.LEAST * first_loss.abs())

    def _move(self, values: dict[str, Tensor]) -> None:
        # NaN if no update counts: then nothing changes.
        loss = values["loss_sum"] / values["losses"]
        rise = values["rise_sum"] / values["rises"]
        first, before = _known(values["first_loss"], loss), _known(values["loss"], loss)
        after = _known(torch.lerp(before, loss, self.GAIN), before)
        error = self.goal(first, after).log() - rise.clamp(min=0).log()
        move = (self.GAIN * error.clamp(-self.LIMIT, self.LIMIT)).nan_to_num(0)
        rho = (values["rho"] * move.exp()).clamp(self.LOWEST, self.HIGHEST)
        values |= {"rho": rho, "first_loss": first, "loss": after}
        values |= {name: torch.zeros_like(x) for name, x in values.items() if name in _SUMS}


def _known(value: Tensor, other: Tensor) -> Tensor:
    """The value, or the other one where it is NaN."""
    return torch.where(value.isnan(), other, value)


class RadiusCheck:
    """Warns, once per run, that a fixed radius is far too large or has no effect.

    Far too large: the cosine was below 0.3 in three logs in a row, or the sharpness above the loss.
    No effect: the cosine was above 0.999 in all of the first ten logs, or in the Trainer in all of
    a shorter run with three logs or more. A sharpness within the rounding of the loss counts as
    such a cosine: e, from which the cosine is measured, is then lost in the rounding of w.
    """

    LOW, HIGH = 0.3, 0.999
    ROUNDING = 1e-5  # of the loss, relative
    LOGS, FLAT_LOGS = 3, 10

    def __init__(self, config: SAMConfig) -> None:
        self._config = config
        self._cosines: list[float] = []
        self._is_done = not config.sam_rho  # automatic, or off

    def add(self, metrics: dict[str, float], loss: float | None, update: int) -> None:
        """Check the metrics of a log, and the training loss next to them."""
        cosine, sharpness = metrics.get("sam_grad_cosine"), metrics.get("sam_sharpness")
        readings = []
        if loss is not None and sharpness is not None and cosine is not None:
            cosine = 1.0 if abs(sharpness) < self.ROUNDING * abs(loss) else cosine
        if cosine is not None:
            self._cosines.append(cosine)
        latest = self._cosines[-self.LOGS :]
        if len(latest) == self.LOGS and max(latest) < self.LOW:
            values = ", ".join(f"{value:.2g}" for value in latest)
            readings.append(f"sam_grad_cosine was {values} in the last {self.LOGS} logs")
        if loss is not None and sharpness is not None and sharpness > abs(loss):
            readings.append(f"sam_sharpness is {sharpness:.3g}, above the loss of {loss:.3g}")
            if cosine is not None and len(readings) == 1:
                readings.append(f"sam_grad_cosine {cosine:.2g}")
        if readings:
            what = f"is far too large at update {update}: {', '.join(readings)}"
            self._warn(what, "smaller")
        elif len(self._cosines) == self.FLAT_LOGS:
            self.end()

    def end(self) -> None:
        """Check all logs at the end of a run."""
        if len(self._cosines) >= self.LOGS and min(self._cosines) > self.HIGH:
            reading = f"sam_grad_cosine was {min(self._cosines):.5g} or more"
            self._warn(f"changes next to nothing: {reading} in all logs", "larger")

    def _warn(self, what: str, which: str) -> None:
        if self._is_done:
            return
        self._is_done = True
        auto = "" if self._config.build_method().has_one_pass else ", or sam_rho='auto' (None)"
        warnings.warn(
            f"sam_rho={self._config.sam_rho:g} {what} (0.7 to 0.95 is usual for sam_grad_cosine). "
            f"Choose a {which} sam_rho{auto}.",
            stacklevel=2,
        )

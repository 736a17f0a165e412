"""The radius: found automatically, and told when a given one is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import SAMConfig
from ..methods.base import Radius, State
from ..methods.lists import reading_is_free

_SLOT = "radius"
_SUMS = ("loss_sum", "rise_sum", "count")


class AutomaticRadius:
    r"""Moves rho so that e undoes a share of what the run has learned, for `sam_rho=None`.

    With the smoothed loss :math:`\bar L` and its first value :math:`L_0`, the run has learned
    :math:`L_0 - \bar L`, and :math:`\bar L` is left. The sharpness L(w + e) - L(w) is held at the
    share c of the smaller one. To first order it is proportional to rho, hence

    .. math:: \log \rho \leftarrow \log \rho + k \, \log
              \frac{c \, \min(L_0 - \bar L, \; \bar L)}{L(w + e) - L(w)}

    Losses know neither the norm of e nor the parameters that it moves. A model that has not begun
    to learn keeps a small rho, so that e does not undo every step that leads away from the start;
    where hardly any loss is left, rho falls with it.

    rho moves once in four perturbed updates, by their mean losses: by a factor of e at most
    (k = 1/4). :math:`\bar L` moves by k towards them too. The share is taken of 1 % of
    :math:`L_0` where less has been learned or is left. A negative loss counts by its size. Updates
    with a loss that is not finite do not count. All is averaged over micro-batches and processes,
    stays on the device, and is saved with the state of the method.

    Args:
        target_sharpness: c, above 0 and at most 1.
        state: where rho and the losses are kept.
        device, dtype: of rho.
    """

    START = 0.01
    GAIN = 0.25  # k
    EVERY = 4  # perturbed updates: the losses of one are noise
    LIMIT = 4.0  # of a logarithm
    LEAST = 0.01  # of the first loss

    def __init__(
        self, target_sharpness: float, state: State, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._target, self._state = target_sharpness, state
        self._start = torch.tensor(self.START, device=device, dtype=dtype)
        nothing = torch.zeros_like(self._start)
        unknown = nothing / 0
        self._initial = {"rho": self._start, "first_loss": unknown, "loss": unknown}
        # Sums since rho moved last, and over how many updates.
        self._initial |= dict.fromkeys(_SUMS, nothing)

    @property
    def rho(self) -> Radius:
        """rho of the current update: a number where it can be read without waiting for a device."""
        rho = self._values["rho"]
        return rho.item() if reading_is_free(rho) else rho

    @property
    def _values(self) -> dict[str, Tensor]:
        found = self._state.get(_SLOT, self._initial)
        # A checkpoint may have been loaded onto another device.
        return {name: value.to(self._start.device) for name, value in found.items()}

    @torch.no_grad()
    def add(
        self,
        number: int,
        loss: Tensor | None,
        rise: Tensor | None,
        total: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        """Take the losses of an update, and move rho at the end of four.

        Args:
            number: of the update, counting those that may be perturbed.
            loss, rise: L(w) and L(w + e) - L(w); None where this process has perturbed nothing.
            total: sums numbers over the processes, all of which call this.
        """
        nothing = torch.zeros_like(self._start)
        numbers = [nothing, nothing, nothing]
        if loss is not None and rise is not None:
            is_finite = loss.isfinite() & rise.isfinite()
            numbers = [*(torch.where(is_finite, x, 0) for x in (loss, rise)), is_finite]
        values = self._values
        for name, x in zip(_SUMS, total(numbers), strict=True):
            values[name] = values[name] + x
        if number % self.EVERY == self.EVERY - 1:
            self._move(values)
        self._state[_SLOT] = values

    def goal(self, first_loss: Tensor, loss: Tensor) -> Tensor:
        """The sharpness to hold at a smoothed loss: 0-dimensional tensors."""
        share = torch.minimum(first_loss - loss, loss.abs())
        return self._target * torch.maximum(share, self.LEAST * first_loss.abs())

    def _move(self, values: dict[str, Tensor]) -> None:
        # NaN if no update counts: then nothing moves.
        loss, rise = (values[name] / values["count"] for name in ("loss_sum", "rise_sum"))
        first, before = _known(values["first_loss"], loss), _known(values["loss"], loss)
        after = _known(torch.lerp(before, loss, self.GAIN), before)
        error = self.goal(first, after).log() - rise.clamp(min=0).log()
        move = (self.GAIN * error.clamp(-self.LIMIT, self.LIMIT)).nan_to_num(0)
        values |= {"rho": values["rho"] * move.exp(), "first_loss": first, "loss": after}
        values |= {name: torch.zeros_like(x) for name, x in values.items() if name in _SUMS}


def _known(value: Tensor, other: Tensor) -> Tensor:
    """The value, or the other one where it is NaN."""
    return torch.where(value.isnan(), other, value)


class RadiusCheck:
    """Says, once in a run, that a fixed radius is far too large or does nothing.

    Far too large: the cosine was below 0.3 in three logs in a row, or the sharpness above the loss.
    Nothing: the cosine was above 0.999 in all of the first ten logs, or in the Trainer in all of a
    shorter run with three logs or more. A sharpness within the rounding of the loss counts as such
    a cosine: e is then lost in the rounding of w, from which the cosine is measured.
    """

    LOW, HIGH = 0.3, 0.999
    ROUNDING = 1e-5  # of the loss, relative
    LOGS, FLAT_LOGS = 3, 10

    def __init__(self, config: SAMConfig) -> None:
        self._config = config
        self._cosines: list[float] = []
        self._is_done = not config.sam_rho  # automatic, or off

    def add(self, metrics: dict[str, float], loss: float | None, update: int) -> None:
        """Look at the metrics of a log, and at the training loss next to them."""
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
        """At the end of a run."""
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

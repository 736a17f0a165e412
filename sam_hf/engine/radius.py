"""The radius: found automatically, and told when a given one is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import SAMConfig
from ..methods.base import Radius, State
from ..methods.lists import reading_is_free

_SLOT = "radius"


class AutomaticRadius:
    r"""Moves rho so that cos(g, g_s) stays at a target, for `sam_rho=None`.

    The cosine has no unit and knows no norm. Near 1 the perturbation changes nothing, at 0.7 to
    0.95 SAM works, near 0 its updates have little to do with the loss. With :math:`\theta` the
    angle between g and g_s, :math:`\tan\theta` and :math:`|g_s| / |g|` - 1 are to first order
    proportional to rho, so that a reading tells by which factor the target c is missed:

    .. math:: \log \rho \leftarrow \log \rho + k \, \log \min\left(
              \frac{\tan(\arccos c)}{\tan\theta}, \;
              \frac{1}{|g_s| / |g| - 1 - \tan\theta} \right)

    The second term counts where it is positive: |g_s| / |g| may be 2, and more where g_s turns. A
    model that has not begun to learn needs it: there g is the noise of the batch, which e lengthens
    and hardly turns, and the cosine alone would let rho grow until e undoes every step that leads
    away.

    Every fourth update is read (with an interval of 3 or more, every perturbed one), and moves rho
    by a factor of e at most (k = 1/4), so that rho follows the mean of about 16 updates. In scope
    `micro_batch` each g_s is compared with its own g, and the logarithms are averaged over the
    micro-batches and processes of the update. A reading that is not finite does not count. rho
    stays on the device, and is saved with the state of the method.

    Args:
        target_cosine: c, above 0 and below 1.
        state: where rho is kept.
        device, dtype: of rho, those of the inner products.
    """

    START = 0.01
    GAIN = 0.25  # k
    EVERY = 4  # updates: a reading costs passes over the weights
    LIMIT = 4.0  # of a logarithm

    def __init__(
        self, target_cosine: float, state: State, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._turn = math.tan(math.acos(target_cosine))
        self._state, self._start = state, torch.tensor(self.START, device=device, dtype=dtype)
        self._readings: list[Tensor] = []

    @property
    def rho(self) -> Radius:
        """rho of the current update: a number where it can be read without waiting for a device."""
        rho = self._rho
        return rho.item() if reading_is_free(rho) else rho

    @property
    def _rho(self) -> Tensor:
        found = self._state.get(_SLOT, {}).get("rho", self._start)
        return found.to(self._start.device)  # a checkpoint may have been loaded onto another one

    def reads(self, update: int, interval: int) -> bool:
        """Whether an update is read: one in EVERY, or all that are perturbed if they are rare."""
        return update // interval % max(self.EVERY // interval, 1) == 0

    def add(self, cosine: Tensor, growth: Tensor) -> None:
        """Take the reading of one scope: cos(g, g_s) and |g_s| / |g|, 0-dimensional tensors."""
        self._readings.append(self.correction(cosine, growth))

    def correction(self, cosine: Tensor, growth: Tensor) -> Tensor:
        """Logarithm of the factor to the radius at which the target would be met."""
        turn = cosine.clamp(math.exp(-self.LIMIT), 1).square().reciprocal().sub(1).sqrt()
        return -torch.maximum(turn / self._turn, growth - 1 - turn).log()

    def discard(self) -> None:
        """Forget the readings of an update that was not completed."""
        self._readings = []

    def finish(self, total: Callable[[Sequence[Tensor]], Tensor] | None) -> None:
        """End an update. `total` sums numbers over processes that have readings of their own."""
        readings, self._readings = self._readings, []
        if not readings and total is None:
            return
        found = torch.stack(readings) if readings else self._start.new_zeros(0)
        usable = ~found.isnan()
        error = torch.where(usable, found, 0).clamp(-self.LIMIT, self.LIMIT).sum()
        count = usable.sum()
        if total is not None:
            error, count = total([error, count])
        rho = self._rho * (self.GAIN * error / count.clamp(min=1)).exp()
        self._state[_SLOT] = {"rho": rho}


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

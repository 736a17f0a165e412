"""What a method is: how the gradient becomes a perturbation, and what the optimizer gets of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

Dot = Callable[[list[Tensor], list[Tensor]], Tensor]
"""``dot(xs, ys)``: the inner product over all tensors (and all shards), a 0-dimensional tensor."""

State = dict[str, dict[str, Tensor]]
"""What a method keeps from one update to the next: for each of its slots, a tensor for each
parameter, by name. It is saved with every checkpoint, and cut as the weights are cut."""


@dataclass(frozen=True)
class Method:
    """A perturbation e = ± ρ d / |d|*, and the gradient that the optimizer gets.

    A method is a frozen dataclass. Its fields are its options: ``eta`` is filled from
    ``SAMConfig.sam_eta``, and so on. It sees lists of tensors, one entry for each parameter that
    has a gradient, and ``dot``. It never learns where the tensors live, and it must not read a
    number from the device: the multiplication by ρ / |d|*, and the decision that a zero or
    non-finite norm perturbs nothing, are made outside, once, for every method.

    A method must define `direction`, unless it says that it `perturbs` nothing. What else it
    defines says what it needs:

    * `combine`: g is kept during the descent pass (one more copy of the gradient);
    * `should_perturb` and `reuse`: updates with one pass, between those with two;
    * `before_step`, `after_step`: something to do with the weights beside the optimizer's step;
    * `choose`: another part of the parameters for each update.
    """

    citation: ClassVar[str]
    """The paper, in BibTeX. Model cards show it."""

    reports_shares: ClassVar[bool] = False
    """Whether the logs show how |e|² is spent on norms, biases, embeddings and matrices."""

    perturbs: ClassVar[bool] = True
    """Whether weights are moved for a pass. If not, an update has one pass, and the method acts
    beside the optimizer's step alone."""

    needs_adapters: ClassVar[bool] = False
    """Whether the model must have LoRA adapters."""

    needs_auxiliary: ClassVar[bool] = False
    """Whether a second pair of LoRA factors, named `factors.AUXILIARY`, is there in every training
    pass."""

    along_momentum: ClassVar[bool] = False
    """Whether e lies against the optimizer's momentum, which `direction` is given instead of g:
    then an update has one pass, at w + e, and e = - ρ d / |d|*."""

    has_state: ClassVar[bool] = False
    """Whether the method keeps something from one update to the next."""

    remembers_gradients: ClassVar[bool] = False
    """Whether the state is made of g itself. Then g comes in fp32, and without the loss scale of
    fp16, which changes from one update to the next."""

    def should_perturb(self, update: int, state: State) -> bool:
        """Whether the update number ``update`` (from 0) has a descent pass; else it is `reuse`."""
        return True

    def choose(self, names: Sequence[str], update: int, seed: int) -> Sequence[str]:
        """The parameters that are perturbed in this update, the same on every process.

        Args:
            names: those that may be.
            update: its number, from 0.
            seed: that of the run.
        """
        return names

    def direction(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> tuple[list[Tensor], Tensor]:
        """The direction d of the perturbation and its squared norm |d|*².

        Args:
            names: the perturbed parameters' names in the model.
            weights: w, one tensor for each name. Read only.
            grads: g, shaped like ``weights``. May be overwritten: they are dropped afterwards,
                so that a direction can be made in their memory. Of a method `along_momentum` the
                optimizer's momentum, read only.
            dot: the inner product.
            state: what the method keeps. To be updated.

        Returns:
            d, shaped like ``weights`` (its scale does not matter), and |d|*² as ``dot`` returns it.
            d is overwritten, unless `keeps_direction`.
        """
        raise NotImplementedError

    def combine(
        self,
        names: Sequence[str],
        grads: list[Tensor],
        descent_grads: list[Tensor],
        dot: Dot,
        state: State,
    ) -> list[Tensor] | None:
        """Make of g and g_s what the optimizer gets, in the memory of ``descent_grads``.

        Args:
            names: the trained parameters that have both gradients, perturbed or not.
            grads: g. May be overwritten.
            descent_grads: g_s; overwritten by the result.
            dot: the inner product.
            state: what the method keeps. To be updated.

        Returns:
            What `after_step` needs, in units of the gradients, one tensor for each name; or None.
        """
        return None

    def reuse(self, names: Sequence[str], grads: list[Tensor], dot: Dot, state: State) -> None:
        """Make of g what the optimizer gets in an update without a descent pass, in its memory."""

    def before_step(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        grads: list[Tensor],
        learning_rates: list[float],
        rho: float,
    ) -> None:
        """Change weights or gradients before the optimizer steps (never where it is skipped).

        Args:
            names, weights, grads: of the trained parameters that have a gradient.
            learning_rates: one for each of them.
            rho: that of the update.
        """

    def after_step(
        self,
        names: Sequence[str],
        weights: list[Tensor],
        pending: Mapping[str, Tensor],
        learning_rates: list[float],
        rho: float,
    ) -> None:
        """Change the weights after the optimizer has stepped (never where a step was skipped).

        Args:
            names, weights: of the trained parameters.
            pending: what `combine` returned, by name, without the loss scale of fp16.
            learning_rates: one for each of them.
            rho: that of the update.
        """

    def ascent_gradient(
        self, names: Sequence[str], weights: list[Tensor], perturbation: list[Tensor]
    ) -> list[Tensor] | None:
        """g up to a positive factor, from w and e: ``direction`` undone. None where it cannot be.

        It lets cos(g, g_s) be measured without keeping g in memory during the descent pass.
        ``perturbation`` may be overwritten.
        """
        return None

    @classmethod
    def keeps_gradient(cls) -> bool:
        """Whether `combine` needs g beside g_s."""
        return cls.combine is not Method.combine

    @classmethod
    def keeps_direction(cls) -> bool:
        """Whether d is needed after the perturbation, and must not be overwritten."""
        return cls.along_momentum or cls.keeps_gradient()

    @classmethod
    def has_plain_updates(cls) -> bool:
        """Whether there are updates without a descent pass."""
        return cls.should_perturb is not Method.should_perturb

    @classmethod
    def has_one_pass(cls) -> bool:
        """Whether every update has one pass alone."""
        return cls.along_momentum or not cls.perturbs

    @classmethod
    def steps_too(cls) -> bool:
        """Whether the method does something beside the optimizer's step."""
        return cls.before_step is not Method.before_step or cls.after_step is not Method.after_step

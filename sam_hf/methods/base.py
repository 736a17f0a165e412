"""What a method is: a rule that turns the gradient at w into a perturbation of w."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

Dot = Callable[[list[Tensor], list[Tensor]], Tensor]
"""``dot(xs, ys)``: the inner product over all tensors (and all shards), a 0-dimensional tensor."""


@dataclass(frozen=True)
class Method:
    """A perturbation e = ρ d / |d|*, given by its direction d and by the norm |d|*.

    A method is a frozen dataclass. Its fields are its options: ``eta`` is filled from
    ``SAMConfig.sam_eta``, and so on. It sees lists of tensors, one entry for each perturbed
    parameter that has a gradient, and ``dot``. It never learns where the tensors live, and it
    must not read a number from the device: the multiplication by ρ / |d|*, and the decision that
    a zero or non-finite norm perturbs nothing, are made outside, once, for every method.
    """

    citation: ClassVar[str]
    """The paper, in BibTeX. Model cards show it."""

    reports_shares: ClassVar[bool] = False
    """Whether the logs show how |e|² is spent on norms, biases, embeddings and matrices."""

    def direction(
        self, names: Sequence[str], weights: list[Tensor], grads: list[Tensor], dot: Dot
    ) -> tuple[list[Tensor], Tensor]:
        """The direction d of the perturbation and its squared norm |d|*².

        Args:
            names: the parameters' names in the model.
            weights: w, one tensor for each name. Read only.
            grads: g, shaped like ``weights``. May be overwritten: they are dropped afterwards,
                so that a direction can be made in their memory.
            dot: the inner product.

        Returns:
            d, shaped like ``weights`` (its scale does not matter), and |d|*² as ``dot`` returns it.
        """
        raise NotImplementedError

    def ascent_gradient(
        self, names: Sequence[str], weights: list[Tensor], perturbation: list[Tensor]
    ) -> list[Tensor]:
        """g up to a positive factor, from w and e: ``direction`` undone.

        It lets cos(g, g_s) be measured without keeping g in memory during the descent pass.
        ``perturbation`` may be overwritten.
        """
        raise NotImplementedError

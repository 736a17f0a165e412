"""The interface of a method: from the gradient to the perturbation, and what the optimizer gets."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

Names = Sequence[str]
Tensors = list[Tensor]
Floats = list[float]
Named = Mapping[str, Tensor]

Direction = tuple[Tensors, Tensor]
"""A direction d, and its squared norm ``|d|*^2``."""

Dot = Callable[[Tensors, Tensors], Tensor]
"""``dot(xs, ys)``: the inner product over all tensors and all shards, a 0-dimensional tensor."""

Radius = float | Tensor
"""rho: a number, or a 0-dimensional tensor if it is automatic."""

State = dict[str, dict[str, Tensor]]
"""What a method keeps between updates: slot -> parameter name -> tensor. It is saved with every
checkpoint, and sharded like the parameters."""


def option(default: Any, *, help: str, choices: Collection[str] = (), **limits: float) -> Any:
    """Declare an option of one method, a key of ``SAMConfig.sam_method_args``.

    Args:
        default: its type is the option's type: bool, int, float or str.
        help: one line for `--help`, the model card and error messages.
        choices: the strings that are allowed.
        limits: bounds of a number: ``low`` and ``high`` (closed), ``above`` and ``below`` (open).
    """
    return field(default=default, metadata={"help": help, "limits": limits, "choices": choices})


@dataclass(frozen=True)
class Method:
    """A perturbation ``e = ± rho d / |d|*``, and the gradient that the optimizer gets.

    A method is a frozen dataclass. Fields declared with `option` are the keys that it takes in
    ``sam_method_args``; others, such as ASAM's ``eta``, are filled from ``SAMConfig.sam_eta``.

    A method sees lists of tensors, one entry for each parameter with a gradient, and ``dot``. It
    does not know on which devices or processes the tensors are, and it must not read a value from
    the device: the scaling by ``rho / |d|*``, and the rule that a zero or non-finite norm perturbs
    nothing, are applied by the engine, once for all methods.

    Every method that perturbs defines `direction`. The class attributes below declare which other
    functions it has; a subclass sets them without an annotation.
    """

    citation: ClassVar[str]
    """BibTeX entry of the paper, shown in model cards."""
    perturbs: ClassVar[bool] = True
    """There is a pass at w + e. Otherwise the method acts at the step, and the pass is at w."""
    combines: ClassVar[bool] = False
    """`combine` needs g next to g_s; g is kept in the descent pass (one copy of the gradient)."""
    reuses: ClassVar[bool] = False
    """Some updates have one pass (`should_perturb`), whose gradient is changed by `reuse`."""
    chooses: ClassVar[bool] = False
    """`choose` selects other parameters in each update."""
    acts_on_step: ClassVar[bool] = False
    """`before_step` or `after_step` is called at the optimizer step."""
    along_momentum: ClassVar[bool] = False
    """``e = - rho d / |d|*`` with d made of the optimizer's momentum, which `direction` gets
    instead of g. An update has one pass, at w + e."""
    keeps_direction: ClassVar[bool] = False
    """The tensors that `direction` returns are needed later and must not be overwritten."""
    has_state: ClassVar[bool] = False
    """The method keeps a `State` between updates."""
    remembers_gradients: ClassVar[bool] = False
    """The state is made of g, given in fp32 and without the changing loss scale of fp16."""
    reports_shares: ClassVar[bool] = False
    """The logs show the shares of ``|e|^2`` on norms, biases, embeddings and matrices."""
    needs_adapters: ClassVar[bool] = False
    """The model must have LoRA adapters."""
    needs_auxiliary: ClassVar[bool] = False
    """A second pair of LoRA factors (`lora.factors.AUXILIARY`) is active in every training pass."""

    @property
    def has_one_pass(self) -> bool:
        """Whether every update has one forward-backward pass."""
        return self.along_momentum or not self.perturbs

    @property
    def interval(self) -> int:
        """Number of updates from one to the next that the method perturbs by its own rule."""
        return 1

    def should_perturb(self, update: int, state: State) -> bool:
        """Whether update ``update`` (from 0) has a descent pass; if not, `reuse` is called."""
        return True

    def choose(self, names: Names, update: int, seed: int) -> Names:
        """Names of the parameters to perturb in this update; the same on every process.

        Args:
            names: the parameters that may be perturbed.
            update: number of the update, from 0.
            seed: seed of the training run.
        """
        return names

    def direction(
        self, names: Names, weights: Tensors, grads: Tensors, dot: Dot, state: State
    ) -> Direction:
        """Direction d of the perturbation and its squared norm ``|d|*^2``.

        Args:
            names: names of the perturbed parameters.
            weights: w, one tensor for each name. Read only.
            grads: g, shaped like ``weights``. May be overwritten, so that d can be written in its
                memory. For a method `along_momentum`: the optimizer's momentum, read only.
            dot: the inner product.
            state: the method's state, to be updated.

        Returns:
            d, shaped like ``weights`` (its scale does not matter), and ``|d|*^2``, a 0-dimensional
            tensor. d is overwritten unless the method `keeps_direction`.
        """
        raise NotImplementedError

    def ascent_gradient(
        self, names: Names, weights: Tensors, perturbation: Tensors
    ) -> Tensors | None:
        """g up to a positive factor, recovered from w and e; None where that is impossible.

        With it cos(g, g_s) is measured without keeping g. ``perturbation`` may be overwritten.
        """
        return None

    def combine(
        self, names: Names, grads: Tensors, descent_grads: Tensors, dot: Dot, state: State
    ) -> Tensors | None:
        """Write what the optimizer gets, made of g and g_s, into ``descent_grads``.

        Args:
            names: the trained parameters that have both gradients, perturbed or not.
            grads: g. May be overwritten.
            descent_grads: g_s; overwritten by the result.
            dot, state: as in `direction`.

        Returns:
            Tensors that `after_step` needs, in units of the gradient, one for each name; or None.
        """
        return None

    def reuse(self, names: Names, grads: Tensors, dot: Dot, state: State) -> None:
        """Overwrite g with what the optimizer gets in an update without a descent pass."""

    def before_step(
        self, names: Names, weights: Tensors, grads: Tensors, learning_rates: Floats, rho: Radius
    ) -> None:
        """Change weights or gradients before the optimizer step; not called for a skipped step.

        Args:
            names, weights, grads: of the trained parameters that have a gradient.
            learning_rates: one for each of them.
            rho: of this update.
        """

    def after_step(
        self, names: Names, weights: Tensors, pending: Named, learning_rates: Floats, rho: Radius
    ) -> None:
        """Change the weights after the optimizer step; not called for a skipped step.

        Args:
            names, weights: of the trained parameters.
            pending: what `combine` returned, by name, without the loss scale of fp16.
            learning_rates, rho: as in `before_step`.
        """

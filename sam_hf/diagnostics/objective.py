"""The mean loss over fixed examples as a function of the weights."""

import copy
import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mode
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.trainer_pt_utils import find_batch_size

from ..distributed import processes
from ..engine.parameters import select_parameters
from ..engine.perturbation import HALF, Perturbation
from ..engine.state import always_restore
from .evaluation import deterministic_evaluation, preserved_random_state
from .numerics import norm

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: mean loss over the examples of the batch, a scalar tensor."""

PRODUCTS = ("auto", "exact", "differences")
# Work in units of a forward-backward pass. A backward pass costs about two forward passes, and an
# exact Hessian-vector product differentiates a forward-backward pass, at about the same cost again.
FORWARD_WORK, PRODUCT_WORK = 1 / 3, 2.0
# Central differences that change by more than this share when their step is halved are unreliable.
_MAX_STEP_SENSITIVITY = 0.2


class Objective:
    r"""The mean loss :math:`L(w)` of a model over fixed examples, as a function of the weights.

    Losses and gradients are computed in evaluation mode (no dropout, fixed running statistics),
    without autocast and TF32. Afterwards weights (bitwise), buffers, `.grad`, training flags and
    the global random state are as before. Under DDP, each process passes its own batches and must
    make the same calls. Values and gradients are those over the examples of all processes.

    Args:
        model: a model in float32 or float64. DistributedDataParallel is unwrapped; sharded weights
            are not supported.
        batches: mappings of tensors, or anything that `loss` accepts. The iterable is consumed
            once; each batch is moved to the model's device for its forward pass. The size of a
            batch is the first dimension of its first tensor.
        loss: ``loss(model, batch)``, the mean loss over the batch; by default the loss that
            ``model(**batch)`` returns. Batches are weighted by their number of examples, also where
            `loss` is a mean over tokens; the loss of a language model depends on the batching.
        params: the weights that the loss is a function of: "all", "norms", "matrices", or a regular
            expression on parameter names. Frozen parameters are excluded.
        products: how Hessian-vector products are computed. "exact": by double backpropagation.
            "differences": by central differences of gradients. "auto": exact, with a warning and
            differences if double backpropagation fails (a kernel without a second derivative; in
            one process, also out of memory), or if its first product contradicts the differences.

    Attributes:
        names, weights: names of the selected parameters, and the parameters in this order.
        parameter_count: number n of scalars in `weights`.
        example_count: number of examples of all processes.
        batch_sizes: number of examples in each batch of this process.
        common_batch_size: the most common batch size, that of rank 0 on all processes.
        common_batch_count: number of batches of that size, of all processes.
        on_batch: called after each batch of this process with its work, in forward-backward passes
            times examples: a forward pass counts as 1/3, an exact Hessian-vector product as 2.

    Raises:
        ValueError: the weights are sharded or in half precision, `batches` is empty, `params`
            selects no trainable parameter, or an argument has a value that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        params: str = "all",
        products: str = "auto",
    ) -> None:
        if products not in PRODUCTS:
            raise ValueError(f"products={products!r} is not allowed. Allowed: {PRODUCTS}.")
        self.model, self.params, self.products = processes.unwrap(model), params, products
        try:
            selected = select_parameters(self.model, params)
        except re.error as error:
            raise ValueError(f"params={params!r} does not compile: {error}") from error
        except ValueError as error:
            raise ValueError(str(error).replace("sam_params=", "params=", 1)) from error
        trainable = {name: p for name, p in selected.items() if p.requires_grad}
        self.names, self.weights = list(trainable), list(trainable.values())
        self.parameter_count = sum(w.numel() for w in self.weights)
        if half := sorted({str(w.dtype) for w in self.weights if w.dtype in HALF}):
            raise ValueError(
                f"{type(self.model).__name__} has weights in {', '.join(half)}, which round too "
                "coarsely. Allowed: float32 and float64. Load the model with dtype=torch.float32"
            )
        self._device = self.weights[0].device
        self._epsilon = torch.finfo(self.weights[0].dtype).eps
        self._has_warned = False
        self._loss = loss or _loss_of_model
        self.on_batch: Callable[[float], object] = lambda work: None
        self.is_distributed = processes.is_distributed()
        with preserved_random_state(self._device):  # a shuffling loader draws a global seed
            self._set_batches(list(batches))

    def _set_batches(self, batches: list[Any]) -> None:
        if not batches:
            raise ValueError("batches is empty: at least one batch is needed")
        self.batches = batches
        self.batch_sizes = [size or 0 for size in map(find_batch_size, batches)]
        if 0 in self.batch_sizes:
            number = self.batch_sizes.index(0)
            raise ValueError(f"batch number {number} has no examples in its first tensor")
        self.example_count = int(processes.total(sum(self.batch_sizes), self._device))
        # The same on all processes, since code that depends on these calls collectives.
        self.common_batch_size = processes.from_main_process(mode(self.batch_sizes), self._device)
        count = self.batch_sizes.count(self.common_batch_size)
        self.common_batch_count = int(processes.total(count, self._device))

    def value(self) -> float:
        """Loss L(w). Cost: one forward pass over the examples."""
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        with deterministic_evaluation(self.model, self._device), torch.no_grad():
            for share, batch in self._weighted_batches(FORWARD_WORK):
                loss += share * self._loss(self.model, batch).double()
        return processes.total(float(loss.item()), self._device)

    def gradient(self) -> list[Tensor]:
        """Gradient ∇L(w), with one tensor for each of `names`. Cost: one forward-backward pass."""
        return self._mean(self._derivative)

    def value_and_gradient(self) -> tuple[float, list[Tensor]]:
        """L(w) and ∇L(w). Cost: one forward-backward pass."""
        losses: list[Tensor] = []

        def derivative(loss: Tensor) -> list[Tensor]:
            losses.append(loss.detach().double())
            return self._derivative(loss)

        gradient = self._mean(derivative)
        weighted = zip(self.batch_sizes, losses, strict=True)
        value = sum(size / self.example_count * float(loss) for size, loss in weighted)
        return processes.total(value, self._device), gradient

    def batch_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the size of each batch of this process, and the gradient of its mean loss."""
        for size, (_, batch) in zip(self.batch_sizes, self._weighted_batches(), strict=True):
            with deterministic_evaluation(self.model, self._device):
                grads = self._derivative(self._loss(self.model, batch))
            yield size, grads

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Hessian-vector product ∇²L(w) v, where v and the product have a tensor for each name.

        Exact products (Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation
        6, 1994) differentiate the inner product of the gradient with v; differences need four
        gradients (see `products`).
        """
        if self.products != "differences":
            is_chosen = self.products == "exact"
            try:
                product = self._exact_product(vector)
            except RuntimeError as error:
                if is_chosen or (self.is_distributed and isinstance(error, torch.OutOfMemoryError)):
                    raise  # the other processes continue with exact products
                reason = str(error).splitlines()[0]
            else:
                if is_chosen or not self._is_contradicted(product, vector):
                    self.products = "exact"
                    return product
                # Kernels that compute their gradient in the forward pass drop second-order terms
                # without an error.
                reason = "they contradict the differences, so part of the backward graph is missing"
            self.products = "differences"
            method = "Hessian-vector products are computed by central differences of gradients"
            warnings.warn(f"{method}, since exact products failed: {reason}", stacklevel=2)
        product, sensitivity = self._difference_product(vector)
        if sensitivity > _MAX_STEP_SENSITIVITY and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"central-difference Hessian-vector products change by {sensitivity:.0%} when the "
                "step is halved: the loss is not smooth, or rounding errors dominate its gradient",
                stacklevel=2,
            )
        return product

    def _exact_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        def product(loss: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(
                loss, self.weights, create_graph=True, materialize_grads=True
            )
            inner = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)])
            return self._derivative(inner.sum())

        # Of the attention kernels, only the math one can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return self._mean(product, PRODUCT_WORK)

    def _difference_product(self, vector: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Product by central differences, and its relative change when their step is halved."""
        # Richardson extrapolation (Nocedal and Wright, Numerical Optimization, 2nd ed., 8.1).
        length = norm(vector)
        if length == 0:
            return [torch.zeros_like(v) for v in vector], 0.0
        step = self._difference_distance() / length
        full, half = (self._central_difference(vector, s) for s in (step, step / 2))
        change = torch._foreach_sub(half, full)
        size = norm(half)
        sensitivity = norm(change) / size if size > 0 else 0.0
        # The error is quadratic in the step: a third of the change is what remains at half of it.
        torch._foreach_add_(half, change, alpha=1 / 3)
        return half, sensitivity

    def _central_difference(self, vector: Sequence[Tensor], step: float) -> list[Tensor]:
        with self.perturbed(vector, step):
            difference = self.gradient()
        with self.perturbed(vector, -step):
            torch._foreach_sub_(difference, self.gradient())
        return list(torch._foreach_div(difference, 2 * step))

    def _difference_distance(self) -> float:
        """Distance ε |v| = u^(2/5) (1 + r): machine epsilon u, root-mean-square weight r."""
        # It does not grow with the number of weights: along the sharpest directions, neither does
        # the distance over which the loss is close to quadratic.
        return float(self._epsilon**0.4 * (1 + norm(self.weights) / self.parameter_count**0.5))

    def _is_contradicted(self, exact: Sequence[Tensor], vector: Sequence[Tensor]) -> bool:
        """Whether reliable central differences are far from an exact product."""
        # Not reliable: those that depend on their step (kinks of ReLUs), or near rounding errors.
        differences, sensitivity = self._difference_product(vector)
        relative_rounding = 100 * self._epsilon / self._difference_distance()
        rounding = relative_rounding * norm(self.gradient()) * norm(vector)
        distance = norm(torch._foreach_sub(list(exact), differences))
        is_far = distance > max(0.5 * norm(exact), 0.5 * norm(differences), rounding)
        return bool(is_far and sensitivity < _MAX_STEP_SENSITIVITY)

    @contextmanager
    def perturbed(self, direction: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
        """Set the weights to w + scale · direction; restore w bitwise when the context exits."""
        perturbation = Perturbation(self.weights)  # type: ignore[arg-type]
        with always_restore(perturbation.restore):
            with torch.no_grad():
                perturbation.apply(list(direction), float(scale), keep_direction=True)
            yield

    def random_vector(self, generator: torch.Generator) -> list[Tensor]:
        """Standard normal tensors in the shapes of the weights, drawn by a CPU generator."""
        drawn = (torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in self.weights)
        return [x.to(w.device) for x, w in zip(drawn, self.weights, strict=True)]

    def subset(self, positions: Sequence[int]) -> Self:
        """Objective over the batches at the given positions, in one process."""
        if self.is_distributed:
            raise ValueError("subset is not supported with several processes")
        part = copy.copy(self)
        part._set_batches([self.batches[i] for i in positions])
        return part

    def fingerprint(self) -> str:
        """Hash of the weights, the buffers and the batches of all processes, as hexadecimal."""
        own = content_hash([self.model.state_dict(), self.batches])
        return f"{int(processes.total(int(own[:12], 16), self._device)):x}"

    def _weighted_batches(self, work: float = 1.0) -> Iterator[tuple[float, Any]]:
        """Yield each batch on the model's device, with its share of all examples."""
        for size, batch in zip(self.batch_sizes, self.batches, strict=True):
            yield size / self.example_count, processes.to_device(batch, self._device)
            self.on_batch(work * size)

    def _mean(self, function: Callable[[Tensor], list[Tensor]], work: float = 1.0) -> list[Tensor]:
        """Mean over the examples of what a function computes from the loss of each batch."""
        mean = [torch.zeros_like(w) for w in self.weights]
        with deterministic_evaluation(self.model, self._device):
            for share, batch in self._weighted_batches(work):
                values = function(self._loss(self.model, batch))
                torch._foreach_add_(mean, values, alpha=share)
        processes.sum_over_processes_(mean)
        return mean

    def _derivative(self, output: Tensor) -> list[Tensor]:
        """Gradient of a scalar with respect to the weights, as dense tensors."""
        if not output.requires_grad:  # it depends on none of the weights
            return [torch.zeros_like(w) for w in self.weights]
        grads = torch.autograd.grad(output, self.weights, materialize_grads=True)
        return [g.to_dense() if g.is_sparse else g for g in grads]


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """Loss that the model itself computes: output "loss", or the first output."""
    remedy = "pass loss=, a function of the model and the batch"
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch of type {type(batch).__name__} is not a mapping: {remedy}")
    output = model(**batch)
    loss: Any = output[0] if isinstance(output, tuple) else output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            f"{type(model).__name__} returned no scalar loss for a batch with the keys "
            f"{sorted(batch)}: add labels to the batch, or {remedy}"
        )
    return loss


def content_hash(value: Any) -> str:
    """Hash of all tensors and plain values of a nested container, as hexadecimal."""
    digest: Any = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(content_hash([(str(key), value[key]) for key in sorted(value)]).encode())
    elif isinstance(value, (list, tuple)):
        digest.update(" ".join(map(content_hash, value)).encode())
    else:
        digest.update(repr(value).encode())
    return str(digest.hexdigest())

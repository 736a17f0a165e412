"""The loss over fixed examples as a function of the weights: value, gradient, Hessian products."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mode
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backends.processes import is_distributed, largest_over_processes, sum_over_processes_, unwrap
from ..params import select_parameters
from ..perturbation import HALF, Perturbation
from ..replay import RandomState
from .batches import add_to_hash, batch_size, loss_of_model, to_device
from .differences import TRUSTED, central_differences, refute
from .precision import full_precision

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: the mean over the examples of the batch, a scalar."""

PRODUCTS = ("auto", "exact", "differences")


class Objective:
    r"""The mean loss :math:`L(w)` of a model over fixed examples.

    All measures of this package take one. While it computes, the model is in evaluation mode (no
    dropout, running statistics fixed), without autocast and TF32, and afterwards everything is as
    it was: the weights bit for bit, `.grad`, the mode of each module, the random state.

    Under DDP every process gives its own batches and must make the same calls: values and gradients
    are those over the examples of all processes.

    Args:
        model: in fp32 or float64. DDP is unwrapped; sharded weights are refused.
        batches: mappings of tensors, or whatever `loss` understands. They are gone through once,
            and kept where they are; each moves to the model's device when it is needed.
        loss: ``loss(model, batch)``, the mean over the batch. If None, the first output of
            ``model(**batch)``, which for models of transformers is the loss if there are labels.
            Means over tokens are weighted by the numbers of examples too, so that the loss of a
            language model depends on how its texts are cut into batches.
        params: which weights the loss is a function of: "all", "norms", "matrices", or a regular
            expression on parameter names. Frozen ones do not count.
        products: how Hessian-vector products are made: "exact", by a backward pass through the
            backward pass; "differences", central differences of gradients; "auto" tries the first
            and falls back to the second, with a warning, where a kernel has no second derivative:
            it fails, or its first product is far from that of the differences, or where, in one
            process, memory is short.

    Raises:
        ValueError: weights are sharded or in half precision, there is no batch, no parameter is
            selected, or an argument is none of those allowed.
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
        self.model = unwrap(model)
        try:
            named = select_parameters(self.model, params)
        except re.error as error:
            raise ValueError(f"params={params!r} does not compile: {error}") from error
        except ValueError as error:
            raise ValueError(str(error).replace("sam_params=", "params=", 1)) from error
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        self.params = params
        self.names = list(trainable)
        self.weights = list(trainable.values())
        narrow = sorted({str(w.dtype) for w in self.weights if w.dtype in HALF})
        if narrow:
            raise ValueError(
                f"{type(self.model).__name__} has weights in {', '.join(narrow)}, whose rounding "
                "is coarser than what is measured. Allowed: float32 and float64. Load the model "
                "with dtype=torch.float32"
            )
        self._device = self.weights[0].device
        random_state = self._random_state()
        self.batches = list(batches)
        random_state.restore()  # a loader draws its seed from the global generator
        if not self.batches:
            raise ValueError("batches is empty: at least one batch is needed")
        self.products = products
        self._has_warned = False
        self._loss = loss or loss_of_model
        self.is_shared = is_distributed()
        self.batch_sizes = [batch_size(batch) for batch in self.batches]
        if not all(self.batch_sizes):
            raise ValueError(
                f"batch number {self.batch_sizes.index(0)} has no examples: the first dimension of "
                "its first tensor counts them"
            )
        total = torch.tensor(float(sum(self.batch_sizes)), dtype=torch.float64, device=self._device)
        sum_over_processes_([total])
        self.example_count = int(total.item())
        # Of all processes: what one of them does, all must do.
        self.usual_size = largest_over_processes(mode(self.batch_sizes), self._device)
        usual = torch.tensor(self.batch_sizes.count(self.usual_size), device=self._device)
        sum_over_processes_([usual])
        self.usual_batches = int(usual.item())

    @property
    def parameter_count(self) -> int:
        return sum(w.numel() for w in self.weights)

    # ------------------------------------------------------------------------- values, gradients

    def value(self) -> float:
        """L(w)."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._measuring(), torch.no_grad():
            for share, batch in self._shares():
                total += share * self._loss(self.model, batch).double()
        sum_over_processes_([total])
        return float(total.item())

    def gradient(self) -> list[Tensor]:
        """∇L(w): one tensor for each of `names`, zeros where the loss does not depend on it."""
        with self._measuring():
            grads = self._local_gradient()
        sum_over_processes_(grads)
        return grads

    def batch_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The size of each batch of this process, and the gradient of the mean loss over it."""
        for size, batch in zip(self.batch_sizes, self.batches, strict=True):
            with self._measuring():
                loss = self._loss(self.model, self._there(batch))
                grads = self._derivative(loss, self.weights)
            yield size, grads

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """∇²L(w) v, for v with one tensor for each of `names`.

        See `products` for how, and `central_differences` for what is done without a second
        derivative.
        """
        if self.products == "differences":
            return self._difference_product(vector)
        if self.products == "exact":
            return self._exact_product(vector)
        try:
            product = self._exact_product(vector)
        except (RuntimeError, NotImplementedError) as error:
            if self.is_shared and isinstance(error, torch.OutOfMemoryError):
                raise  # the other processes go on with exact ones
            why = str(error).splitlines()[0]
        else:
            if not refute(self, product, vector):
                self.products = "exact"
                return product
            # A kernel that computes its gradient in the forward pass loses the rest without a word.
            why = "they are far from the differences, so that a part of the graph is missing"
        warnings.warn(
            f"Hessian products are central differences of gradients. Exact ones failed: {why}",
            stacklevel=2,
        )
        self.products = "differences"
        return self._difference_product(vector)

    def _exact_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(w) for w in self.weights]
        # The math kernel alone can be differentiated twice.
        with self._measuring(), sdpa_kernel(SDPBackend.MATH):
            for share, batch in self._shares():
                loss = share * self._loss(self.model, batch)
                grads = torch.autograd.grad(
                    loss, self.weights, create_graph=True, materialize_grads=True
                )
                inner = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)])
                torch._foreach_add_(total, self._derivative(inner.sum(), self.weights))
        sum_over_processes_(total)
        return total

    def _difference_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        product, change = central_differences(self, vector)
        if change > TRUSTED and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Hessian products by central differences change by {change:.0%} when the step is "
                "halved: the loss is not smooth, or its gradient is rounded, at this scale",
                stacklevel=3,
            )
        return product

    # ------------------------------------------------------------------------------- moved weights

    @contextmanager
    def moved(self, direction: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
        """w + scale · direction in the place of w, until the context is left."""
        perturbation = Perturbation(self.weights)  # type: ignore[arg-type]
        try:
            size = torch.tensor(scale, dtype=torch.float64, device=self._device)
            perturbation.apply(list(direction), size, keep_direction=True)
            yield
        finally:
            perturbation.restore()

    def random_vector(self, generator: torch.Generator) -> list[Tensor]:
        """Standard normal numbers in the shapes of the weights; the same on every device."""
        return [
            torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
            for w in self.weights
        ]

    def subset(self, positions: Sequence[int]) -> Objective:
        """The loss over some of the batches.

        Raises:
            ValueError: other processes have batches too.
        """
        if self.is_shared:
            raise ValueError("a part of the batches cannot be taken with several processes")
        part = object.__new__(Objective)
        part.__dict__.update(self.__dict__)
        part.batches = [self.batches[i] for i in positions]
        part.batch_sizes = [self.batch_sizes[i] for i in positions]
        part.example_count = sum(part.batch_sizes)
        part.usual_size = mode(part.batch_sizes)
        part.usual_batches = part.batch_sizes.count(part.usual_size)
        return part

    def fingerprint(self) -> str:
        """A hash of the weights, the buffers and the batches of all processes."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            add_to_hash(digest, tensor)
        for batch in self.batches:
            add_to_hash(digest, batch)
        number = torch.tensor(int.from_bytes(digest.digest()[:6]), device=self._device)
        sum_over_processes_([number])
        return f"{int(number.item()):x}"

    # ------------------------------------------------------------------------------------- inside

    def _shares(self) -> Iterator[tuple[float, Any]]:
        for size, batch in zip(self.batch_sizes, self.batches, strict=True):
            yield size / self.example_count, self._there(batch)

    def _there(self, batch: Any) -> Any:
        return to_device(batch, self._device)

    def _local_gradient(self) -> list[Tensor]:
        total = [torch.zeros_like(w) for w in self.weights]
        for share, batch in self._shares():
            loss = self._loss(self.model, batch)
            torch._foreach_add_(total, self._derivative(loss, self.weights), alpha=share)
        return total

    @staticmethod
    def _derivative(output: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        if not output.requires_grad:  # it depends on none of them
            return [torch.zeros_like(w) for w in weights]
        grads = torch.autograd.grad(output, weights, materialize_grads=True)
        return [g.to_dense() if g.is_sparse else g for g in grads]

    def _random_state(self) -> RandomState:
        return RandomState([self._device] if self._device.type != "cpu" else [])

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        # Also of modules that count, or keep something, while they are evaluated.
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        random_state = self._random_state()
        # Accelerate shadows `forward` with one that opens autocast.
        own = self.model.__dict__
        shadow = own.get("forward") if "_original_forward" in own else None
        try:
            if shadow is not None:
                own["forward"] = own["_original_forward"]
            self.model.eval()
            with (
                full_precision(self.model, self._device),
                torch.autocast(self._device.type, enabled=False),
                torch.enable_grad(),
            ):
                yield
        finally:
            if shadow is not None:
                own["forward"] = shadow
            for module, was_training in modes:
                module.training = was_training
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
            random_state.restore()

"""The models, trainers, clocks and memory meter of `benchmark_step.py`."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedConfig, Trainer, TrainerCallback, TrainerState

from sam_hf import SAM, SAMConfig

BUILT_IN_POSITIONS = 512
# Updates of a train() that are not measured: the first ones allocate, and after the first reduction
# DDP rebuilds its buckets and broadcasts their order.
WARM_UP = 2


def _gpt2(**sizes: int) -> PreTrainedConfig:
    # A small vocabulary, so that the blocks and not the output layer dominate the time.
    return transformers.GPT2Config(
        n_positions=BUILT_IN_POSITIONS, bos_token_id=None, eos_token_id=None, **sizes
    )


BUILT_IN: dict[str, Callable[[], PreTrainedConfig]] = {
    "transformer-40m": lambda: _gpt2(n_embd=512, n_layer=12, n_head=8, vocab_size=4096),
    "transformer-tiny": lambda: _gpt2(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
    "decoder-1b": lambda: transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "vit-base": lambda: transformers.ViTConfig(num_labels=1000),
    "bert-base": transformers.BertConfig,
}

# ------------------------------------------------------------------------------- model and examples


def build_model(name: str, sequence_length: int) -> nn.Module:
    """A model of the architecture's kind (masked, causal, images, ...) with random weights.

    Only the configuration of a named model is read: the time of a step is independent of the
    weights.

    Raises:
        ValueError: there is no such model, it reads neither text nor images, or the examples are
            too long.
    """
    try:
        config = BUILT_IN[name]() if name in BUILT_IN else AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={name!r} is neither built in ({', '.join(BUILT_IN)}) nor a model that "
            f"transformers can load: {' '.join(str(error).split())[:200]}"
        ) from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ValueError(
            f"sequence_length={sequence_length} is too long: {name} has {positions} positions."
        )
    for task in ("Seq2SeqLM", "MaskedLM", "CausalLM", "ImageClassification"):
        auto_class = getattr(transformers, f"AutoModelFor{task}")
        if type(config) in auto_class._model_mapping:
            return auto_class.from_config(config)
    raise ValueError(
        f"model={name!r} ({config.model_type}) is neither a language model nor one that "
        "classifies images. Choose one."
    )


def random_examples(model: nn.Module, count: int, sequence_length: int) -> list[dict[str, Tensor]]:
    """Random tokens that are to be predicted, or images of the model's size with random labels."""
    if model.main_input_name == "pixel_values":
        config = model.config
        shape = (config.num_channels, config.image_size, config.image_size)
        images = (torch.randn(shape) for _ in range(count))
        return [{"pixel_values": x, "labels": torch.randint(config.num_labels, ())} for x in images]
    vocabulary = model.config.get_text_config().vocab_size
    examples = []
    for _ in range(count):
        # Low ids mean something to some models: padding would make an example shorter.
        tokens = torch.randint(min(10, vocabulary - 1), vocabulary, (sequence_length,))
        mask = torch.ones_like(tokens)
        examples.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens})
    return examples


class LinearStack(nn.Module):
    """Linear layers, optionally each with BatchNorm, whose arithmetic takes almost no time."""

    WIDTH = 8
    main_input_name = "inputs"

    def __init__(self, layers: int, has_batch_norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(layers):
            self.layers.append(nn.Linear(self.WIDTH, self.WIDTH))
            if has_batch_norm:
                self.layers.append(nn.BatchNorm1d(self.WIDTH))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(inputs), labels)}

    def examples(self, count: int) -> list[dict[str, Tensor]]:
        shape = (count, self.WIDTH)
        inputs, labels = torch.randn(shape), torch.randn(shape)
        return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


# ---------------------------------------------------------------------------------------- baselines


class TwoPassTrainer(Trainer):
    """Two plain passes per update and nothing between them: the floor for SAM."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_deepspeed_enabled:  # or it would step after the first pass too
            self.accelerator.gradient_state._set_sync_gradients(False)
        loss = super().training_step(model, *args, **kwargs)
        model.zero_grad()
        if self.is_deepspeed_enabled:
            self.accelerator.gradient_state._set_sync_gradients(True)
        super().training_step(model, *args, **kwargs)
        return loss


class HandWrittenTrainer(Trainer):
    """The loop that most people write: parameter by parameter clone, add, and copy back."""

    rho = 0.05

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        params = [p for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            old = self.perturb(params)
        model.zero_grad()
        super().training_step(model, *args, **kwargs)
        self.restore(params, old)
        return loss

    def perturb(self, params: list[nn.Parameter]) -> list[Tensor]:
        norm = torch.stack([p.grad.norm(p=2) for p in params]).norm(p=2)
        scale = self.rho / (norm + 1e-12)
        old = []
        for p in params:
            old.append(p.data.clone())
            e_w = p.grad * scale
            p.add_(e_w)
        return old

    def restore(self, params: list[nn.Parameter], old: list[Tensor]) -> None:
        for p, w in zip(params, old, strict=True):
            p.data.copy_(w)


class HandWrittenSwapTrainer(HandWrittenTrainer):
    """The same, but `p.data` is replaced by the copy. Whatever holds the old memory (flat buffers,
    shards, captured graphs) keeps w + e."""

    def restore(self, params: list[nn.Parameter], old: list[Tensor]) -> None:
        for p, w in zip(params, old, strict=True):
            p.data = w


class MultiTensorTrainer(HandWrittenTrainer):
    """The same with multi-tensor operations, the cheapest for the host, and the dropout masks of
    the first pass replayed in the second."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self._random_state = torch.get_rng_state()
        return super().training_step(model, *args, **kwargs)

    def perturb(self, params: list[nn.Parameter]) -> list[Tensor]:
        grads = [p.grad for p in params]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        old = torch._foreach_clone(params)
        torch._foreach_add_(params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))
        torch.set_rng_state(self._random_state)
        return old

    @torch.no_grad()
    def restore(self, params: list[nn.Parameter], old: list[Tensor]) -> None:
        torch._foreach_copy_(params, old)


# ---------------------------------------------------------------------------------- time and memory


class Clock(TrainerCallback):
    """The seconds of each update, from its first micro-batch to the cleared gradients."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self._start)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class WindowClock(Clock):
    """The mean seconds per update of each train(), without the warm-up.

    The clock is read, and a GPU synchronised, only at the ends of this window. The window includes
    what the training loop does between updates, such as loading the data.
    """

    def on_step_begin(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self._start = self._now()

    def on_step_end(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.seconds.append((self._now() - self._start) / (state.max_steps - WARM_UP))


class HostClock(WindowClock):
    """The same in process time, which does not count the time that other processes take."""

    _now = staticmethod(time.process_time)


class OneUpdate(TrainerCallback):
    """Enters a context for the first update after the warm-up."""

    def __init__(self, context: AbstractContextManager[Any]) -> None:
        self._context = context

    def on_step_begin(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self._context.__enter__()

    def on_step_end(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP + 1:
            self._context.__exit__(None, None, None)


class Loop:
    """A training loop without a Trainer, with the callbacks of one.

    Args:
        kind: "plain", "two passes", "hand-written" (as `MultiTensorTrainer`) or "sam".
    """

    rho, perturb, restore = 0.05, MultiTensorTrainer.perturb, MultiTensorTrainer.restore

    def __init__(self, kind: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        self.model, self.batches, self.args = model, batches, SimpleNamespace(max_steps=1)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        self.sam = SAM(model, self.optimizer, SAMConfig(sam_rho=0.05))
        self.callbacks: list[TrainerCallback] = []
        self.add_callback, self.remove_callback = self.callbacks.append, self.callbacks.remove
        steps = {"plain": self._plain, "two passes": self._two, "hand-written": self._by_hand}
        self._step = steps.get(kind, self._sam)

    def train(self) -> None:
        state = TrainerState(max_steps=self.args.max_steps)
        for batch in self.batches[: state.max_steps]:
            for callback in self.callbacks:
                callback.on_step_begin(self.args, state, None)
            self._step(batch)
            self.optimizer.step()
            self.optimizer.zero_grad()
            state.global_step += 1
            for callback in self.callbacks:
                callback.on_step_end(self.args, state, None)

    def _plain(self, batch: dict[str, Tensor]) -> None:
        self.model(**batch)["loss"].backward()

    def _two(self, batch: dict[str, Tensor]) -> None:
        self._plain(batch)
        self.model.zero_grad()
        self._plain(batch)

    def _by_hand(self, batch: dict[str, Tensor]) -> None:
        self._random_state = torch.get_rng_state()
        self._plain(batch)
        params = [p for p in self.model.parameters() if p.grad is not None]
        with torch.no_grad():
            old = self.perturb(params)
        self.model.zero_grad()
        self._plain(batch)
        self.restore(params, old)

    def _sam(self, batch: dict[str, Tensor]) -> None:
        model = self.model
        self.sam.backward(lambda: model(**batch)["loss"])


class LaunchCounter(TorchDispatchMode):
    """Counts the dispatched operators: on an accelerator, each is at least one kernel launch.

    A multi-tensor (`_foreach_`) operator counts once. Views and allocations launch no kernel and
    are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.launches += not (func.is_view or "empty" in func.name())
        return func(*args, **(kwargs or {}))


def peak_memory(work: Callable[[], object], model: nn.Module) -> int:
    """Peak bytes of tensors during `work`, minus those held before it.

    On a CPU the allocator's own events are added up: the size of the process would include pages
    that the C library keeps.
    """
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _memory_events():
        # A release counts only if its allocation was seen, and `work` may replace the weights.
        for p in model.parameters():
            p.data = p.data.clone()
    with _memory_events() as events:
        work()
    return max(itertools.accumulate(events, initial=0))


@contextmanager
def _memory_events() -> Iterator[list[int]]:
    """The bytes of each allocation on the CPU, and minus those of each release, in their order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it runs
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield sizes
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes.extend(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


_IMPORTS = {  # what is imported, and its prerequisite
    "import sam_hf": "import transformers",
    "from sam_hf import SAMTrainer": "from transformers import Trainer",
}


def import_seconds(repeats: int) -> dict[str, tuple[float, float]]:
    """For each import: its seconds after its prerequisite, and those of the prerequisite."""
    medians = {}
    for statement, prerequisite in _IMPORTS.items() if repeats else ():
        program = (
            "import time\n"
            f"a = time.perf_counter(); {prerequisite}\n"
            f"b = time.perf_counter(); {statement}\n"
            "print(time.perf_counter() - b, b - a)"
        )
        command = [sys.executable, "-c", program]
        outputs = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for _ in range(repeats)
        )
        runs = [map(float, output.split()[-2:]) for output in outputs]
        added, before = (statistics.median(column) for column in zip(*runs, strict=True))
        medians[statement] = (added, before)
    return medians


# ------------------------------------------------------------------------------------------- output


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as needed: the first left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

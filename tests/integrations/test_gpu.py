"""What a GPU alone shows; skipped where there is none.

The kernels are others there, random masks come from another generator, fp16 is scaled, work is
queued, and torch.compile captures graphs. SAM and its relatives are held to the same float64 twins.
"""

from __future__ import annotations

import warnings
from typing import Any

import benchmark_step
import pytest
import torch
import transformers as hf
from curved import Quadratic, batches
from method_twins import METHODS, TwinRun, trained, windows
from reference_asam import asam_step
from reference_sharpness import dense_hessian
from scaling import Log
from tiny import Classifier, Rows, assert_same_bits, examples, sam_trainer, weights
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer
from twin_runs import by_the_twin, distance, means

from sam_hf import SAMTrainer
from sam_hf.diagnostics import Objective, hessian_trace, top_eigenpairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

UPDATES, RHO = 7, 0.3
GPU: dict[str, Any] = {"use_cpu": False, "per_device_train_batch_size": 3, "max_steps": UPDATES}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
both_scopes = pytest.mark.parametrize("scope", ["batch", "micro_batch"])


def on_the_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    assert all(t.is_cuda for t in tensors.values())
    return {name: t.cpu() for name, t in tensors.items()}


# ---- Exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "sam"])
@pytest.mark.parametrize("steps", [1, 2])
def test_each_method_is_the_papers_after_every_update(name, steps):
    model, data, sam = Classifier(), examples(36), METHODS.get(name, {"sam_method": "sam"})
    twin = TwinRun(model, sam, optimizer="sgd", mu=0.9)
    updates = means(Classifier(), windows(data.rows, 3, steps))
    args = {**GPU, **SGD, "gradient_accumulation_steps": steps}
    _, spy, passes = trained(model, data, sam, **args)
    for update, shares in enumerate(updates):
        twin.update(shares, selected=passes.selected[update][-1])
        twin.assert_equals(on_the_cpu(spy.weights[update]))


@both_scopes
def test_asam_is_the_papers(scope):
    model, data = Classifier(), examples(36)
    updates = means(Classifier(), windows(data.rows, 3, 2))

    def step(w: list[Tensor], losses: list[Any], rho: float) -> Any:
        return asam_step(w, losses, rho, 0.01, scope=scope)

    expected = by_the_twin(model, updates, RHO, step=step)
    sam = {"sam_method": "asam", "sam_scope": scope, "sam_eta": 0.01, "sam_adaptive_scope": "all"}
    trained(model, data, sam, **GPU, gradient_accumulation_steps=2)
    assert_close(on_the_cpu(weights(model)), expected, rtol=1e-10, atol=1e-12)


SCALE = 2.0**24  # so large that fp16 overflows at first


def overflowing(model: nn.Module, base: type, sam: dict[str, Any], **args: Any) -> Log:
    """Train with fp16's scaler on the GPU, which begins with a scale that is too large."""
    log, rows = Log(), examples(72, dtype=torch.float32)
    args = GPU | {"fp16": True, "max_steps": 20, "gradient_accumulation_steps": 2} | args
    trainer = sam_trainer(model, rows, base, {"callbacks": [log]}, sam, **args)
    assert trainer.accelerator.scaler.get_scale() == 2.0**16
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=SCALE)
    trainer.train()
    return log


@both_scopes
def test_what_fp16_leaves_out_is_what_plain_training_leaves_out_and_the_rest_is_the_twins(scope):
    sam = {"sam_scope": scope, "sam_rho": RHO}
    logs, models = [], []
    for base in (Trainer, SAMTrainer):
        torch.manual_seed(0)
        models.append(Classifier(dtype=torch.float32))
        logs.append(overflowing(models[-1], base, sam).updates)
    seen = [[(e["skipped"], e["scale"], e["scheduler"]) for e in each] for each in logs]
    assert seen[0] == seen[1]
    skipped = [update["skipped"] for update in logs[1]]
    assert skipped[0] and not skipped[-1]
    torch.manual_seed(0)
    model = Classifier(dtype=torch.float32).double()
    updates = means(Classifier(), windows(examples(72).rows, 3, 2, updates=len(skipped)))
    taken = [shares for shares, skip in zip(updates, skipped, strict=True) if not skip]
    expected, plain = (by_the_twin(model, taken, rho, scope=scope) for rho in (RHO, 1e-12))
    actual = on_the_cpu(weights(models[1]))
    assert distance(actual, expected) / distance(plain, expected) < 0.01


@both_scopes
def test_bf16_stays_close_to_the_twin(scope):
    model, data = Classifier(dtype=torch.float32), examples(36, dtype=torch.float32)
    start = Classifier()
    start.load_state_dict(model.state_dict())
    sam = {"sam_scope": scope}
    trained(model, data, sam, **GPU, bf16=True, gradient_accumulation_steps=2)
    updates = means(Classifier(), windows(examples(36).rows, 3, 2))
    expected, plain = (by_the_twin(start, updates, rho, scope=scope) for rho in (RHO, 1e-12))
    actual = on_the_cpu(weights(model))
    assert distance(actual, expected) / distance(plain, expected) < 0.05


# ---- The same masks in both passes --------------------------------------------------------------


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    drop = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    config = hf.ViTConfig(image_size=32, patch_size=4, intermediate_size=96, **sizes, **drop)
    return hf.ViTForImageClassification(config)


def pictures(n: int) -> Rows:
    g = torch.Generator().manual_seed(0)
    return Rows(
        [
            {
                "pixel_values": torch.randn(3, 32, 32, generator=g),
                "labels": torch.randint(2, (), generator=g),
            }
            for _ in range(n)
        ]
    )


@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "new", "reentrant"])
@both_scopes
def test_without_a_step_the_second_pass_has_the_loss_of_the_first(scope, how, checkpointing):
    """A radius that rounding swallows: what is left of the sharpness is other masks."""
    seen = []
    for replays in (True, False):
        args = {**GPU, **how, "gradient_accumulation_steps": 2, "learning_rate": 1e-4}
        if checkpointing is not None:
            kwargs = {"use_reentrant": checkpointing}
            args |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        sam = {"sam_rho": 1e-12, "sam_scope": scope, "sam_replay_rng": replays}
        trainer = sam_trainer(vit(), pictures(24), sam=sam, **args)
        trainer.train()
        entries = [e["sam_sharpness"] for e in trainer.state.log_history if "sam_sharpness" in e]
        seen.append(max(abs(value) for value in entries))
    assert seen[0] < 1e-6 and seen[1] > 1e-4


# ---- The queue, and memory ----------------------------------------------------------------------


class Watched:
    """Counts what makes the host wait for the GPU in each training step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss = super().training_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        self.waits.append(waits)
        return loss


@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", [*METHODS, "sam", "asam", "auto"])
def test_the_host_does_not_wait_for_the_gpu(name, how):
    """Not even in updates that are logged; the reading itself is the Trainer's."""
    waits = {}
    for base in (Trainer, SAMTrainer):
        kind = type("WatchedTrainer", (Watched, base), {"waits": []})
        named = METHODS.get(name, {"sam_method": name})
        sam = {"sam_rho": None} if name == "auto" else {"sam_rho": 0.05, **named}
        args = {**GPU, **SGD, **how, "gradient_accumulation_steps": 2, "logging_steps": 2}
        args["max_steps"] = 5  # in the fourth the automatic radius moves
        sam_trainer(vit(), pictures(24), kind, sam=sam, **args).train()
        waits[base] = [len(each) for each in kind.waits]
        if base is SAMTrainer:
            messages = sorted({message for each in kind.waits for message in each})
    passes = 2
    most = passes * max(waits[Trainer])
    # An ESAM ascent looks at the graph of the run's first pass, on the host.
    assert max(waits[SAMTrainer][2:]) <= most, (waits, messages)


def test_the_watch_sees_a_host_that_waits():
    class Waits(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            assert loss.item() > 0
            return loss

    kind = type("WatchedTrainer", (Watched, Waits), {"waits": []})
    sam_trainer(vit(), pictures(6), kind, **GPU | {"max_steps": 2}).train()
    assert all(kind.waits)


class Wide(nn.Module):
    """64 MiB of weights, and few activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x.repeat(1, 205)[:, :1024].float()).square().mean()}


@pytest.mark.parametrize("name, copies", [("sam", 1), ("asam", 1), ("gsam", 2)])
def test_memory_grows_by_as_many_copies_of_the_weights_as_the_readme_says(name, copies):
    peaks = []
    for base in (Trainer, SAMTrainer):
        model = Wide()
        trainer = sam_trainer(
            model,
            examples(24, dtype=torch.float32),
            base,
            sam={"sam_method": name, "sam_rho": 1e-3},
            **GPU | {"logging_steps": 1000, "learning_rate": 1e-4, "max_steps": 4},
        )
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del trainer, model
    size = 16 * 1024 * 1024 * 4
    assert (peaks[1] - peaks[0]) / size == pytest.approx(copies, abs=0.1)


# ---- torch.compile ------------------------------------------------------------------------------


def in_graphs(base: type, steps: int, mode: str | None, sam: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    args = {**GPU, "gradient_accumulation_steps": steps}
    if mode is not None:
        args |= {"torch_compile": True, "torch_compile_mode": mode}
    trainer = sam_trainer(Classifier(), examples(36), base, sam=sam, **args)
    trainer.train()
    return trainer


@both_scopes
@pytest.mark.parametrize("mode, steps", [("default", 1), ("default", 2), ("reduce-overhead", 1)])
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_compiled_weights_are_the_eager_ones(method, mode, steps, scope):
    """The mode "reduce-overhead" captures CUDA graphs, whose gradients lie in their memory."""
    sam = {"sam_method": method, "sam_rho": RHO, "sam_scope": scope}
    eager, compiled = (in_graphs(SAMTrainer, steps, how, sam) for how in (None, mode))
    for name, w in weights(eager.model).items():
        assert_close(compiled.model.state_dict()[name], w, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(compiled.state.log_history, eager.state.log_history, strict=True):
        assert ours.get("sam_sharpness", 0) == pytest.approx(theirs.get("sam_sharpness", 0))


@pytest.mark.parametrize("base", [Trainer, SAMTrainer])
def test_captured_graphs_do_not_accumulate_in_plain_training_either(base):
    """If this fails, they do now: let the test above run it."""
    with pytest.raises(RuntimeError, match="overwritten by a subsequent run"):
        in_graphs(base, 2, "reduce-overhead", {"sam_rho": RHO})


# ---- The benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_benchmark_runs_with_a_scaler_of_each_trainers_own(dtype):
    options = ["--model", "transformer-tiny", "--batch_size", "2", "--sequence_length", "16"]
    result = benchmark_step.main(
        [*options, "--device", "cuda", "--dtype", dtype, "--rounds", "2", "--imports", "0"]
    )
    assert all(row["median_ms"] > 0 for row in result["rows"].values())


# ---- Measures -----------------------------------------------------------------------------------


def test_the_curvature_on_a_gpu_is_that_on_the_cpu():
    model = Classifier()
    some = batches(examples(10), 10)
    h = dense_hessian(model, lambda m: m(**some[0])["loss"])
    expected = torch.linalg.eigvalsh(h).flip(0)[:3]
    model.cuda()
    before = weights(model)
    objective = Objective(model, some)
    pairs = top_eigenpairs(objective, 3, tolerance=1e-10)
    assert pairs.values == pytest.approx(expected.tolist(), rel=1e-6)
    trace = hessian_trace(objective, samples=400)
    assert abs(trace.value - h.trace().item()) < 5 * trace.error
    assert_same_bits(model, before)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.head = nn.Linear(32, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.conv(pixel_values.to(self.conv.weight.dtype))).mean((2, 3))
        logits = self.head(features)
        return {"loss": nn.functional.cross_entropy(logits, labels)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = pixel_values.to(self.head.weight.dtype).flatten(1, 2)
        return {"loss": nn.functional.cross_entropy(self.head(self.lstm(x)[0][:, -1]), labels)}


@pytest.mark.parametrize("kind", [Convolution, Recurrent])
def test_float32_is_measured_in_float32(kind):
    """cuDNN rounds convolutions to TF32, and has no gradients of an LSTM in evaluation mode."""
    torch.manual_seed(0)
    model = kind()
    batch = torch.utils.data.default_collate(pictures(32).rows)
    exact = Objective(kind().double(), [batch])
    exact.model.load_state_dict(model.state_dict())
    objective = Objective(model.cuda(), [batch])
    settings = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.enabled
    expected = torch.cat([g.flatten() for g in exact.gradient()])
    actual = torch.cat([g.flatten() for g in objective.gradient()]).cpu().double()
    assert (actual - expected).norm() / expected.norm() < 2e-6
    value = top_eigenpairs(objective, 1, tolerance=1e-5).values[0]
    assert value == pytest.approx(top_eigenpairs(exact, 1).values[0], rel=1e-3)
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.enabled) == settings


def test_a_quadratic_on_the_gpu_has_its_spectrum():
    model = Quadratic()
    model.h, model.c = model.h.cuda(), model.c.cuda()
    model.cuda()
    pairs = top_eigenpairs(Objective(model, [{"x": torch.zeros(1, 1)}]), 3, tolerance=1e-8)
    assert pairs.values == pytest.approx([7.0, 6.0, 5.0], rel=1e-9)

"""Models with LoRA, what the twins of BAR and Bi-LoRA say of them, and a process of a run with DDP.

`torchrun --nproc_per_node 2 adapter_worker.py cases.json folder`
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import torch
import torch.distributed as dist
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from real_models import bert
from reference_bar import bar_alpha, nbar, obar
from reference_bilora import Layer, bilora_gradients, bilora_step
from reference_optimizers import adamw_step, clip_by_global_norm, sgd_step
from reference_sam import norm, value_and_grad
from tiny import Classifier, Spy, examples, sam_trainer, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, set_seed
from twin_runs import means

from sam_hf import SAMTrainer

LAYERS, RATE, UPDATES = ("first", "middle"), 0.1, 4
STEPS = {"sgd": (sgd_step, {"mu": 0.9}), "adamw_torch": (adamw_step, {})}
OPTIM = {"sgd": {"optim": "sgd", "optim_args": "momentum=0.9"}, "adamw_torch": {}}


class Deep(Classifier):
    """Three layers, the last one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(7, 7, dtype=torch.float64)
        self.forwards = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.forwards += 1
        logits = self.second(torch.tanh(self.middle(self.layer_norm(self.first(x)))))
        return {
            "loss": cross_entropy(logits, labels) if labels is not None else 0,
            "logits": logits,
        }


def deep() -> Deep:
    set_seed(0)
    return Deep()


def adapted(**options: Any) -> Any:
    """Two layers with LoRA of the scale 4 and B != 0, and a head that is trained too."""
    options = {"target_modules": list(LAYERS), "modules_to_save": ["second"]} | options
    model = get_peft_model(deep(), LoraConfig(r=2, lora_alpha=8, **options))
    with torch.no_grad():  # the norms of the factors and of their gradients compare either way
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05 if "middle" in name else 1.0)
    return model


def trainer_of(
    model: nn.Module | None, sam: dict[str, Any] | None, *callbacks: Any, **args: Any
) -> Any:
    """The plain Trainer if `sam` is None."""
    options = {"max_steps": UPDATES, "learning_rate": RATE, "optim": "adamw_torch", **args}
    kind, kwargs = Trainer if sam is None else SAMTrainer, {"callbacks": list(callbacks)}
    return sam_trainer(model, examples(48), kind, kwargs, sam, **options)


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def factor(layer: str, which: str, adapter: str = "default") -> str:
    return f"base_model.model.{layer}.lora_{which}.{adapter}.weight"


def layers_of(model: Any) -> list[Layer]:
    """The layers with both pairs, as the twin wants them."""

    def matrix(name: str) -> Tensor:
        return model.get_parameter(name).detach().clone()

    return [
        Layer(
            matrix(f"base_model.model.{layer}.base_layer.weight"),
            *(matrix(factor(layer, x, a)) for a in ("default", "sam_ascent") for x in "BA"),
            s1=4.0,
        )
        for layer in LAYERS
    ]


def headless() -> Any:
    return adapted(modules_to_save=None)


# ---- Models that Bi-LoRA cannot train ------------------------------------------------------------


def two_adapters() -> Any:
    model = headless()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["first"]))
    return model


def twice() -> Any:
    model = headless()
    trainer_of(model, {"sam_method": "bilora", "sam_rho": 0.05})
    return model


def with_lora(layer: nn.Module) -> Any:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))


def with_prompts() -> Any:
    config = PromptTuningConfig(
        num_virtual_tokens=2, task_type="SEQ_CLS", tokenizer_name_or_path=None
    )
    return get_peft_model(bert(), config)


# ---- The twins' runs -----------------------------------------------------------------------------


def shares_of(model: nn.Module, steps: int) -> list[list[Callable[..., Tensor]]]:
    """For each update, the shares of its micro-batches in the loss."""
    rows = examples(48).rows
    batches = [rows[4 * i : 4 * i + 4] for i in range(steps * UPDATES)]
    return means(model, [batches[i : i + steps] for i in range(0, len(batches), steps)])


def by_bar(
    model: nn.Module, balance: str, optim: str, rho: float, schedule: str, rates: str, steps: int
) -> Iterator[dict[str, Tensor]]:
    """The trained weights after each update."""
    names, (step, options) = trained(model), STEPS[optim]
    w, state, decisions = [model.get_parameter(n).detach().clone() for n in names], {}, set()
    for t, shares in enumerate(shares_of(model, steps)):
        _, g = value_and_grad(
            lambda w, s=shares: sum(L(dict(zip(names, w, strict=True))) for L in s), w
        )
        eta = RATE * (1 - t / UPDATES) if rates == "linear" else RATE
        alpha = bar_alpha(rho, t, UPDATES, schedule)
        for layer in LAYERS:
            a, b = names.index(factor(layer, "A")), names.index(factor(layer, "B"))
            before = w[a].norm()
            if balance == "gradients":
                w[a], w[b] = nbar(w[a], w[b], g[a], g[b], alpha, eta)
            else:
                w[a], w[b] = obar(w[a], w[b], alpha, eta)
            decisions.add((w[a].norm() > before).item())
        w, state = step(w, g, state, eta, **options)
        yield dict(zip(names, w, strict=True))
    assert decisions == {True, False}


def by_bilora(
    layers: list[Layer],
    base: nn.Module,
    optim: str,
    rho: float,
    schedule: str,
    rates: str,
    steps: int,
    max_norm: float,
    decay: float,
) -> Iterator[tuple[list[Layer], float]]:
    """The layers after each update, and its rho."""
    step, options = STEPS[optim]
    state: dict[str, Any] = {}
    for t, shares in enumerate(shares_of(base, steps)):
        losses = [
            lambda w, f=f: f({f"{n}.weight": x for n, x in zip(LAYERS, w, strict=True)})
            for f in shares
        ]
        g = [g for side in bilora_gradients(layers, losses) for g in side]
        share = norm(clip_by_global_norm(g, max_norm)[0]) / norm(g) if max_norm else 1.0
        clipped = [lambda w, f=f, share=share: share * f(w) for f in losses]

        def decayed(w, g, state, eta, first=layers[0].B1, **options):
            """With weight decay on the first pairs alone."""
            own = decay if w[0] is first else 0.0
            return step(w, g, state, eta, weight_decay=own, **options)

        eta = RATE * (1 - t / UPDATES) if rates == "linear" else RATE
        rho_t = bar_alpha(rho, t, UPDATES, schedule)
        layers, state = bilora_step(layers, clipped, state, rho_t, eta, eta, decayed, **options)
        yield layers, rho_t


# ---- Callbacks -----------------------------------------------------------------------------------

HELD_OUT = torch.stack([row["x"] for row in examples(8, seed=1).rows])


def second_pair(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if "sam_ascent" in name]


class Poison(TrainerCallback):
    """At one update, a number of the gradient of one factor is not finite."""

    def __init__(self, value: float, at: int = 0) -> None:
        self.value, self.at = value, at
        self.before: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        if state.global_step == self.at:
            self.before = weights(model)
            model.get_parameter(factor("first", "A")).grad[0, 0] = self.value
            self.grads = {n: model.get_parameter(n).grad.clone() for n in trained(model)}

    def on_step_end(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        if state.global_step == self.at + 1:
            self.after = weights(model)


class Look(TrainerCallback):
    """What others see after each update, and what the layers would give with both pairs."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, ...]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        predicted = torch.tensor(self.trainer.predict(examples(8, seed=1)).predictions)
        own = model(HELD_OUT)["logits"].detach()
        self.seen.append((predicted, own, self.of(Layer.adapted), self.of(Layer.merged)))

    def of(self, which: Callable[[Layer], Tensor]) -> Tensor:
        layers = zip(LAYERS, layers_of(self.trainer.model), strict=True)
        w = {f"{name}.weight": which(layer) for name, layer in layers}
        return functional_call(deep(), w, (HELD_OUT,))["logits"].detach()

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.at_the_end = second_pair(model)


# ---- The processes -------------------------------------------------------------------------------


def updates_of(case: dict[str, Any], **args: Any) -> dict[str, Any]:
    """The weights after each update of a case, and the logs."""
    spy = Spy()
    trainer = trainer_of(adapted(), case["sam"], spy, max_grad_norm=0.5, **case["args"], **args)
    trainer.train()
    left = list(trainer.model.peft_config)
    return {"weights": spy.weights, "logs": trainer.state.log_history[:-1], "left": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Each `train()` begins with a full garbage collection: spare it what the imports left.
    gc.collect()
    gc.freeze()
    cases = json.loads(Path(sys.argv[1]).read_text())
    ddp = {"ddp_backend": "gloo", "ddp_timeout": 40}
    results = {name: updates_of(case, **ddp) for name, case in cases.items()}
    results["world_size"] = dist.get_world_size()
    torch.save(results, Path(sys.argv[2]) / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

"""Every `optim` of the Trainer takes the gradient at w + e, from w, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference_sam import sam_step
from tiny import Rows, arguments, sam_trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

RHO = 0.2
WIDTH = 64  # 4096 weights in a matrix: smaller ones are not quantised by the 8-bit optimizers


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layer_norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.second(torch.tanh(self.layer_norm(self.first(x))))
        return {"loss": cross_entropy(logits, labels)}


class Record(TrainerCallback):
    """The weights and the gradients that each optimizer step finds, and the weights it leaves."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before.append([p.detach().clone() for p in self.model.parameters()])
        self.gradients.append([p.grad.clone() for p in self.model.parameters()])

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.after.append([p.detach().clone() for p in self.model.parameters()])


def options(name: str) -> dict[str, Any]:
    low_rank = name.startswith(("galore", "apollo"))
    return {
        "optim": name,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "optim_target_modules": ["first"] if low_rank else None,
        "optim_args": "rank=4, update_proj_gap=2" if low_rank else None,
    }


def descent_gradient(model: nn.Module, w: list[Tensor], rows: list[Any]) -> list[Tensor]:
    """g_s of the twin, in float64 at the float32 weights."""
    names = [name for name, _ in model.named_parameters()]
    batch = default_collate(rows)
    batch["x"] = batch["x"].double()

    def loss(values: list[Tensor]) -> Tensor:
        at = dict(zip(names, values, strict=True))
        return functional_call(model, at, kwargs=batch)["loss"]

    g_s, _ = sam_step([w_i.double() for w_i in w], [loss], RHO)
    return [g.float() for g in g_s]


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optim_steps_from_w_with_the_gradient_at_w_plus_e_or_is_refused(name):
    rows = [{"x": torch.randn(WIDTH), "labels": torch.randint(3, ())} for _ in range(24)]
    model = Wide()
    if name.endswith("_layerwise") or name in ("lomo", "adalomo"):
        with pytest.raises(ValueError, match=f"optim='{name}'.*inside backward.*adamw_torch"):
            sam_trainer(model, Rows(rows), **options(name))
        return

    if name == "galore_adamw_8bit" and not torch.cuda.is_available():
        pytest.skip("its optimizer step needs CUDA")
    alone = copy.deepcopy(model)
    try:
        by_hand = Trainer(model=alone, args=arguments(**options(name))).create_optimizer()
    except (ImportError, ValueError) as error:  # what the Trainer says of a missing package
        pytest.skip(f"{name} cannot be made here: {error}")
    record = Record(model)
    kwargs = {"callbacks": [record]}
    state = torch.get_rng_state()
    sam_trainer(
        model, Rows(rows), sam={"sam_rho": RHO}, trainer_kwargs=kwargs, max_steps=6, **options(name)
    ).train()

    torch.set_rng_state(state)
    if callable(getattr(by_hand, "train", None)):
        by_hand.train()
    assert len(record.after) == 6
    for i, (w, g_s, after) in enumerate(
        zip(record.before, record.gradients, record.after, strict=True)
    ):
        expected = descent_gradient(model, w, rows[4 * i : 4 * i + 4])
        torch.testing.assert_close(g_s, expected, rtol=1e-4, atol=1e-6)
        for p, g in zip(alone.parameters(), g_s, strict=True):
            p.grad = g.clone()
        torch.testing.assert_close(w, [p.detach() for p in alone.parameters()], rtol=0, atol=0)
        by_hand.step()
        torch.testing.assert_close(after, [p.detach() for p in alone.parameters()], rtol=0, atol=0)
    assert not torch.equal(after[0], record.before[0][0])  # some warm up for five steps

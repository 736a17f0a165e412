"""Weights that stay frozen, that a callback unfreezes, or that it adds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny import Classifier, examples, sam_trainer, weights
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, set_seed

from sam_hf import SAMTrainer
from sam_hf.methods import METHODS

SCOPES = pytest.mark.parametrize("scope", ["batch", "micro_batch"])


class Changes(TrainerCallback):
    """Calls a function with the model and the optimizer before update number `when`."""

    def __init__(self, change: Any, when: int = 1) -> None:
        self.change, self.when = change, when

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.when:
            self.change(model, optimizer)


def run(
    trainer_class: type, change: Any = None, frozen: tuple[str, ...] = ("first",), **options: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    set_seed(0)
    model = Classifier()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    sam, args = options.pop("sam", {}), {"max_steps": 4, **options}
    resume = args.pop("resume", None)
    trainer = sam_trainer(model, examples(32), trainer_class, sam=sam, **args)
    # All weights, frozen or not: else those that are unfrozen later would not be trained.
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if change is not None:
        trainer.add_callback(Changes(change))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, weights(model)


def unfreeze(model: nn.Module, _: Any) -> None:
    model.requires_grad_(True)


def test_esam_draws_among_trained_weights_alone():
    """The last one that is left is taken where it is not drawn."""
    frozen = tuple(n for n, _ in Classifier().named_parameters() if n != "second.weight")
    for seed in range(12):
        trainer, _ = run(SAMTrainer, None, frozen, sam={"sam_method": "esam"}, seed=seed)
        logged = [e for e in trainer.state.log_history if "sam_passes_per_update" in e]
        assert [e["sam_perturbation_norm"] > 0 for e in logged] == [True] * len(logged)


def test_the_combination_takes_in_what_a_callback_unfreezes():
    """WSAM with gamma 0 is plain training."""
    _, plain = run(Trainer, unfreeze)
    sam = {"sam_method": "wsam", "sam_rho": 0.3}
    sam["sam_method_args"] = {"gamma": 0.0, "decoupled": False}
    _, ours = run(SAMTrainer, unfreeze, sam=sam)
    assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_a_state_of_unfrozen_weights_is_loaded_though_they_are_frozen_still(tmp_path):
    options = {"sam": {"sam_method": "friendly_sam"}, "output_dir": str(tmp_path)}
    options |= {"save_strategy": "steps", "save_steps": 2}
    _, whole = run(SAMTrainer, unfreeze, **options)
    # The callback unfreezes before update 1, which a run that goes on with update 2 has behind it.
    _, resumed = run(
        SAMTrainer, lambda *_: None, (), resume=str(tmp_path / "checkpoint-2"), **options
    )
    assert_close(resumed, whole, rtol=0, atol=0)
    run(SAMTrainer, lambda *_: None, resume=str(tmp_path / "checkpoint-2"), **options)


@SCOPES
def test_weights_that_a_callback_adds_get_one_gradient(scope):
    def add(model: nn.Module, optimizer: Any) -> None:
        layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.eye_(layer.weight)
        model.second = nn.Sequential(model.second, layer)
        optimizer.param_groups[-1]["params"].append(layer.weight)

    _, plain = run(Trainer, add, ())
    _, ours = run(SAMTrainer, add, (), sam={"sam_rho": 1e-9, "sam_scope": scope})
    assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_the_check_of_the_loss_scale_compares_passes_of_one_update():
    """With 3 micro-batches an epoch, every second update has one instead of two."""
    sam = {"sam_trigger": "gradient_norm", "sam_trigger_start": 4.0}
    set_seed(0)
    trainer = sam_trainer(
        Classifier(),
        examples(12),
        sam={"sam_rho": 0.1, **sam},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=5,
        max_steps=-1,
    )
    trainer.train()
    assert trainer.state.global_step == 10


def test_frozen_weights_in_half_precision_do_not_warn():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(5, 8).bfloat16().requires_grad_(False)
            self.head = nn.Linear(8, 3)

        def forward(self, x, labels):
            hidden = self.base(x.bfloat16()).float()
            return {"loss": nn.functional.cross_entropy(self.head(hidden), labels)}

    trainer = sam_trainer(Mixed(), examples(8, dtype=torch.float32), max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*half precision.*")
        trainer.train()


def test_complex_weights_are_refused_by_name():
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(5, dtype=torch.complex128))

        def forward(self, x, labels):
            return {"loss": (x * self.turn).abs().square().mean()}

    with pytest.raises(ValueError, match=r"turn: complex parameters are not supported.*sam_rho=0"):
        sam_trainer(Complex(), examples(8), max_steps=1).train()


def test_every_method_trains_a_head_on_a_frozen_base():
    for method in set(METHODS) - {"bilora", "bar", "msam"}:
        _, after = run(SAMTrainer, sam={"sam_method": method, "sam_rho": 0.05})
        set_seed(0)
        before = weights(Classifier())
        moved = {n for n, w in after.items() if not torch.equal(w, before[n])}
        assert moved == {n for n in before if not n.startswith("first")}, method

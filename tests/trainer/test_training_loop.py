"""The whole loop: SAM off, evaluation, checkpoints, resuming, compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    Classifier,
    Spy,
    assert_same_bits,
    examples,
    sam_trainer,
    weights,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback
from twin_runs import RHO, assert_same_run

from sam_hf import SAMTrainer

COMPILE = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


class Configured(Classifier):
    """Label smoothing reads the model's config."""

    config = transformers.PretrainedConfig()


# --- SAM off: the plain Trainer -------------------------------------------------------------------

OFF = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "a short last window": {"gradient_accumulation_steps": 3, "max_steps": -1},
    "adamw, schedule and clipping": {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.1,
    },
    "bf16 autocast": {"bf16": True, "dtype": torch.float32},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "compile": COMPILE,
    "shuffling": {"train_sampling_strategy": "random", "num_train_epochs": 2, "max_steps": -1},
}


@pytest.mark.parametrize(
    "sam", [{"sam_rho": 0.0}, {"sam_rho": RHO, "sam_start_ratio": 1.0}], ids=["rho 0", "not begun"]
)
@pytest.mark.parametrize("case", OFF)
def test_without_perturbation_training_is_the_plain_trainers_to_the_last_bit(case, sam):
    args = {"logging_steps": 2, **OFF[case]}
    dtype = args.pop("dtype", torch.float64)

    def run(trainer_class: type) -> tuple[Any, list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = Configured(dropout=0.3, dtype=dtype)
        trainer = sam_trainer(model, examples(14, dtype=dtype), trainer_class, sam=sam, **args)
        trainer.train()
        return trainer, torch.get_rng_state()

    (plain, plain_rng), (ours, our_rng) = run(Trainer), run(SAMTrainer)
    assert_same_run(ours, plain)
    assert torch.equal(our_rng, plain_rng)
    if sam["sam_rho"] > 0:  # it says that it has not begun
        entries = [e for e in ours.state.log_history if "loss" in e]
        assert {e.pop("sam_passes_per_update") for e in entries} == {1}
    assert [set(e) for e in ours.state.log_history] == [set(e) for e in plain.state.log_history]


# --- The loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_evaluation_checkpoints_and_the_best_model_are_those_of_the_unperturbed_weights(scope):
    model, data, spy = Classifier(dropout=0.3), examples(48), Spy()
    held_out = examples(8, seed=1)
    trainer = sam_trainer(
        model,
        data,
        sam={"sam_rho": RHO, "sam_scope": scope},
        trainer_kwargs={"eval_dataset": held_out, "callbacks": [spy]},
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    by_hand = []
    for update in (1, 3, 5):
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{update + 1}"
        other = Classifier().eval()
        other.load_state_dict(spy.weights[update])
        by_hand.append(other(**default_collate(held_out.rows))["loss"].item())
        assert_same_bits(other, load_file(checkpoint / "model.safetensors"))
    assert logged == pytest.approx(by_hand, rel=1e-6)
    best = min(range(3), key=logged.__getitem__)
    assert trainer.state.best_global_step == 2 * best + 2
    assert_same_bits(trainer.model, spy.weights[2 * best + 1])


@pytest.mark.parametrize(
    ("trainer_class", "sam"),
    [
        (Trainer, {}),
        (SAMTrainer, {"sam_scope": "batch", "sam_interval": 2}),
        (SAMTrainer, {"sam_scope": "micro_batch", "sam_interval": 2}),
        (SAMTrainer, {"sam_method": "asam", "sam_start_ratio": 0.5}),
    ],
    ids=["plain", "batch", "micro_batch", "asam"],
)
def test_a_resumed_run_ends_as_one_that_was_never_stopped_to_the_last_bit(trainer_class, sam):
    def build(output_dir: str | None = None) -> Any:
        return sam_trainer(
            Classifier(dropout=0.3),
            examples(20),
            trainer_class,
            sam={"sam_rho": RHO, **sam},
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            train_sampling_strategy="random",
            optim="adamw_torch",
            lr_scheduler_type="linear",
            max_steps=6,  # five in an epoch
            save_strategy="steps",
            save_steps=3,
        )

    straight = build()
    straight.train()
    random_state = torch.get_rng_state()
    resumed = build()
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert_same_run(resumed, straight)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert resumed.state.log_history[:-1] == straight.state.log_history[:-1]


@pytest.mark.parametrize("sam", [{}, {"sam_interval": 2}, {"sam_start_ratio": 0.5}])
def test_total_flos_counts_the_passes_that_were_made(sam):
    class Counted(SAMTrainer):
        def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
            return len(inputs["x"])

    trainer = sam_trainer(
        Classifier(),
        examples(20),
        Counted,
        sam={"sam_rho": RHO, **sam},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
    )
    trainer.train()
    perturbed = {"sam_interval": 3, "sam_start_ratio": 2}.get(next(iter(sam), ""), 5)
    assert trainer.state.total_flos == 4 * (5 + perturbed)


# --- torch_compile --------------------------------------------------------------------------------


class Graphs(TrainerCallback):
    """Counts the graphs compiled until the end of each update."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_compiled_model_trains_as_an_eager_one_and_compiles_in_the_first_update_only(scope):
    def run(**args: Any) -> tuple[nn.Module, list[int]]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model, graphs = Classifier(dropout=0.3), Graphs()
        sam_trainer(
            model,
            examples(40),
            sam={"sam_rho": RHO, "sam_scope": scope},
            trainer_kwargs={"callbacks": [graphs]},
            gradient_accumulation_steps=2,
            max_steps=5,
            **args,
        ).train()
        return model, graphs.counts

    (eager, none), (compiled, counts) = run(), run(**COMPILE)
    assert none == [0] * 5
    assert counts == [counts[0]] * 5 and counts[0] > 0
    assert_close(weights(compiled), weights(eager), rtol=1e-11, atol=1e-13)

"""The search for sam_rho: `Trainer.hyperparameter_search` with SAM."""

from __future__ import annotations

import pytest
import torch
from tiny import Classifier, Spy, arguments, examples, sam_trainer, weights
from transformers import TrainerCallback

from sam_hf import SAMTrainer, SAMTrainingArguments

pytest.importorskip("optuna")


class Trials(TrainerCallback):
    """The rho, the weights and the perturbation norms of each trial."""

    def __init__(self) -> None:
        self.rhos: list[float] = []
        self.initial: list[dict[str, torch.Tensor]] = []
        self.final: list[dict[str, torch.Tensor]] = []
        self.norms: list[list[float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.rhos.append(args.sam_rho)
        self.initial.append(weights(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        key = "sam_perturbation_norm"
        self.norms.append([entry[key] for entry in state.log_history if key in entry])
        self.final.append(weights(model))


def test_each_trial_of_a_search_trains_a_fresh_model_with_its_own_rho():
    made = []

    def model_init() -> Classifier:
        torch.manual_seed(3)
        made.append(Classifier())
        return made[-1]

    trials = Trials()
    trainer = SAMTrainer(
        model_init=model_init,
        args=arguments(SAMTrainingArguments),
        train_dataset=examples(12),
        eval_dataset=examples(8, seed=1),
        callbacks=[trials],
    )
    del made[:]
    best = trainer.hyperparameter_search(
        backend="optuna",
        hp_space=lambda trial: {"sam_rho": trial.suggest_float("sam_rho", 0.01, 1, log=True)},
        n_trials=3,
        direction="minimize",
    )
    assert len(set(trials.rhos)) == len(made) == 3
    for rho, norms in zip(trials.rhos, trials.norms, strict=True):
        assert norms == pytest.approx([rho] * 3)
    for initial in trials.initial[1:]:
        assert all(torch.equal(initial[n], value) for n, value in trials.initial[0].items())
    assert best.hyperparameters["sam_rho"] == trials.rhos[int(best.run_id)]

    # The last trial equals a training with its rho.
    torch.manual_seed(3)
    alone = sam_trainer(Classifier(), examples(12), sam={"sam_rho": trials.rhos[-1]})
    spy = Spy()
    alone.add_callback(spy)
    alone.train()
    assert all(torch.equal(spy.weights[-1][n], value) for n, value in trials.final[-1].items())


def test_the_automatic_radius_may_be_one_of_the_values():
    trials = Trials()
    trainer = SAMTrainer(
        model_init=lambda: Classifier(),
        args=arguments(SAMTrainingArguments, sam_rho=0.3),
        train_dataset=examples(12),
        eval_dataset=examples(8, seed=1),
        callbacks=[trials],
    )
    values = iter([0.05, "auto", 0.1])
    for _ in range(3):
        trainer.hyperparameter_search(
            backend="optuna",
            hp_space=lambda trial: {
                "sam_rho": trial.suggest_categorical("sam_rho", [next(values)])
            },
            n_trials=1,
            direction="minimize",
        )
    assert trials.rhos == [0.05, None, 0.1]


def test_a_rho_that_is_not_allowed_stops_the_search():
    trainer = SAMTrainer(
        model_init=lambda: Classifier(),
        args=arguments(SAMTrainingArguments),
        train_dataset=examples(12),
    )
    with pytest.raises(ValueError, match=r"sam_rho=-1\.0 is not allowed"):
        trainer.hyperparameter_search(
            backend="optuna",
            hp_space=lambda trial: {"sam_rho": trial.suggest_float("sam_rho", -1, -1)},
            n_trials=1,
        )

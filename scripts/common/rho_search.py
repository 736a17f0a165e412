"""The search for sam_rho that comes before a training, with Optuna."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.script_utils import InputError
from common.training_utils import in_words, save_json, show_quiet_bar
from transformers import PreTrainedModel, Trainer

VALIDATION_SHARE = 0.2  # of the training data, to judge the trials by


def search_rho(
    build: Callable[..., Trainer], model: PreTrainedModel, args: Any, metric: str
) -> float:
    """The best of the values that Optuna tries, each from the same initial weights.

    The trials are printed, and each is saved in `rho_search.json` as soon as it is finished.

    Args:
        build: makes the trainer of training arguments and `model_init`, on a part of the training
            data, with another part to judge by: the test data has no say in the choice.
        metric: the name, without `eval_`, of the metric that should be as high as possible.

    Raises:
        InputError: Optuna is not installed, or there are several processes.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("--search_rho needs the package optuna: pip install optuna") from error
    if args.world_size > 1:
        raise InputError(f"--search_rho runs in one process, got {args.world_size}")
    low, high = args.search_rho_range or (args.sam_rho / 10, args.sam_rho * 10)
    folder = Path(args.output_dir)
    trial_args = dataclasses.replace(
        args,
        output_dir=str(folder / "rho_search"),
        eval_strategy="no",
        save_strategy="no",
        push_to_hub=False,
    )
    trainer = build(trial_args, model_init=lambda: copy.deepcopy(model))
    show_quiet_bar(trainer, "trial", metric)
    trials = []

    def objective(metrics: dict[str, float]) -> float:
        trials.append({"sam_rho": trainer.args.sam_rho, metric: metrics[f"eval_{metric}"]})
        print(f"  {trials[-1]['sam_rho']:<8.4g}  {trials[-1][metric]:.4f}")
        best = max(trials, key=lambda trial: trial[metric])  # of equal ones the first, as Optuna
        found = {"best_sam_rho": best["sam_rho"], "trials": trials}
        save_json(found, folder / "rho_search.json")  # now: the search may be interrupted
        return trials[-1][metric]

    print(f"search for sam_rho from {low:g} to {high:g}\n  sam_rho   {in_words(metric)}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it logs an interrupt with its traceback
    best = trainer.hyperparameter_search(
        lambda trial: {"sam_rho": trial.suggest_float("sam_rho", low, high, log=True)},
        objective,
        n_trials=args.search_rho,
        direction="maximize",
        backend="optuna",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
    )
    rho = best.hyperparameters["sam_rho"]
    print(f"best: sam_rho {rho:.4g}")
    return rho

"""The search for sam_rho: `Trainer.hyperparameter_search` with SAM, and the scripts' option."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import evaluate
import pytest
import torch
import train_image_classification
import train_text_classification
from common import rho_search
from common.script_utils import InputError
from tiny import Classifier, Spy, arguments, examples, sam_trainer, weights
from transformers import TrainerCallback

from sam_hf import SAMTrainer, SAMTrainingArguments

pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


class Trials(TrainerCallback):
    """What each training of a search began with and did."""

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

    # The last trial is the training that one makes with its rho.
    torch.manual_seed(3)
    alone = sam_trainer(Classifier(), examples(12), sam={"sam_rho": trials.rhos[-1]})
    spy = Spy()
    alone.add_callback(spy)
    alone.train()
    assert all(torch.equal(spy.weights[-1][n], value) for n, value in trials.final[-1].items())


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


TINY = (
    "--use_cpu --hidden_size 8 --num_hidden_layers 1 --num_attention_heads 2 --max_steps 2 "
    "--per_device_train_batch_size 8 --save_strategy no"
)


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": f"{i} {word}", "label": word} for i in range(10) for word in ("a", "b")]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return f"{TINY} --vocab_size 300 --train_file {file} --validation_file {file}"


def run(script, folder: Path, options: str):
    return script.main([*options.split(), "--output_dir", str(folder)])


def test_the_script_searches_on_a_part_of_the_training_data_and_trains_with_the_best(
    tmp_path, texts, monkeypatch, capsys
):
    built = []

    class Recorded(SAMTrainer):
        def __init__(self, **options):
            super().__init__(**options)
            built.append(self)

    monkeypatch.setattr(train_text_classification, "SAMTrainer", Recorded)
    (result,) = run(
        train_text_classification,
        tmp_path / "a",
        f"{texts} --search_rho 3 --search_rho_range 0.2 0.4",
    )
    searching, training = built
    assert (len(searching.train_dataset), len(searching.eval_dataset)) == (16, 4)
    assert (len(training.train_dataset), len(training.eval_dataset)) == (20, 20)
    # Not the test data: the rows are equal here, but the search's two parts make up the training.
    parts = [
        row["input_ids"] for s in built[:1] for d in (s.train_dataset, s.eval_dataset) for row in d
    ]
    assert sorted(parts) == sorted(row["input_ids"] for row in training.train_dataset)

    found = json.loads((tmp_path / "a" / "common.rho_search.json").read_text())
    scores = [trial["accuracy"] for trial in found["trials"]]
    rhos = [trial["sam_rho"] for trial in found["trials"]]
    assert len(set(rhos)) == 3 and all(0.2 <= rho <= 0.4 for rho in rhos)
    assert found["best_sam_rho"] == rhos[scores.index(max(scores))]
    output = capsys.readouterr().out
    assert all(f"{rho:.4g}" in output for rho in rhos)
    assert result.name == f"SAM (rho {found['best_sam_rho']:.4g})"
    assert not (tmp_path / "a" / "rho_search" / "model.safetensors").exists()

    # The search leaves no trace in the training that follows.
    run(train_text_classification, tmp_path / "b", f"{texts} --sam_rho {found['best_sam_rho']!r}")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert saved[0] == saved[1]


def test_the_trials_of_a_search_that_is_interrupted_are_kept(tmp_path, capfd):
    class Interrupted(SAMTrainer):
        trainings = 0

        def train(self, *args, **kwargs):
            Interrupted.trainings += 1
            if Interrupted.trainings == 3:
                raise KeyboardInterrupt
            return super().train(*args, **kwargs)

    def build(args, model_init):
        return Interrupted(
            model_init=model_init,
            args=args,
            train_dataset=examples(4),
            eval_dataset=examples(4),
            compute_metrics=lambda _: {"score": 0.5},
        )

    args = train_image_classification.TrainArguments(
        str(tmp_path), use_cpu=True, max_steps=1, search_rho=4, sam_rho=0.1
    )
    with pytest.raises(KeyboardInterrupt):
        rho_search.search_rho(build, Classifier(), args, "score")
    found = json.loads((tmp_path / "common.rho_search.json").read_text())
    assert len(found["trials"]) == 2 and found["best_sam_rho"] == found["trials"][0]["sam_rho"]
    assert "Traceback" not in capfd.readouterr().err


def test_the_best_rho_is_the_one_with_the_highest_score(tmp_path):
    def build(args, model_init):
        trainer = SAMTrainer(
            model_init=model_init,
            args=args,
            train_dataset=examples(4),
            eval_dataset=examples(4),
            compute_metrics=lambda _: {"score": -abs(trainer.args.sam_rho - 0.3)},
        )
        return trainer

    args = train_text_classification.TrainArguments(
        str(tmp_path), use_cpu=True, max_steps=1, search_rho=4, search_rho_range=[0.1, 0.9]
    )
    best = rho_search.search_rho(build, Classifier(), args, "score")
    found = json.loads((tmp_path / "common.rho_search.json").read_text())
    tried = [trial["sam_rho"] for trial in found["trials"]]
    assert len(tried) == 4
    assert best == found["best_sam_rho"] == min(tried, key=lambda rho: abs(rho - 0.3))


def test_the_image_script_searches_too_around_the_rho_that_is_given(tmp_path):
    run(
        train_image_classification,
        tmp_path,
        f"{TINY} --max_train_samples 100 --max_eval_samples 20 --sam_rho 0.3 --search_rho 2",
    )
    found = json.loads((tmp_path / "common.rho_search.json").read_text())
    assert all(0.03 <= trial["sam_rho"] <= 3 for trial in found["trials"])


def test_a_search_without_optuna_is_refused_in_one_line(tmp_path, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="--search_rho needs the package optuna"):
        run(train_text_classification, tmp_path / "out", f"{texts} --search_rho 2")


def test_too_few_examples_for_a_search_are_refused(tmp_path, texts):
    with pytest.raises(InputError, match="--search_rho: a part of the training data cannot be set"):
        run(train_text_classification, tmp_path, f"{texts} --search_rho 2 --max_train_samples 3")


def test_the_share_to_judge_by_is_what_the_help_says():
    help_text = train_text_classification.TrainArguments.__dataclass_fields__["search_rho"].metadata
    assert "four fifths" in help_text["help"] and rho_search.VALIDATION_SHARE == 0.2

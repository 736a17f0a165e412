"""Sharpness over a training: measured, logged, drawn, and without a trace in the training."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from curved import batches
from real_models import bert, tokens
from tiny import Classifier, Rows, assert_same_bits, examples, sam_trainer, weights
from tqdm.auto import tqdm
from transformers import Trainer, set_seed

from sam_hf.diagnostics import Objective, Plan, SharpnessCallback, callback, measure

QUICK = Plan(steps=2, samples=2, iterations=3, trace_samples=2)


def trainer_of(every=None, sam=True, folder=None, plan=QUICK, max_share=None, **args):
    set_seed(0)
    options = {"max_steps": 6, "logging_steps": 2, **args}
    if folder is not None:
        options["output_dir"] = str(folder)
    trainer = sam_trainer(
        Classifier(dropout=0.3),
        examples(32),
        **({} if sam else {"trainer_class": Trainer}),
        trainer_kwargs={"eval_dataset": examples(24, seed=5)},
        **options,
    )
    if every is not None:
        options = {"plan": plan, "examples": 10, "max_share": max_share}
        trainer.add_callback(SharpnessCallback(trainer, every, **options))
    return trainer


def callback_of(trainer) -> SharpnessCallback:
    (found,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SharpnessCallback)]
    return found


@pytest.mark.parametrize("sam", [True, False])
def test_training_goes_on_as_if_nothing_had_been_measured(sam):
    plain = trainer_of(sam=sam)
    plain.train()
    measured = trainer_of(2, sam=sam)
    measured.train()
    assert_same_bits(measured.model, weights(plain.model))

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(plain) == losses(measured)


def test_the_measures_are_logged_every_so_many_updates_and_at_the_end():
    trainer = trainer_of(4)
    trainer.train()
    seen = [e for e in trainer.state.log_history if "sharpness/worst_sharpness" in e]
    assert [entry["step"] for entry in seen] == [4, 6]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    # whole batches of 8, until there are 10 examples
    rows = Rows([examples(24, seed=5).rows[i] for i in order[:16]])
    expected = measure(Objective(trainer.model, batches(rows, 8)), QUICK)
    found = {k.removeprefix("sharpness/"): v for k, v in seen[-1].items() if "/" in k}
    assert found == pytest.approx(expected, rel=1e-10)
    trainer = trainer_of(0)
    trainer.train()
    seen = [e for e in trainer.state.log_history if "sharpness/loss" in e]
    assert [entry["step"] for entry in seen] == [6]


def bert_trainer(folder, every=2, **args):
    set_seed(0)
    rows = Rows([{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens(16)])
    options = {"max_steps": 4, "output_dir": str(folder), **args}
    kwargs = {"eval_dataset": rows}
    trainer = sam_trainer(bert(), rows, trainer_kwargs=kwargs, **options)
    options = {"plan": QUICK, "examples": 8, "max_share": None}
    trainer.add_callback(SharpnessCallback(trainer, every, **options))
    return trainer


def test_the_loss_is_the_trainers_own(tmp_path):
    smoothing = 0.5
    trainer = bert_trainer(tmp_path, 0, label_smoothing_factor=smoothing)
    trainer.train()
    logged = next(e["sharpness/loss"] for e in trainer.state.log_history if "sharpness/loss" in e)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [trainer.eval_dataset[i] for i in order[:8]]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        logs = trainer.model.eval()(**batch).logits.log_softmax(-1)
    right = logs.gather(1, batch["labels"][:, None])[:, 0]
    expected = -((1 - smoothing) * right + smoothing * logs.mean(-1)).mean().item()
    assert logged == pytest.approx(expected, rel=1e-6)


def test_the_picture_and_the_model_card_are_in_the_output_folder(tmp_path):
    trainer = bert_trainer(tmp_path)
    trainer.train()
    assert {"sharpness.png", "sharpness.svg"} <= {f.name for f in tmp_path.iterdir()}
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "![Sharpness during training](sharpness.png)" in card
    assert "| `sharpness/worst_sharpness` |" in card and "| 4 |" in card
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text().count("sharpness.png") == 1


def test_a_resumed_run_keeps_what_was_seen_before(tmp_path):
    trainer = trainer_of(2, folder=tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    history = callback_of(trainer).history
    resumed = trainer_of(2, folder=tmp_path, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback_of(resumed).history == history
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert any("sharpness/loss" in entry for entry in state["log_history"])


def test_misuse_is_refused_before_the_training():
    trainer = trainer_of()
    for options, said in (
        ({"every": -1}, "every=-1 is not allowed"),
        ({"examples": 0}, "examples=0 is not allowed"),
        ({"max_share": 0}, "max_share=0 is not allowed. Allowed: None or a number > 0 and <= 1"),
        ({"max_share": 1.5}, "max_share=1.5 is not allowed"),
        ({"max_share": float("nan")}, "max_share=nan is not allowed"),
        (
            {"dataset": {"a": examples(4), "b": examples(4)}},
            r"on one dataset, got several \(a, b\): pass",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            SharpnessCallback(trainer, **options)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="SharpnessCallback has no dataset: pass dataset="):
        SharpnessCallback(trainer)
    SharpnessCallback(trainer, dataset=examples(4))
    set_seed(0)
    half = sam_trainer(
        Classifier(dtype=torch.bfloat16),
        examples(8, dtype=torch.bfloat16),
        trainer_class=Trainer,
        trainer_kwargs={"eval_dataset": examples(8, dtype=torch.bfloat16)},
    )
    half.add_callback(SharpnessCallback(half))
    with pytest.raises(ValueError, match=r"weights in torch\.bfloat16"):
        half.train()
    assert half.state.global_step == 0


def test_a_group_that_does_not_fit_the_batches_is_refused_before_the_training():
    trainer = trainer_of(0, plan=Plan(m=5))
    with pytest.raises(
        ValueError, match="m=5 is not allowed: it is not a multiple of the batch size 8"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_measure_that_fails_is_a_warning_and_the_training_goes_on():
    trainer = trainer_of(1, sam=False, learning_rate=float("inf"))
    with pytest.warns(UserWarning, match="sharpness was not measured at update 1: "):
        trainer.train()
    assert trainer.state.global_step == 6


def test_where_memory_is_short_the_training_goes_on(monkeypatch):
    def short(*args):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(Objective, "value", short)
    trainer = trainer_of(4)
    with pytest.warns(UserWarning, match="not measured at update 4: no memory is left"):
        trainer.train()
    assert trainer.state.global_step == 6


def test_the_best_model_alone_has_a_picture_and_a_resumed_run_forgets_it(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options = {**saving, "load_best_model_at_end": True}
    trainer = bert_trainer(tmp_path, 0, **options, max_steps=2)
    trainer.train()
    assert "sharpness/loss" not in callback_of(trainer).history
    assert (tmp_path / "sharpness.png").exists()
    trainer.state.save_to_json(str(tmp_path / "checkpoint-2" / "trainer_state.json"))
    longer = bert_trainer(tmp_path, 0, **options, max_steps=4)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (pair,) = callback_of(longer).history["sharpness/best_loss"]
    assert pair[0] == longer.state.best_global_step


def test_the_picture_says_how_many_examples_were_measured(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(callback, "plot_history", lambda *_, title: titles.append(title))
    trainer_of(0, folder=tmp_path).train()  # 10 were asked for, in batches of 8
    few = trainer_of(folder=tmp_path)
    few.add_callback(SharpnessCallback(few, plan=QUICK, examples=256))
    few.train()
    assert titles == ["Sharpness on 16 examples", "Sharpness on 24 examples"]


def test_of_the_best_model_the_measures_are_its_own(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = bert_trainer(
        tmp_path, 1, **saving, load_best_model_at_end=True, learning_rate=30.0, max_steps=3
    )
    trainer.train()
    history = callback_of(trainer).history
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [trainer.eval_dataset[i] for i in order[:8]]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    best = Objective(trainer.model, [batch]).value()
    assert trainer.state.best_global_step < 3
    expected = (trainer.state.best_global_step, pytest.approx(best, rel=1e-6))
    assert history["sharpness/best_loss"] == [expected]
    assert history["sharpness/loss"][-1][1] > best
    assert "sharpness/best_loss" in callback_of(trainer).model_card_section(tmp_path)


@pytest.mark.slow  # its workers take PyTorch 5 s each to end
def test_with_persistent_workers_the_trainer_evaluates_its_own_data_and_the_callback_others():
    other = examples(16, seed=9)
    losses, seen = [], []
    for measured in (False, True):
        trainer = trainer_of(
            learning_rate=0.0, dataloader_num_workers=1, dataloader_persistent_workers=True
        )
        trainer.evaluate()  # keeps its loader
        if measured:
            callback = SharpnessCallback(trainer, plan=QUICK, examples=16, dataset=other)
            trainer.add_callback(callback)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        seen += [e["sharpness/loss"] for e in trainer.state.log_history if "sharpness/loss" in e]
    assert losses[0] == losses[1]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    rows = batches(Rows([other.rows[i] for i in order]), 8)
    assert seen == [pytest.approx(Objective(trainer.model, rows).value(), rel=1e-10)]


def test_trainers_of_trl_log_what_they_would(tmp_path):
    pytest.importorskip("trl")
    from text_trainers import TRL, build

    def logs(measured):
        set_seed(0)
        args = {"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1}
        trainer = build(TRL["sft"], {"sam_rho": 0.05}, **args)
        if measured:
            data = trainer.train_dataset
            options = {"plan": QUICK, "dataset": data, "max_share": None}
            trainer.add_callback(SharpnessCallback(trainer, 1, **options))
        trainer.train()
        kept = [e for e in trainer.state.log_history if "sharpness/loss" not in e]
        return [
            {k: v for k, v in e.items() if "_per_" not in k and "runtime" not in k} for e in kept
        ]

    assert logs(True) == logs(False)


# ---- Cost: the line at the start, the progress bar, the budget -------------------------------

QUICK_PASSES = (
    17 / 3 + 2 * 2 + 2 + 5 * 2 + 5 + 1
)  # forwards, steps, budgets, products, check, noise
ONE_FORWARD = Plan(steps=0, samples=0, eigenvalues=0, trace_samples=0, noise=False, budget=False)


def test_the_cost_of_a_plan_is_that_of_its_measurement():
    plans = {
        QUICK: QUICK_PASSES,
        dataclasses.replace(QUICK, adaptive=False, trace_samples=0, noise=False): 3 + 3 + 6 + 5,
        dataclasses.replace(QUICK, m=8, steps=3, eigenvalues=0, budget=False): 19 / 3 + 6 + 4 + 6,
        ONE_FORWARD: 1 / 3,
    }
    for plan, passes in plans.items():
        objective, work = Objective(Classifier(), batches(examples(24), 8)), []
        objective.on_batch = work.append
        measure(objective, plan)
        assert plan.passes(objective.parameter_count) == pytest.approx(passes)
        assert sum(work) / 24 == pytest.approx(passes)
    assert Plan().passes(1000) == pytest.approx(65 / 3 + 2 * 10 + 2 + 50 * 2 + 5 + 1)
    assert Plan().passes(7) == pytest.approx(Plan().passes(1000) - 33 * 2)  # Lanczos ends


def test_a_product_by_differences_costs_four_passes():
    objective = Objective(Classifier(), batches(examples(24), 8), products="differences")
    work = []
    objective.on_batch = work.append
    objective.hessian_product(objective.weights)
    assert sum(work) == 4 * 24


def test_a_line_at_the_start_states_passes_examples_and_seconds(monkeypatch, capsys):
    clock = iter([0.0, 9.0, 10.0, 10.25])  # a slow first pass, then a quarter of a second
    monkeypatch.setattr(callback, "time", SimpleNamespace(perf_counter=clock.__next__))
    trainer_of(3, max_share=1.0, max_steps=12).train()
    # 27.7 passes over 2 batches; they are the work of 443 examples, 12 SAM updates are that of 96
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sharpness: ")]
    assert line == (
        "sharpness: each measurement takes up to about 28 forward-backward passes over 16 "
        "examples, 14 s; 0 of the 4 at multiples of every=3 fit in max_share=1 of the training's "
        "work, the others are skipped (except at the end): change every, examples=10 or max_share "
        "to allow more"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "; planned at the end"),
        ({"every": 2}, "; planned every 2 updates and at the end"),
        ({"every": 2, "plan": ONE_FORWARD, "max_share": 1.0}, "; 3 of the 3 at multiples of "),
    ],
)
def test_the_line_says_that_none_are_skipped(options, said, capsys):
    trainer_of(**options).train()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sharpness: ")]
    assert said in line and "skipped" not in line


class Counting(Trainer):
    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        return super().compute_loss(*args, **kwargs)


def test_the_pass_that_is_timed_leaves_no_trace():
    trainer = trainer_of(sam=False)
    trainer.__class__ = Counting
    options = {"plan": ONE_FORWARD, "examples": 10}
    trainer.add_callback(SharpnessCallback(trainer, **options))
    control = trainer.control
    random_state = torch.get_rng_state()
    callback_of(trainer).on_train_begin(trainer.args, trainer.state, control, model=trainer.model)
    assert trainer.calls == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.model.training


def test_a_pass_that_cannot_be_timed_leaves_out_the_seconds(monkeypatch, capsys):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(Objective, "batch_gradients", fails)
    trainer_of(0, plan=ONE_FORWARD).train()
    assert "over 16 examples; planned" in capsys.readouterr().err


class Bar(tqdm):
    """A progress bar that remembers its kind."""

    made: tuple = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Bar.made += ((self, kwargs),)
        self.updates = 0

    def update(self, n=1):
        self.updates += 1
        return super().update(n)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(callback, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", ())
    return lambda: Bar.made


def test_a_progress_bar_follows_each_measurement_to_its_end(bars, capsys):
    trainer_of(4, disable_tqdm=False).train()
    assert len(bars()) == 2  # after updates 4 and 6
    for (bar, options), update in zip(bars(), (4, 6), strict=True):
        assert options["disable"] is False and options["leave"] is False
        assert [bar.total, bar.n] == pytest.approx([QUICK_PASSES * 16] * 2)
        # one for each of 2 batches: forwards, gradients, products
        assert bar.updates == 2 * (17 + 6 + 5 + 5 + 1)
        assert bar.desc.startswith(f"sharpness at update {update}")
    shown = capsys.readouterr().err
    assert "sharpness at update 4:   0%" in shown and "sharpness at update 4:  100%" not in shown


def test_the_bar_ends_at_its_total_if_products_need_differences(bars, monkeypatch):
    def fails(*args):
        raise RuntimeError("no second derivative")

    monkeypatch.setattr(Objective, "_exact_product", fails)
    with pytest.warns(UserWarning, match="no second derivative"):
        trainer_of(0, disable_tqdm=False).train()
    ((bar, _),) = bars()
    assert bar.n == pytest.approx(bar.total)


def test_there_is_no_bar_without_tqdm_or_on_other_processes(bars):
    trainer = trainer_of(2, plan=ONE_FORWARD, disable_tqdm=True, max_steps=2)
    trainer.train()
    trainer.args.disable_tqdm = False
    state = dataclasses.replace(trainer.state, is_world_process_zero=False)
    callback_of(trainer).on_step_end(trainer.args, state, trainer.control, model=trainer.model)
    assert [options["disable"] for _, options in bars()] == [True, True]


def measured_at(trainer) -> list[int]:
    return [e["step"] for e in trainer.state.log_history if "sharpness/loss" in e]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A measurement is a forward pass over 16 examples, 16/3; an update of 4 examples may add
        # 0.45 * 4 = 1.8 to their sum, and twice as much with SAM.
        ({"every": 1, "sam": False}, [3, 6, 7]),
        ({"every": 2, "sam": False}, [4, 6, 7]),
        ({"every": 1, "sam": False, "gradient_accumulation_steps": 2}, [2, 3, 5, 6, 7]),
        ({"every": 1, "sam": True}, [2, 3, 5, 6, 7]),
        ({"every": 7, "sam": False}, [7]),
        ({"every": 1, "sam": False, "max_share": 0.01}, [7]),
        ({"every": 1, "sam": False, "max_share": None}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_measurements_beyond_the_share_of_the_trainings_work_are_skipped(options, expected):
    trainer = trainer_of(**{"plan": ONE_FORWARD, "max_steps": 7, "max_share": 0.45, **options})
    trainer.train()
    assert measured_at(trainer) == expected


def test_plain_updates_of_a_sam_training_are_counted_as_such():
    trainer = trainer_of(1, plan=ONE_FORWARD, max_steps=7, max_share=0.45)
    trainer.sam_config.sam_interval = 2  # 11 passes in 7 updates
    trainer.train()
    assert measured_at(trainer) == [2, 4, 6, 7]


def test_a_resumed_run_skips_the_same_measurements(tmp_path):
    options = {"folder": tmp_path, "save_strategy": "steps", "save_steps": 4, "max_steps": 7}
    options |= {"plan": ONE_FORWARD, "max_share": 0.45}
    trainer_of(1, **options).train()
    resumed = trainer_of(1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert measured_at(resumed) == [2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("every", "updates", "batch", "used"),
    [
        (0, 1000, 16, 80),  # 0.1 * 2 * 16 * 1000 / 40
        (0, 10_000, 16, 256),  # no more than usual
        (250, 1000, 64, 80),  # a quarter of 320, of which the first cannot be afforded yet
        (100, 1000, 16, 32),  # not all of them, on 8 each
        (0, 200, 16, 16),
        (0, 10, 16, 8),
    ],
)
def test_without_a_number_as_many_examples_are_used_as_fit(
    every, updates, batch, used, monkeypatch
):
    monkeypatch.setattr(Plan, "passes", lambda *_: 40.0)
    trainer = trainer_of(per_device_train_batch_size=batch, max_steps=updates)
    callback = SharpnessCallback(trainer, every)
    callback._passes = 40.0
    assert callback._affordable_examples(updates) == used


def test_as_many_examples_as_fit_are_measured_on_and_no_whole_batches_more(capsys):
    trainer = trainer_of(max_steps=1, per_device_eval_batch_size=64)
    trainer.add_callback(callback := SharpnessCallback(trainer, plan=QUICK))
    trainer.train()
    assert callback._example_count == 8
    assert "over 8 examples" in capsys.readouterr().err

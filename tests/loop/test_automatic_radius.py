"""The automatic radius against its float64 twin, in loops and in the Trainer."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from loops import KINDS, Loop, new_accelerator
from method_twins import windows
from reference_asam import asam_step
from reference_radius import EVERY, LEAST, LIMIT, START, K
from reference_radius import AutomaticRadius as Twin
from reference_sam import sam_step
from tiny import Classifier, assert_same_bits, examples, sam_trainer, weights
from torch import nn
from torch.utils.data import default_collate
from transformers import HfArgumentParser
from twin_runs import by_the_twin, means

from sam_hf import SAM, SAMConfig, SAMTrainingArguments
from sam_hf.engine.layout import Layout
from sam_hf.engine.method_state import MethodStateCheckpoint
from sam_hf.engine.radius import RadiusCheck
from sam_hf.methods import METHODS

UPDATES = 41
AUTO = {"sam_rho": "auto", "sam_target_sharpness": 0.4}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_scope = pytest.mark.parametrize("scope", ["batch", "micro_batch"])


def radius_of(sam: SAM) -> float:
    return float(sam._engine.radius.rho)


@every_kind
@every_scope
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_a_loop_has_the_weights_of_the_twin(method, steps, scope, kind):
    model, rows = Classifier(), examples(36).rows
    updates = windows(rows, 3, steps, UPDATES)
    step = functools.partial(asam_step, eta=0.2) if method == "asam" else sam_step
    options = {"target": 0.4, "step": step, "scope": scope}
    expected = by_the_twin(model, means(model, updates), None, **options)
    sam = {**AUTO, "sam_method": method, "sam_scope": scope}
    loop = Loop(kind, model, sam | ({"sam_eta": 0.2} if method == "asam" else {}), steps)
    for window in updates:
        loop.update(window)
    torch.testing.assert_close(loop.weights(), expected, rtol=0, atol=1e-10)
    assert radius_of(loop.sam) != pytest.approx(START, rel=0.1)  # the rule was at work


@every_scope
@pytest.mark.parametrize("steps", [1, 3])
def test_the_trainer_and_a_loop_train_the_same(tmp_path, steps, scope):
    model, data = Classifier(), examples(36)
    loop = Loop("plain", Classifier(), {**AUTO, "sam_scope": scope}, steps)
    loop.model.load_state_dict(model.state_dict())
    updates = windows(data.rows, 3, steps, 12 // steps)
    radii = []
    for window in updates:
        radii.append(radius_of(loop.sam))
        loop.update(window)
    trainer = sam_trainer(
        model,
        data,
        sam={**AUTO, "sam_scope": scope},
        output_dir=str(tmp_path),
        max_steps=len(updates),
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=3,
        logging_steps=1,
    )
    trainer.train()
    torch.testing.assert_close(weights(model), loop.weights(), rtol=0, atol=1e-10)
    logged = [entry["sam_rho"] for entry in trainer.state.log_history if "sam_rho" in entry]
    assert logged == pytest.approx(radii, rel=1e-9)


@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if not m.has_one_pass))
def test_every_method_with_two_passes_reaches_the_goal(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, y = torch.randn(64, 4, dtype=torch.double), torch.arange(64) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the weights stay
    sam = SAM(model, optimizer, SAMConfig(sam_rho=None, sam_method=method))
    for _ in range(240):
        loss = sam.backward(lambda: nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        found = sam.metrics()
    # Nothing is learned: the least share of the first loss is the goal.
    assert found["sam_sharpness"] == pytest.approx(0.5 * LEAST * float(loss), rel=0.3)
    assert found["sam_rho"] == pytest.approx(radius_of(sam), rel=0.5)  # esam chooses anew


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    whole = {"max_steps": 16, "save_strategy": "steps", "save_steps": 10}
    trainers = [
        sam_trainer(Classifier(), examples(36), sam=AUTO, output_dir=str(tmp_path / name), **whole)
        for name in ("one", "two")
    ]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-10"))
    assert_same_bits(trainers[1].model, weights(trainers[0].model))
    with pytest.warns(UserWarning, match="starts empty"):
        path = tmp_path / "one" / "checkpoint-10" / "sam_state.safetensors"
        path.unlink()
        trainers[1].train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-10"))


def test_a_loop_saves_and_loads_its_radius():
    model, updates = Classifier(), windows(examples(36).rows, 3, 1, 6)
    loop = Loop("plain", model, AUTO)
    for window in updates:
        loop.update(window)
    other = Loop("plain", Classifier(), AUTO)
    other.sam.load_state_dict(loop.sam.state_dict())
    assert radius_of(other.sam) == radius_of(loop.sam) != START


def add(radius, number: int, loss: float, *rises: float, moved: float = 1.0) -> None:
    pairs = [(torch.tensor(rise), moved) for rise in rises]
    stack = lambda numbers: torch.stack([x.float() for x in numbers])  # noqa: E731
    radius.add(number, torch.tensor(loss), pairs, stack, max(len(rises), 1))


@pytest.mark.parametrize(
    "losses, rises",
    [
        ([2.0, 1.5, 1.0, 0.5], [0.2, 0.1, 0.2, 0.1]),
        ([1.0, 0.1, 0.05, 0.05], [0.3, 0.3, 0.3, 0.3]),  # less is left than was learned
        ([1.0, 1.2, 1.0, 1.1], [0.02, 0.01, 0.02, 0.01]),  # nothing is learned
        ([-1.0, -2.0, -3.0, -4.0], [0.2, 0.2, 0.2, 0.2]),
        ([1.0, 0.5, 0.4, 0.3], [-0.1, 0.0, 1e-30, 1e30]),
        ([0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.1, 0.1]),
        ([math.nan, 0.8, math.inf, 0.6], [0.1, math.nan, 0.1, 0.1]),
    ],
)
@pytest.mark.parametrize("target", [0.25, 1.0])
def test_losses_move_the_radius_as_the_formula_says(losses, rises, target):
    """Each pair is that of three updates; the fourth has half of it."""
    radius = SAM(*small(), SAMConfig(sam_rho=None, sam_target_sharpness=target))._engine.radius
    twin, number = Twin(target), 0
    for loss, rise in zip(losses, rises, strict=True):
        for factor in (1.0, 1.0, 1.0, 0.5):
            add(radius, number, factor * loss, factor * rise)
            twin.update([factor * loss], [factor * rise])
            number += 1
            assert float(radius.rho) == pytest.approx(twin.rho, rel=1e-4)
    assert START * math.exp(-4 * K * LIMIT) <= twin.rho != START


def test_losses_that_are_not_finite_do_not_count():
    radius, twin = SAM(*small(), SAMConfig())._engine.radius, Twin(0.5)
    losses = [math.nan] * EVERY + [1.0, math.inf, 1.0, math.nan, 0.5, 0.5, 0.5, 0.5]
    losses += [math.nan] * EVERY + [0.3] * EVERY
    for number, loss in enumerate(losses):
        # Of a finite loss, one part of two may have a rise that is not.
        rises = (0.2, math.inf if number % 3 else 0.1)
        add(radius, number, loss, *rises)
        twin.update([loss], rises)
        assert float(radius.rho) == pytest.approx(twin.rho, rel=1e-5)
        assert (float(radius.rho) == pytest.approx(START)) == (number < 7)


def test_it_stays_within_its_bounds():
    radius = SAM(*small(), SAMConfig())._engine.radius
    for number in range(200):
        add(radius, number, 1.0, 1e-9)
    assert float(radius.rho) == pytest.approx(1e4)
    for number in range(200):
        add(radius, number, 1.0, 1e9)
    assert float(radius.rho) == pytest.approx(1e-6)


@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_updates_without_a_gradient_leave_it_as_it_is(scope):
    """A hinge loss that is met everywhere: e is 0, which tells nothing of the radius."""
    model, optimizer = small()
    x = torch.randn(8, 2)
    sam = SAM(model, optimizer, SAMConfig(sam_scope=scope))
    for number in range(40):
        is_met = number >= 12
        shift = 9.0 if is_met else 0.0
        sam.backward(lambda: (1 - model(x) - shift).relu().mean())  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
        if number == 12:
            found = radius_of(sam)
    assert radius_of(sam) == found != START


def test_the_parts_of_an_update_that_have_a_gradient_stand_for_it():
    radii = []
    for shift in (None, 9.0):
        torch.manual_seed(0)
        model, optimizer = small()
        x = torch.randn(8, 2)
        sam = SAM(model, optimizer, SAMConfig(sam_scope="micro_batch"))
        for _ in range(8):
            for number in range(2):
                off = shift if number and shift is not None else 0.0
                sam.backward(lambda: (1 - model(x) - off).relu().mean() / 2, number == 1)  # noqa: B023
        radii.append(sam._engine.radius._state["radius"])
    one, other = radii
    # Half of the loss is met, and so half of the goal is left; the rise is that of the whole.
    assert float(one["first_loss"] / other["first_loss"]) == pytest.approx(2)
    assert float(one["rho"] / other["rho"]) == pytest.approx(2 ** (K * (2 - K)), rel=1e-3)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_with_an_interval_and_a_late_start_all_losses_count(start):
    model, twin = Classifier(), Twin(0.5, interval=3)
    options = {"sam_rho": None, "sam_interval": 3, "sam_start_ratio": start}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SAM(model, optimizer, SAMConfig(**options), total_steps=60)
    for number, (rows,) in enumerate(windows(examples(36).rows, 3, 1, 60)):
        batch = default_collate(rows)
        loss = sam.backward(lambda: model(**batch)["loss"])  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
        found = sam.metrics()
        is_perturbed = number % 3 == 0 and number >= 60 * start
        twin.update([float(loss)], [found["sam_sharpness"]] if is_perturbed else [])
        assert radius_of(sam) == pytest.approx(twin.rho, rel=1e-6)
    assert twin.rho != START


def test_a_short_update_at_the_end_of_an_epoch_has_the_scale_of_the_others():
    """Accelerate divides each loss by the same number, however many an update has."""
    accelerator = new_accelerator(4)
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(examples(3).rows * 6, batch_size=3)  # 6: 4 and 2
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sam = SAM(model, optimizer, accelerator=accelerator)
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = sam.backward(lambda: model(**batch)["loss"])  # noqa: B023
                optimizer.step()
                optimizer.zero_grad()
    values = sam._engine.radius._state["radius"]
    assert float(values["first_loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(values["loss"]) == pytest.approx(float(loss), rel=1e-6)


def test_an_update_that_failed_does_not_count():
    radii, updates = [], windows(examples(36).rows, 3, 1, 9)
    for fails in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SAM(model, optimizer, SAMConfig(**AUTO, sam_scope="micro_batch"))
        for number, (rows,) in enumerate(updates):
            batch = default_collate(rows)
            if fails and number == 2:
                sam.backward(lambda: 2 * model(**batch)["loss"], end_of_update=False)  # noqa: B023
                with pytest.raises(ZeroDivisionError):
                    sam.backward(lambda: 1 / 0)
                optimizer.zero_grad()
            sam.backward(lambda: model(**batch)["loss"])  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        radii.append(radius_of(sam))
    assert radii[0] == radii[1] != START


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(("method", "is_shared"), [("sam", True), ("vasso", False)])
def test_what_a_rule_keeps_is_the_same_on_all_processes(method, is_shared, monkeypatch):
    """Also where each process makes its own perturbations, so that one of them writes it."""
    model = Classifier()
    layout = Layout(list(model.parameters()), model)
    monkeypatch.setattr(layout, "shares_state", lambda scope_is_micro_batch: False)
    config = SAMConfig(sam_method=method, sam_scope="micro_batch")
    state = MethodStateCheckpoint(config, config.build_method(), layout, {})
    assert state.is_shared == is_shared


@pytest.mark.parametrize("sam_rho", [None, "auto", " Auto "])
def test_auto_has_three_spellings(sam_rho):
    assert SAMConfig(sam_rho=sam_rho).sam_rho is None


def test_a_command_line_and_yaml_say_auto(tmp_path):
    parser = HfArgumentParser(SAMTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--sam_rho", "auto", "--sam_target_sharpness", "0.9"]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.sam_rho, args.sam_target_sharpness) == (None, 0.9)
    for value in ("auto", "null"):
        (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\nsam_rho: {value}\n")
        (args,) = parser.parse_yaml_file(tmp_path / "a.yaml")
        assert args.sam_rho is None
    SAMConfig(sam_rho="auto").save_pretrained(tmp_path)
    assert SAMConfig.from_pretrained(tmp_path).sam_rho is None


@pytest.mark.parametrize("overflows", ["loss", "gradient"])
def test_the_scaler_of_fp16_does_not_change_it(overflows):
    """The losses do not know their scale; an overflow does not count."""
    radii = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        sam = SAM(model, optimizer, SAMConfig(**AUTO), scaler=scaler)
        for number, (rows,) in enumerate(windows(examples(36).rows, 3, 1, 12)):
            factor, batch = 1.0, default_collate(rows)
            if number == 4 and overflows == "loss":
                factor = math.inf
            hook = None
            if number == 4 and overflows == "gradient":
                hook = model.first.weight.register_hook(lambda g: g * math.inf)
            sam.backward(lambda: factor * model(**batch)["loss"])  # noqa: B023
            if hook is not None:
                hook.remove()
            scaler.step(optimizer)
            scaler.update(scale)
            optimizer.zero_grad()
        radii.append(radius_of(sam))
    assert radii[0] != START and radii[1] == pytest.approx(radii[0], rel=1e-9)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sam_method": "msam"}, "sam_rho=None is not allowed. Allowed: a number with sam_method="),
        ({"sam_method": "bilora"}, "sam_rho=None is not allowed"),
        ({"sam_rho_schedule": "linear"}, "with sam_rho=None, the automatic radius"),
        ({"sam_rho_warmup_ratio": 0.1}, "with sam_rho=None, the automatic radius"),
        ({"sam_ascent_fraction": 0.5}, "which compares the same examples"),
        ({"sam_replay_rng": False}, "which needs equal masks in both passes"),
        ({"sam_target_sharpness": 1.5}, "sam_target_sharpness=1.5 is not allowed"),
        ({"sam_target_sharpness": 0.0}, "sam_target_sharpness=0.0 is not allowed"),
    ],
)
def test_what_it_cannot_do_is_refused(options, words):
    with pytest.raises(ValueError, match="is not allowed") as error:
        SAMConfig(sam_rho=None, **options)
    assert words in str(error.value)


def test_a_target_without_effect_is_told():
    with pytest.warns(UserWarning, match="sam_target_sharpness=0.9 has no effect with sam_rho=0.1"):
        SAMConfig(sam_rho=0.1, sam_target_sharpness=0.9)


# ---- A fixed radius that is wrong -------------------------------------------------------------


def logs_of(tmp_path, rho: float, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options |= {"output_dir": str(tmp_path), "logging_steps": 1}
        sam_trainer(Classifier(), examples(36), sam={"sam_rho": rho}, **options).train()
    return [str(w.message) for w in caught if "sam_rho=" in str(w.message)]


@pytest.mark.parametrize(
    "rho, words",
    [
        (1e-9, ["changes next to nothing: sam_grad_cosine was 1 or more"]),
        (50.0, ["sam_rho=50 is far too large at update", "Choose a smaller sam_rho", "'auto'"]),
        (1e-5, ["sam_rho=1e-05 changes next to nothing: sam_grad_cosine was", "larger sam_rho"]),
    ],
)
@pytest.mark.parametrize("updates", [5, 30])
def test_a_wrong_radius_is_told_once(tmp_path, rho, words, updates):
    (message,) = logs_of(tmp_path, rho, max_steps=updates)
    assert all(word in message for word in words) and "\n" not in message


@pytest.mark.parametrize(
    "logs, is_told",
    [
        ([(0.1, 0.0), (0.1, 0.0), (0.5, 0.0), (0.1, 0.0), (0.1, 0.0)], False),
        ([(0.5, 0.0), (0.1, 0.0), (0.2, 0.0), (0.29, 0.0)], True),
        ([(0.31, 0.0), (0.1, 0.0), (0.2, 0.0)], False),
        ([(0.9, 0.9)], False),
        ([(0.9, 1.1)], True),
        ([(0.9995, 0.1)] * 9, False),
        ([(0.9995, 0.1)] * 10, True),
        ([(0.9985, 0.1), *[(0.9995, 0.1)] * 9], False),
        ([(0.1, 1e-6)] * 10, True),  # the sharpness is rounding, and so is the cosine
    ],
)
def test_which_readings_are_told(logs, is_told):
    check = RadiusCheck(SAMConfig(sam_rho=1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for cosine, sharpness in logs:
            readings = {"sam_grad_cosine": cosine, "sam_sharpness": sharpness or 0.1}
            check.add(readings, 1.0, update=1)
    assert len(caught) == is_told


def test_a_usual_radius_is_not(tmp_path):
    assert logs_of(tmp_path, 0.3, max_steps=15) == []


def test_a_loop_tells_it_too():
    model, updates = Classifier(), windows(examples(36).rows, 3, 1, 6)
    loop = Loop("plain", model, {"sam_rho": 50.0})
    with pytest.warns(UserWarning, match="sam_rho=50 is far too large at update"):
        for window in updates:
            loop.update(window)
            loop.sam.metrics()

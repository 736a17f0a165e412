"""The methods with fp16's gradient scaler: its scale, its overflows and its skipped steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from faulty import Faulty, bad_gradient
from method_twins import METHODS, TwinRun, trained, windows
from tiny import Classifier, Spy, examples
from twin_runs import losses, means

from sam_hf import SAMTrainer

UPDATES, STEPS = 7, 2
SCALING = (8.0, 2.0, 0.5, 2)  # doubled after two updates that do not overflow
TRIGGERED = {
    "sam_trigger": "gradient_norm",
    "sam_trigger_start": 1.5,
    "sam_trigger_end": 0.0,
}
CASES = {name: sam for name, sam in METHODS.items() if name != "esam"}
CASES["trigger"] = {"sam_method": "sam", **TRIGGERED}
CASES["vasso-trigger"] = METHODS["vasso"] | TRIGGERED


class Scales(Spy):
    """The weights and the scale after each update, and which steps were skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []
        self.skipped: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if kwargs["optimizer"].step_was_skipped:
            self.skipped.append(len(self.scales))
        scaler = kwargs["optimizer"].scaler
        self.scales.append(scaler.get_scale() if scaler else 1.0)


def scaled(
    model: Any, sam: dict[str, Any], scaler: Any = SCALING, **args: Any
) -> tuple[Any, Scales, Any]:
    scales = Scales()
    trainer, _, passes = trained(
        model,
        examples(4 * STEPS * UPDATES),
        sam,
        SAMTrainer,
        {"callbacks": [scales], "scaler": scaler},
        gradient_accumulation_steps=STEPS,
        max_steps=UPDATES,
        fp16=scaler is not None,
        **{"optim": "sgd", "optim_args": "momentum=0.9"} | args,
    )
    return trainer, scales, passes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_scale_that_changes_between_updates_changes_neither_weights_nor_decisions(name, optim):
    args = {} if optim == "sgd" else {"optim": optim, "optim_args": None, "learning_rate": 0.01}
    model = Classifier()
    other = copy.deepcopy(model)
    with_scale, seen, passes = scaled(model, CASES[name], max_grad_norm=0.3, **args)
    without, expected, plain_passes = scaled(other, CASES[name], None, max_grad_norm=0.3, **args)
    assert seen.scales == [8, 16, 16, 32, 32, 64, 64] and not seen.skipped
    assert passes.counts == plain_passes.counts
    if "trigger" in name:
        assert len(set(passes.counts)) == 2
    for ours, theirs in zip(seen.weights, expected.weights, strict=True):
        for n, w in theirs.items():
            assert (ours[n] - w).abs().max() < 1e-12, n
    assert losses(with_scale) == losses(without)
    for ours, theirs in zip(
        with_scale.state.log_history[:-1], without.state.log_history[:-1], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-9)


def ascent_of(sam: dict[str, Any], update: int) -> int:
    """The number of a forward pass: that of the update's second micro-batch at w."""
    every = sam.get("sam_method_args", {}).get("k", 1)
    return sum(STEPS if each % every else 2 * STEPS for each in range(update)) + STEPS - 1


@pytest.mark.parametrize(
    "name", ["gsam", "looksam", "wsam-coupled", "wsam-decoupled", "friendly_sam", "vasso"]
)
@pytest.mark.parametrize("struck", [0, 3])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_in_the_ascent_makes_a_plain_step_and_leaves_the_state_as_it_was(
    name, struck, value
):
    sam = METHODS[name]
    model = Faulty({ascent_of(sam, struck): bad_gradient(value)}, noise=0.0)
    twin = TwinRun(model, sam, mu=0.9)
    data = examples(4 * STEPS * UPDATES)
    _, seen, _ = scaled(model, sam)
    assert not model.faults and not seen.skipped
    for update, shares in enumerate(means(model, windows(data.rows, 4, STEPS, UPDATES))):
        # Whether the first g_v is there is not known without a wait for the device: until the
        # next update of its own, LookSAM goes on without one.
        is_without = name == "looksam" and struck == 0 and update in (1, 2)
        twin.update(shares, is_plain=update == struck or is_without)
        twin.assert_equals(seen.weights[update])


@pytest.mark.parametrize("name", ["trigger", "vasso-trigger"])
@pytest.mark.parametrize("struck", [0, 3])
def test_an_overflow_in_a_gradient_that_is_stepped_with_skips_the_step_and_leaves_no_trace(
    name, struck
):
    sam, data = CASES[name], examples(4 * STEPS * UPDATES)
    if "trigger" in name:
        sam = sam | {"sam_trigger_start": -50.0, "sam_trigger_end": -50.0}  # always
    model = Faulty({ascent_of(sam, struck): bad_gradient(float("inf"))}, noise=0.0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin = TwinRun(model, sam, mu=0.9)
    _, seen, _ = scaled(model, sam)
    assert not model.faults and seen.skipped == [struck]
    for update, shares in enumerate(means(model, windows(data.rows, 4, STEPS, UPDATES))):
        if update == struck:
            before = seen.weights[update - 1] if update else start
            assert all(torch.equal(seen.weights[update][n], w) for n, w in before.items())
        else:
            twin.update(shares)
        twin.assert_equals(seen.weights[update])


DESCENTS = {name: sam for name, sam in METHODS.items() if name not in ("esam", "msam")}
# Nothing of the step that is skipped may be left over for the next one, which is plain: no
# gradient is high from the middle of the run on.
RARER = {"sam_trigger": "gradient_norm", "sam_trigger_start": -1e3, "sam_trigger_end": 1e3}
DESCENTS["wsam-trigger"] = METHODS["wsam-decoupled"] | RARER


@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_in_the_descent_skips_the_step_and_everything_beside_it(name, value):
    sam, data, struck = DESCENTS[name], examples(4 * STEPS * UPDATES), 3
    number = ascent_of(sam, struck) + STEPS
    model = Faulty({number: bad_gradient(value)}, noise=0.0)
    twin = TwinRun(model, sam, mu=0.9)
    _, seen, _ = scaled(model, sam)
    assert not model.faults and seen.skipped == [struck]
    for update, shares in enumerate(means(model, windows(data.rows, 4, STEPS, UPDATES))):
        if update == struck:
            before = seen.weights[update - 1]
            assert all(torch.equal(seen.weights[update][n], w) for n, w in before.items())
            twin.skip(shares)
        else:
            twin.update(shares, is_plain="trigger" in name and update > UPDATES // 2)
        twin.assert_equals(seen.weights[update])

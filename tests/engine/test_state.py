"""What methods remember: saved with every checkpoint, resumed to the last bit."""

from __future__ import annotations

import functools
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faulty import Faulty
from method_twins import METHODS, RHO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Spy, assert_same_bits, examples, sam_trainer, weights
from torch.testing import assert_close
from transformers import TrainerCallback, set_seed
from twin_runs import optimizer_state

from sam_hf import SAMConfig
from sam_hf.distributed import DDPLayout
from sam_hf.engine import method_state

UPDATES, STEPS, FILE = 7, 2, "sam_state.safetensors"
TRIGGERED = {"sam_trigger": "gradient_norm", "sam_trigger_start": 1.2, "sam_trigger_end": 1.2}
REMEMBERS = {
    **{name: METHODS[name] for name in ("looksam", "friendly_sam", "vasso")},
    "friendly_sam-micro_batch": METHODS["friendly_sam"] | {"sam_scope": "micro_batch"},
    "vasso-micro_batch": METHODS["vasso"] | {"sam_scope": "micro_batch"},
    "trigger": {"sam_method": "sam", **TRIGGERED},
    "gsam-trigger": METHODS["gsam"] | TRIGGERED,
    "vasso-trigger": METHODS["vasso"] | TRIGGERED,
    "vasso-later": METHODS["vasso"] | {"sam_start_ratio": 0.1, "sam_interval": 2},
}
FORGETS = {
    **{n: sam for n, sam in METHODS.items() if n not in REMEMBERS},
    "sam": {"sam_method": "sam"},
    "asam": {"sam_method": "asam"},
    "part": {"sam_method": "sam", "sam_ascent_fraction": 0.5},
}
CASES = REMEMBERS | FORGETS
NOT_COMPARED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def build(sam: dict[str, Any], noise: float = 0.1, callbacks: Any = (), **args: Any) -> Any:
    set_seed(0)
    return sam_trainer(
        Faulty(noise=noise),
        examples(4 * STEPS * 4),
        trainer_kwargs={"callbacks": list(callbacks)},
        sam={"sam_rho": RHO, **sam},
        gradient_accumulation_steps=STEPS,
        max_steps=UPDATES,
        optim="adamw_torch",
        learning_rate=0.01,
        lr_scheduler_type="linear",
        train_sampling_strategy="random",
        **args,
    )


def generators() -> list[Any]:
    state = np.random.get_state(legacy=False)["state"]
    return [torch.get_rng_state().tolist(), random.getstate(), state["key"].tolist(), state["pos"]]


def logs(trainer: Any) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if name not in NOT_COMPARED}
        for entry in trainer.state.log_history
        if "train_loss" not in entry  # of the part of the run
    ]


@functools.cache
def straight(name: str, noise: float = 0.1) -> tuple[Any, Spy, list[Any], Path]:
    """A run that nothing disturbs, with a checkpoint after each update."""
    spy = Spy()
    trainer = build(CASES[name], noise, [spy], save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer, spy, generators(), Path(trainer.args.output_dir)


@pytest.mark.parametrize(
    ("name", "update"), [(name, 4) for name in CASES] + [("looksam", 2), ("vasso", 1)]
)
def test_a_run_that_is_resumed_ends_as_one_that_was_not_interrupted_to_the_last_bit(name, update):
    expected, _, random_state, folder = straight(name)
    resumed = build(CASES[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sam_state")
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{update}"))
    assert resumed.state.global_step == UPDATES
    assert_same_bits(resumed.model, weights(expected.model))
    assert_close(optimizer_state(resumed), optimizer_state(expected), rtol=0, atol=0)
    assert generators() == random_state
    assert logs(resumed) == logs(expected)


@pytest.mark.parametrize("name", REMEMBERS)
def test_the_state_matters_to_a_run_that_is_resumed(name, tmp_path):
    expected, _, _, folder = straight(name)
    checkpoint = folder / "checkpoint-4"
    copy = tmp_path / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name != FILE:
            (copy / file.name).write_bytes(file.read_bytes())
    resumed = build(CASES[name])
    with pytest.warns(
        UserWarning, match=rf"holds no {FILE}: the state of sam_method=.* starts empty"
    ):
        resumed.train(resume_from_checkpoint=str(copy))
    assert resumed.state.global_step == UPDATES
    assert any(
        not torch.equal(resumed.model.state_dict()[n], w)
        for n, w in weights(expected.model).items()
    ) or logs(resumed) != logs(expected)


@pytest.mark.parametrize("name", CASES)
def test_a_method_that_remembers_nothing_writes_no_file(name):
    _, _, _, folder = straight(name)
    written = sorted(file.parent.name for file in folder.rglob("*sam_state*"))
    expected = [f"checkpoint-{i}" for i in range(1, UPDATES + 1)] if name in REMEMBERS else []
    assert written == expected
    if expected:
        with safe_open(folder / "checkpoint-4" / FILE, "pt") as file:
            assert file.metadata() == {"sam_method": CASES[name]["sam_method"]}
        saved = load_file(folder / "checkpoint-4" / FILE)
        trained = dict(straight(name)[0].model.named_parameters())
        slots = {key.split("/")[0] for key, tensor in saved.items() if tensor.ndim}
        for slot in slots:
            names = {key.split("/", 1)[1] for key in saved if key.startswith(f"{slot}/")}
            assert names == set(trained)
            assert all(saved[f"{slot}/{n}"].shape == p.shape for n, p in trained.items())


def edited(name: str, folder: Path, edit: Any) -> Path:
    """A copy of a checkpoint in which something was done to the file."""
    source, copy = straight(name)[3] / "checkpoint-4", folder / "checkpoint-4"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    edit(copy / FILE)
    return copy


def test_a_state_of_another_method_begins_anew_with_a_warning(tmp_path):
    checkpoint = edited("vasso", tmp_path, lambda file: None)
    with pytest.warns(
        UserWarning, match=r"written with sam_method='vasso': .*'friendly_sam' starts empty"
    ):
        build(CASES["friendly_sam"]).train(resume_from_checkpoint=str(checkpoint))
    resumed = build(CASES["gsam"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sam_state")
        resumed.train(resume_from_checkpoint=str(checkpoint))  # it needs none


def reshaped(file: Path) -> None:
    tensors = load_file(file)
    tensors["vasso.d/first.weight"] = torch.zeros(3, 3, dtype=torch.float64)
    save_file(tensors, file, metadata={"sam_method": "vasso"})


def renamed(file: Path) -> None:
    tensors = load_file(file)
    tensors["vasso.d/other.weight"] = tensors.pop("vasso.d/first.weight")
    save_file(tensors, file, metadata={"sam_method": "vasso"})


@pytest.mark.parametrize("edit", [reshaped, renamed])
def test_a_state_of_another_model_is_refused_in_one_line(edit, tmp_path):
    checkpoint = edited("vasso", tmp_path, edit)
    with pytest.raises(ValueError, match=r"vasso\.d/\w+\.weight has the shape .*or remove") as e:
        build(CASES["vasso"]).train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(e.value)


def test_a_state_of_another_number_of_processes_is_refused_in_one_line(tmp_path):
    def split(file: Path) -> None:
        for rank in range(2):
            (file.parent / f"sam_state_{rank}-of-2.safetensors").write_bytes(file.read_bytes())
        file.unlink()

    checkpoint = edited("vasso", tmp_path, split)
    message = (
        r"sam_state_0-of-2\.safetensors, sam_state_1-of-2.*the same number of processes.*or remove"
    )
    with pytest.raises(ValueError, match=message) as e:
        build(CASES["vasso"]).train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("scope", "written"), [("batch", []), ("micro_batch", ["sam_state_1-of-2.safetensors"])]
)
def test_under_ddp_a_process_with_an_e_of_its_own_writes_a_state_of_its_own(
    scope, written, tmp_path
):
    accelerator: Any = SimpleNamespace(
        num_processes=2, process_index=1, device=torch.device("cpu"), ddp_handler=None
    )
    model = torch.nn.Linear(2, 2)
    layout = DDPLayout(list(model.parameters()), model, model, accelerator)
    config = SAMConfig(sam_method="vasso", sam_scope=scope)
    state = method_state.MethodStateCheckpoint(
        config, config.build_method(), layout, dict(model.named_parameters())
    )
    state.save(tmp_path, 0, is_writer=False)
    assert [file.name for file in tmp_path.iterdir()] == written


def test_a_full_disk_leaves_the_file_of_before(tmp_path, monkeypatch):
    args = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    build(CASES["vasso"], **args).train()
    file = tmp_path / "checkpoint-1" / FILE
    before = file.read_bytes()

    def fail(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(method_state, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        build(CASES["vasso"], **args).train()
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.glob("*sam_state*")] == [FILE]


def test_a_second_run_of_a_trainer_begins_with_an_empty_state():
    trainer = build(CASES["vasso"], noise=0.0)
    start = weights(trainer.model)
    ends = []
    for _ in range(2):
        trainer.model.load_state_dict(start)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        ends.append(weights(trainer.model))
    assert all(torch.equal(ends[1][n], w) for n, w in ends[0].items())


# ---- A checkpoint just in time ------------------------------------------------------------------


class AtOnce:
    """A timer that does not wait."""

    def __init__(self, _: float, function: Any) -> None:
        self.start = function


@pytest.fixture
def _handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread receives signals")
    jit_checkpoint = pytest.importorskip("transformers.trainer_jit_checkpoint")
    monkeypatch.setattr(jit_checkpoint, "threading", SimpleNamespace(Timer=AtOnce))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Strikes(TrainerCallback):
    """Brings the signal in an update: in its first or last forward pass, or before its step."""

    def __init__(self, update: int, moment: str) -> None:
        self.at, self.moment, self.update, self.passes = update, moment, -1, 0

    def watch(self, model: Any) -> None:
        model.register_forward_hook(self.after_forward)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.update, self.passes = state.global_step, 0

    def after_forward(self, model: Any, args: Any, output: Any) -> None:
        self.passes += 1
        number = {"first": 1, "last": 2 * STEPS}.get(self.moment)
        if self.update == self.at and self.passes == number:
            output["loss"].register_hook(lambda _: signal.raise_signal(signal.SIGTERM))

    def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
        if self.update == self.at and self.moment == "step":
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("moment", ["first", "last", "step"])
@pytest.mark.parametrize(
    ("name", "struck"),
    [(n, 3 if n == "looksam" else 2) for n in REMEMBERS],
)
@pytest.mark.usefixtures("_handler")
def test_a_checkpoint_just_in_time_goes_with_the_state_of_its_weights(name, moment, struck):
    expected, spy, _, folder = straight(name, noise=0.0)
    strikes = Strikes(struck, moment)
    stopped = build(CASES[name], 0.0, [strikes], enable_jit_checkpoint=True)
    strikes.watch(stopped.model)
    stopped.train()
    made = sorted(Path(stopped.args.output_dir).glob("checkpoint-*"))
    (checkpoint,) = made
    update = int(checkpoint.name.split("-")[1])
    assert update == struck + (moment == "step")
    ours, theirs = (
        load_file(path / FILE) for path in (checkpoint, folder / f"checkpoint-{update}")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    resumed = build(CASES[name], 0.0)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(resumed.model, weights(expected.model))
    assert_close(optimizer_state(resumed), optimizer_state(expected), rtol=0, atol=0)
    assert_same_bits(stopped.model, spy.weights[struck])

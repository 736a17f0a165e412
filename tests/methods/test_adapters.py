"""BAR and Bi-LoRA, which work on LoRA's two factors: held to their float64 twins."""

from __future__ import annotations

import copy
import math
import sys
from itertools import product
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from hub_server import hub_server, use_hub
from layouts import DISTRIBUTED, launch
from peft import LoraConfig, PeftModel, get_peft_model
from real_models import bert, tokens
from reference_sam import norm
from tiny import Rows, Spy, arguments, examples, sam_trainer, weights
from torch import nn
from torch.testing import assert_close
from transformers import set_seed
from twin_runs import assert_same_run

from sam_hf import SAMConfig, SAMTrainer
from sam_hf.methods.lora.bar import BAR

sys.path.append(str(DISTRIBUTED))

import adapter_worker as lora

RANK = 3
EXACT = {"rtol": 0, "atol": 1e-10}
BARS = {"sam_method": "bar", "sam_rho": 0.8}
BILORA = {"sam_method": "bilora", "sam_rho": 0.01, "sam_method_args": {"rank": RANK}}
both_methods = pytest.mark.parametrize("sam", [BARS, BILORA], ids=["bar", "bilora"])


def assert_is_dropped(model: Any, is_trained: list[str]) -> None:
    assert not lora.second_pair(model) and lora.trained(model) == is_trained
    assert list(model.peft_config) == model.active_adapters == ["default"]
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 2 and all(m.active_adapters == ["default"] for m in layers)


# ---- BAR -----------------------------------------------------------------------------------------

SCHEDULES = [("constant", "constant", 1), ("linear", "linear", 2), ("cosine", "linear", 1)]


@pytest.mark.parametrize("balance", ["gradients", "weights"])
@pytest.mark.parametrize("optim", lora.OPTIM)
@pytest.mark.parametrize("schedules", SCHEDULES)
def test_bar_is_its_twin_after_every_update(balance, optim, schedules):
    schedule, rates, steps = schedules
    model, spy = lora.adapted(), Spy()
    expected = list(lora.by_bar(copy.deepcopy(model), balance, optim, 0.8, *schedules))
    args = {"gradient_accumulation_steps": steps, "lr_scheduler_type": rates, "optim": optim}
    sam = BARS | {"sam_method_args": {"balance": balance}, "sam_rho_schedule": schedule}
    lora.trainer_of(model, sam, spy, **args | lora.OPTIM[optim]).train()
    for actual, values in zip(spy.weights, expected, strict=True):
        assert_close({name: actual[name] for name in values}, values, **EXACT)


def test_bar_touches_the_pairs_of_lora_alone():
    ours, plain = lora.adapted(bias="lora_only"), lora.adapted(bias="lora_only")
    lora.trainer_of(ours, BARS, max_steps=1).train()
    lora.trainer_of(plain, None, max_steps=1).train()
    expected = weights(plain)
    differ = {n for n, v in ours.state_dict().items() if not torch.equal(v, expected[n])}
    assert differ == {lora.factor(layer, which) for layer in lora.LAYERS for which in "AB"}
    assert len(lora.trained(ours)) == 8


@pytest.mark.parametrize("balance", ["gradients", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_both_factors_to_the_optimizer(balance, value):
    poison = lora.Poison(value)
    sam = BARS | {"sam_method_args": {"balance": balance}}
    lora.trainer_of(lora.adapted(), sam, poison, optim="sgd").train()
    stepped = {n: poison.before[n] - lora.RATE * g for n, g in poison.grads.items()}
    first, middle = lora.factor("first", "B"), lora.factor("middle", "B")
    assert_close(poison.after[first], stepped[first], **EXACT)
    assert (poison.after[middle] - stepped[middle]).abs().max() > 1e-5


def test_bar_needs_both_factors_of_a_layer():
    w, names = [torch.ones(2, 2), torch.ones(2, 2)], ["x.lora_A.d.weight", "y.lora_B.d.weight"]
    BAR().before_step(names, w, [x.clone() for x in w], [1.0, 1.0], 0.5)
    assert all((x == 1).all() for x in w)


# ---- Bi-LoRA -------------------------------------------------------------------------------------

# The optimizer, rho, its schedule, that of the learning rate, micro-batches, max_grad_norm, decay.
BILORA_CASES = {
    "clipped": ("sgd", 0.01, "constant", "constant", 1, 0.0, 0.0),
    "free": ("sgd", 50.0, "constant", "constant", 1, 0.0, 0.0),
    "accumulated": ("sgd", 0.01, "linear", "linear", 2, 0.0, 0.0),
    "max_grad_norm": ("sgd", 0.001, "cosine", "constant", 2, 0.1, 0.0),
    "adamw": ("adamw_torch", 0.01, "constant", "linear", 1, 0.0, 0.0),
    "adamw-free": ("adamw_torch", 50.0, "constant", "constant", 2, 0.1, 0.0),
    "decay": ("adamw_torch", 0.01, "constant", "constant", 1, 0.0, 0.5),
    "decay-free": ("sgd", 50.0, "constant", "constant", 1, 0.0, 0.5),
}


@pytest.mark.parametrize("name", BILORA_CASES)
def test_bilora_is_its_twin_after_every_update(name):
    case = optim, rho, schedule, rates, steps, max_norm, decay = BILORA_CASES[name]
    model, spy = lora.headless(), Spy()
    args = {"gradient_accumulation_steps": steps, "max_grad_norm": max_norm, "weight_decay": decay}
    args |= {"lr_scheduler_type": rates, "optim": optim} | lora.OPTIM[optim]
    sam = BILORA | {"sam_rho": rho, "sam_rho_schedule": schedule}
    trainer = lora.trainer_of(model, sam, spy, **args)
    layers = lora.layers_of(model)
    for x in layers:
        assert x.A2.shape == (RANK, x.W0.shape[1]) and x.A2.abs().max() > 0.01 and not x.B2.any()
    trainer.train()
    twin = list(lora.by_bilora(layers, lora.deep(), *case))
    for actual, (layers, _) in zip(spy.weights, twin, strict=True):
        for name, layer in zip(lora.LAYERS, layers, strict=True):
            pairs = {"default": (layer.B1, layer.A1), "sam_ascent": (layer.B2, layer.A2)}
            for adapter, pair in pairs.items():
                for which, value in zip("BA", pair, strict=True):
                    assert_close(actual[lora.factor(name, which, adapter)], value, **EXACT)
    layers, rho_t = twin[-1]
    size = norm([layer.perturbation() for layer in layers])
    assert 0.01 < size < 5 if rho == 50 else size == pytest.approx(rho_t, rel=1e-12)


def test_the_first_update_of_bilora_is_the_plain_one_and_the_head_descends():
    ours, plain = Spy(), Spy()
    for spy, sam in ((ours, BILORA | {"sam_rho": 1.0}), (plain, None)):
        lora.trainer_of(lora.adapted(), sam, spy, optim="sgd").train()
    assert_close({n: ours.weights[0][n] for n in plain.weights[0]}, plain.weights[0], **EXACT)
    last = plain.weights[-1].items()
    differ = {n for n, v in last if not torch.allclose(ours.weights[-1][n], v)}
    assert differ == set(lora.trained(lora.adapted()))


# ---- The second pair is there in training passes, and gone at the end ----------------------------


def test_evaluations_callbacks_and_saved_models_see_the_first_pair_alone(tmp_path):
    model, look = lora.headless(), lora.Look()
    is_trained = lora.trained(model)
    args = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "out")}
    look.trainer = trainer = lora.trainer_of(model, BILORA | {"sam_rho": 1.0}, look, **args)
    trainer.train()
    assert len(look.seen) == lora.UPDATES
    for predicted, own, alone, both in look.seen:
        assert_close((predicted, own), (alone, alone), **EXACT)
        assert (both - alone).abs().max() > 1e-4
    assert_is_dropped(model, is_trained)
    trainer.save_model(str(tmp_path / "last"))
    assert not list((tmp_path / "last").rglob("sam_ascent"))
    for folder, update in (("out/checkpoint-2", 1), ("out/checkpoint-4", 3), ("last", 3)):
        loaded = PeftModel.from_pretrained(lora.deep(), str(tmp_path / folder))
        assert list(loaded.peft_config) == ["default"]
        assert_close(loaded(lora.HELD_OUT)["logits"].detach(), look.seen[update][2], **EXACT)


def test_callbacks_that_save_the_model_at_the_end_do_not_find_the_second_pair():
    look = lora.Look()
    look.trainer = lora.trainer_of(lora.headless(), BILORA, look)
    look.trainer.train()
    assert look.at_the_end == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_within_a_pass_drops_the_second_pair_too(kind):
    model, is_trained = lora.adapted(), lora.trained(lora.adapted())
    trainer = lora.trainer_of(model, BILORA)

    def fail(*_: Any) -> None:
        if trainer.state.global_step == 2:
            raise kind("stop")

    model.get_submodule("base_model.model.second").register_forward_hook(fail)
    with pytest.raises(kind, match="stop"):
        trainer.train()
    assert_is_dropped(model, is_trained)


def test_a_pushed_classifier_has_one_adapter_and_the_second_pair_is_no_head(monkeypatch, tmp_path):
    set_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], lora_bias=True, task_type="SEQ_CLS")
    model = get_peft_model(bert(), config)
    is_trained = lora.trained(model)
    rows = Rows([{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens(12)])
    with hub_server() as hub:
        use_hub(monkeypatch, hub.url, str(tmp_path))
        trainer = sam_trainer(model, rows, sam=BILORA, push_to_hub=True, hub_model_id="me/tiny")
        pair = lora.second_pair(model)
        assert len(pair) == 4 and all("lora_" in n and n.endswith(".weight") for n in pair)
        trainer.train()
        trainer.push_to_hub()
        files = hub.repositories["me/tiny"].files
    assert_is_dropped(model, is_trained)
    assert not any("sam_ascent" in path for path in files)
    assert b"sam_ascent" not in files["adapter_model.safetensors"] + files["adapter_config.json"]


# ---- Runs ----------------------------------------------------------------------------------------


@both_methods
def test_a_resumed_run_goes_on_to_the_last_bit(sam, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    args |= {"lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
    spies, sam = (Spy(), Spy()), sam | {"sam_rho_schedule": "linear"}
    whole, resumed = (lora.trainer_of(lora.adapted(), sam, spy, **args) for spy in spies)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, whole)
    for ours, theirs in zip(spies[1].weights, spies[0].weights[2:], strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("again", ["train", "model_init"])
def test_the_second_pair_is_there_in_every_run_of_a_trainer(again):
    spy, trainer = Spy(), lora.trainer_of(lora.adapted(), BILORA)
    if again == "model_init":
        kwargs = {"args": arguments(), "train_dataset": examples(48)}
        trainer = SAMTrainer(model_init=lora.headless, sam_config=SAMConfig(**BILORA), **kwargs)
    else:
        trainer.train()
    trainer.add_callback(spy)
    trainer.train()
    assert all(sum("sam_ascent" in name for name in w) == 4 for w in spy.weights)
    assert not lora.second_pair(trainer.model)


@both_methods
@pytest.mark.parametrize("steps", [1, 2])
def test_an_update_has_one_pass(sam, steps):
    model = lora.adapted()
    trainer = lora.trainer_of(model, sam, gradient_accumulation_steps=steps)
    trainer.train()
    assert model.get_submodule("base_model.model").forwards == steps * lora.UPDATES
    assert all(log["sam_passes_per_update"] == 1 for log in trainer.state.log_history[:-1])


@both_methods
def test_rho_0_is_the_plain_trainer_and_adds_nothing(sam):
    plain = lora.trainer_of(lora.adapted(), None, max_grad_norm=1.0)
    off = lora.trainer_of(lora.adapted(), sam | {"sam_rho": 0.0}, max_grad_norm=1.0)
    assert off.model.state_dict().keys() == plain.model.state_dict().keys()
    plain.train()
    off.train()
    assert_same_run(off, plain)
    assert not any(key.startswith("sam_") for log in off.state.log_history for key in log)


@both_methods
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_scaler_of_fp16_skips_leaves_all_factors(sam, optim):
    poison = lora.Poison(math.inf, at=1)
    sam = sam | {"sam_rho_schedule": "linear", "sam_rho": 0.002}
    trainer = lora.trainer_of(lora.adapted(), sam, poison, optim=optim)
    # Accelerate makes one for fp16 on a GPU alone.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", 8.0, 2.0, 0.5, 100)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 4.0
    assert_close(poison.after, poison.before, rtol=0, atol=0)


DDP = {
    f"{sam['sam_method']}-{n}": {"sam": sam, "args": {"gradient_accumulation_steps": n}}
    for sam, n in product([BARS, BILORA], [1, 2])
}


@pytest.mark.slow
def test_two_processes_train_as_one_and_agree_to_the_last_bit(tmp_path):
    runs = launch("adapter_worker.py", DDP, tmp_path, uses=["peft"])
    assert [seen["world_size"] for seen in runs] == [2, 2]
    for name, case in DDP.items():
        first, second = (seen[name] for seen in runs)
        assert_close(first["weights"], second["weights"], rtol=0, atol=0)
        assert first["logs"] == second["logs"] and first["left"] == second["left"] == ["default"]
        alone = lora.updates_of(case, per_device_train_batch_size=8)
        assert_close(first["weights"], alone["weights"], **EXACT)


@both_methods
def test_peft_config_of_trl(sam):
    pytest.importorskip("trl")
    from text_trainers import TRL, build

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    row, spies = copy.copy(TRL["sft"]), [Spy(), Spy()]
    object.__setattr__(row, "kwargs", lambda: {"peft_config": config})
    for spy, options in zip(spies, (sam, None), strict=True):
        trainer = build(row, options, optim="adamw_torch")
        trainer.add_callback(spy)
        trainer.train()
        assert not lora.second_pair(trainer.model)
    ours, plain = (spy.weights[-1] for spy in spies)
    differ = {name for name, v in plain.items() if not torch.equal(ours[name], v)}
    assert len(differ) == 4 and all("lora_" in name for name in differ)
    assert all(ours[name].any() for name in ours if "sam_ascent" in name)


# ---- Refused -------------------------------------------------------------------------------------

REFUSED = [
    *((lora.deep, sam, r"Deep has none\. Allowed: get_peft_model") for sam in (BARS, BILORA)),
    *((lora.with_prompts, sam, r"PROMPT_TUNING\. Allowed: get") for sam in (BARS, BILORA)),
    (lambda: lora.with_lora(nn.Embedding(4, 4)), BILORA, r"of the type Embedding\. Exclude it"),
    (lambda: lora.with_lora(nn.Conv1d(4, 4, 1)), BILORA, r"of the type Conv1d\. Exclude it"),
    (lora.two_adapters, BILORA, r"one adapter, and this one has default, ref\. Merge the"),
    (lora.twice, BILORA, r"named 'sam_ascent' already, .* model\.delete_adapter\('sam_ascent'\)"),
]


@pytest.mark.parametrize(("make", "sam", "message"), REFUSED)
def test_models_that_do_not_fit_are_refused_in_one_line_and_left_as_they_were(make, sam, message):
    model = make()
    before = list(model.state_dict()), lora.trained(model)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        lora.trainer_of(model, sam)
    assert (list(model.state_dict()), lora.trained(model)) == before


def test_an_optimizer_that_was_made_without_the_second_pair_is_refused():
    model = lora.headless()
    optimizers = torch.optim.SGD(model.parameters(), 0.1), None
    kwargs = {"args": arguments(), "train_dataset": examples(4), "optimizers": optimizers}
    with pytest.raises(ValueError, match=r"passed in `optimizers`\. Let the trainer create it"):
        SAMTrainer(model=model, sam_config=SAMConfig(**BILORA), **kwargs)
    assert not lora.second_pair(model)


FOR_BOTH = {"sam_scope": "micro_batch", "sam_ascent_fraction": 0.5, "sam_params": "lora_B"}
FOR_BOTH |= {"sam_trigger": "gradient_norm"}
FOR_BILORA = {"sam_interval": 2, "sam_start_ratio": 0.5, "sam_rho_warmup_ratio": 0.5}
FOR_BILORA |= FOR_BOTH | {"sam_rho_schedule": "learning_rate"}


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("bar", *o) for o in FOR_BOTH.items()] + [("bilora", *o) for o in FOR_BILORA.items()],
)
def test_options_that_do_not_go_with_the_method_are_refused(method, name, value):
    message = rf"^{name}={value!r} is not allowed\. Allowed: .* with sam_method='{method}'[^\n]*$"
    with pytest.raises(ValueError, match=message):
        SAMConfig(sam_method=method, **{name: value})

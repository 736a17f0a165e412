"""Adapters: they alone are perturbed and trained, whoever makes them; merging and saving work."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from reference_sam import sam_step
from text_trainers import TRL, build, language_model
from tiny import Rows, Spy, examples, sam_trainer, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM

RHO = 0.3
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn"], task_type="CAUSAL_LM")


def rows(n: int = 16, length: int = 8) -> Rows:
    """The first token is not predicted; as a label it would still count in the mean of the loss."""
    tokens = torch.randint(3, 24, (n, length))
    labels = tokens.masked_fill(torch.arange(length) == 0, -100)
    return Rows([{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)])


def spread(model: nn.Module) -> nn.Module:
    """Adapters begin with B = 0, where the gradient of A is 0: start from somewhere else."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return model


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_base_is_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = dict(model.named_parameters())
    assert len(before) > 10
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def test_lora_by_get_peft_model_is_trained_as_the_float64_twin_says():
    torch.manual_seed(0)
    model = spread(get_peft_model(language_model().double(), LORA))
    data, base = rows(), frozen(model)
    twin, names = copy.deepcopy(model), trained(model)
    assert names and all("lora_" in name for name in names)
    w = [twin.get_parameter(name).detach().clone() for name in names]
    for i in range(3):
        batch = default_collate(data.rows[4 * i : 4 * i + 4])
        g_s, _ = sam_step(w, [lambda w, x=batch: loss(twin, names, w, x)], RHO)
        w = [w_i - 0.1 * g for w_i, g in zip(w, g_s, strict=True)]

    trainer = sam_trainer(model, data, sam={"sam_rho": RHO})
    trainer.train()
    actual = {name: model.get_parameter(name) for name in names}
    # The loss of transformers is computed in float32.
    assert_close(actual, dict(zip(names, w, strict=True)), rtol=1e-4, atol=1e-6)
    assert_base_is_unchanged(model, base)
    assert trainer.state.log_history[0]["sam_perturbation_norm"] == pytest.approx(RHO)


def loss(model: nn.Module, names: list[str], w: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
    return functional_call(model, dict(zip(names, w, strict=True)), kwargs=batch).loss


def test_only_the_adapters_move_to_w_plus_e():
    model = spread(get_peft_model(language_model(), LORA))
    trainer = sam_trainer(model, rows(), sam={"sam_rho": RHO}, max_steps=1)
    before, seen = weights(model), []

    def look(*_: Any) -> None:
        moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        seen.append((trainer.is_in_descent_pass, moved))

    model.register_forward_pre_hook(look)
    trainer.train()
    assert seen == [(False, set()), (True, set(trained(model)))]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward", "grpo"])
def test_peft_config_of_trl_trains_adapters_alone(name):
    row = TRL[name]
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    options = {"r": 2, "target_modules": ["c_attn"], "task_type": task}
    model = language_model(row.model)
    kwargs = {k: v for k, v in row.kwargs().items() if k != "ref_model"}  # it is the base
    with_adapters = copy.copy(row)
    object.__setattr__(
        with_adapters, "kwargs", lambda: {**kwargs, "peft_config": LoraConfig(**options)}
    )
    trainer = build(with_adapters, {"sam_rho": RHO}, model)
    base, spy = frozen(trainer.model), Spy()
    trainer.add_callback(spy)
    before = weights(trainer.model)
    trainer.train()
    assert_base_is_unchanged(trainer.model, base)
    moved = {n for n, v in spy.weights[-1].items() if not torch.equal(v, before[n])}
    assert moved and moved <= set(trained(trainer.model))
    assert trainer.state.log_history[0]["sam_perturbation_norm"] == pytest.approx(RHO, rel=1e-4)


def test_adapters_are_saved_loaded_and_merged(tmp_path):
    base = language_model()
    base.save_pretrained(tmp_path / "base")
    model = spread(get_peft_model(base, LORA))
    trainer = sam_trainer(model, rows(), sam={"sam_rho": RHO}, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = torch.arange(3, 11)[None]
    expected = logits(model, tokens)
    checkpoint = f"{trainer.args.output_dir}/checkpoint-3"
    for folder in (tmp_path / "adapter", checkpoint):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert not torch.allclose(logits(fresh, tokens), expected, atol=1e-3)
        loaded = PeftModel.from_pretrained(fresh, str(folder))
        assert_close(logits(loaded, tokens), expected)
    assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=1e-4, atol=1e-5)


def test_resume_with_adapters_is_that_of_a_run_without_a_break(tmp_path):
    def trainer(**args: Any) -> Any:
        torch.manual_seed(0)
        model = spread(get_peft_model(language_model(), LORA))
        options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
        return sam_trainer(model, rows(), sam={"sam_rho": RHO}, **options | args)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 3
    for name in trained(whole.model):
        assert torch.equal(resumed.model.get_parameter(name), whole.model.get_parameter(name))


def test_prompt_tuning_perturbs_the_virtual_tokens():
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(language_model(), config)
    base = frozen(model)
    trainer = sam_trainer(model, rows(), sam={"sam_rho": RHO})
    trainer.train()
    assert_base_is_unchanged(model, base)
    assert trainer.state.log_history[0]["sam_perturbation_norm"] == pytest.approx(RHO)


def test_a_quantized_base_stays_as_it_is(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    language_model().save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantized, device_map="cpu", dtype=torch.float32
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = spread(get_peft_model(model, LORA))
    base = frozen(model)
    assert any(value.dtype is torch.uint8 for value in base.values())
    trainer = sam_trainer(model, rows(), sam={"sam_rho": RHO})
    trainer.train()
    assert_base_is_unchanged(model, base)
    for entry in trainer.state.log_history[:-1]:
        assert entry["sam_perturbation_norm"] == pytest.approx(RHO, rel=1e-4)
        assert entry["sam_sharpness"] > 0


def test_adapters_without_a_gradient_are_told_in_one_line():
    model = get_peft_model(language_model(), LORA)
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match="sam_params"):
        sam_trainer(model, examples(4))

"""The GRPO script: its rule, its prompts, and a run from the command line to the saved files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")


from common import experiment
from common.arguments import ModelArguments
from common.cli import InputError, OptionParser
from train_grpo import (
    CHARACTERS,
    PromptArguments,
    TrainArguments,
    build_model,
    main,
    make_prompts,
    reward,
)

ROOT = Path(__file__).parents[2]
TINY = (
    "--config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2 --num_prompts 16 "
    "--num_eval_prompts 8 --num_generations 4 --max_completion_length 6 --use_cpu "
    "--per_device_train_batch_size 16 --per_device_eval_batch_size 32 "
    "--activation_checkpointing false --save_strategy no --logging_steps 1"
)


def run(folder: Path, options: str):
    return main([*TINY.split(), *options.split(), "--output_dir", str(folder)])


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_reward_is_the_share_of_digits():
    assert reward(["1a2b", "123", "abc", "", "٣a"]) == [0.5, 1.0, 0.0, 0.0, 0.5]


def test_prompts_are_all_different_and_the_same_every_time():
    prompts = make_prompts(500)["prompt"][:]
    assert len(set(prompts)) == 500
    assert prompts[:20] == make_prompts(20)["prompt"][:]


def test_the_tokenizer_has_one_token_for_each_character_and_gives_them_back():
    model, tokenizer = build_model(ModelArguments(), SimpleNamespace(max_completion_length=100))
    assert model.config.max_position_embeddings == 104  # a prompt has 4 characters
    tokens = tokenizer(CHARACTERS)["input_ids"]
    assert len(tokens) == len(set(tokens)) == len(CHARACTERS) == model.config.vocab_size - 2
    assert tokenizer.decode(tokens) == CHARACTERS


def test_the_model_learns_to_write_digits(tmp_path, capsys):
    (result,) = run(
        tmp_path,
        "--config_overrides hidden_size=32,num_hidden_layers=1 --max_steps 40 --learning_rate 1e-2 "
        "--per_device_train_batch_size 32",
    )
    before, after = result.curve[0][1], result.score
    assert before < 0.4 and after > before + 0.3
    assert f"mean reward {before:.3f} before, {after:.3f} after" in capsys.readouterr().out
    trained = [entry for entry in history(tmp_path) if "sam_perturbation_norm" in entry]
    last = trained[-1]
    assert last["sam_perturbation_norm"] == pytest.approx(last["sam_rho"], rel=1e-3)
    for name in ("README.md", "curves.png", "results.json"):
        assert (tmp_path / name).is_file()

    # The saved model earns the reported reward on other prompts.
    model, tokenizer = (
        kind.from_pretrained(tmp_path) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompts = tokenizer(make_prompts(64)["prompt"][-32:], return_tensors="pt")
    torch.manual_seed(0)
    written = model.generate(**prompts, max_new_tokens=6, do_sample=True, top_k=0)
    texts = tokenizer.batch_decode(written[:, 4:], skip_special_tokens=True)
    assert sum(reward(texts)) / 32 == pytest.approx(after, abs=0.15)


def test_the_reward_is_reported_on_prompts_that_are_not_trained_on(tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(experiment, "publish", lambda trainer, **card: trainers.append(trainer))
    run(tmp_path, "--max_steps 1")
    sets = (trainers[0].train_dataset, trainers[0].eval_dataset)
    train, test = (set(data["prompt"]) for data in sets)
    assert (len(train), len(test)) == (16, 8) and not train & test


def test_rho_0_trains_plainly_and_a_comparison_has_the_same_compute(tmp_path):
    sam, plain = run(tmp_path / "a", "--max_steps 2 --sam_rho 0.1 --compare_with_plain")
    assert (sam.name, plain.name) == ("SAM (rho 0.1)", "AdamW")
    assert (sam.passes, plain.passes, sam.epochs, plain.epochs) == (1.0, 1.0, 0.5, 1.0)
    (alone,) = run(tmp_path / "b", "--max_steps 4 --sam_rho 0")
    assert alone.curve == plain.curve
    assert not any("sam_sharpness" in entry for entry in history(tmp_path / "b"))


def test_a_run_resumed_before_its_first_log_ends_with_the_same_weights(tmp_path):
    options = "--max_steps 2 --save_strategy steps --save_steps 1 --logging_steps 50"
    run(tmp_path / "a", options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-1").rename(tmp_path / "b" / "checkpoint-1")
    run(tmp_path / "b", f"{options} --resume_from_checkpoint last")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num_prompts 0", "--num_prompts must be 1 or more, got 0"),
        ("--num_generations 3", "generation_batch_size"),
        ("--sam_rho -1", "sam_rho=-1.0 is not allowed"),
        ("--model_name_or_path nowhere", "--model_name_or_path 'nowhere'"),
    ],
)
def test_bad_input_is_refused_before_the_training(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        main(["--use_cpu", *options.split(), "--output_dir", str(tmp_path)])


def test_the_config_is_valid():
    parser = OptionParser((PromptArguments, ModelArguments, TrainArguments))
    _, _, args = parser.parse([str(ROOT / "configs" / "grpo_digits.yaml")])
    assert args.sam_rho > 0 and args.eval_on_start
    assert args.output_dir == "outputs/grpo_digits"

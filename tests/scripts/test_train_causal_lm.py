"""The language-model script, from the command line to the saved files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from slow import slow_unless
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")
pytest.importorskip("peft")

from common import experiment
from common.arguments import DataArguments
from common.cli import InputError, OptionParser
from common.data import train_tokenizer
from peft import PeftModel
from train_causal_lm import (
    LanguageModelArguments,
    TrainArguments,
    build_model,
    language_reference,
    load_data,
    main,
)

ROOT = Path(__file__).parents[2]
TINY = "--config_overrides hidden_size=8,num_hidden_layers=1,num_attention_heads=2"
SHORT = (
    "--use_cpu --activation_checkpointing false --max_length 32 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 512 --save_strategy no --max_steps 2 --learning_rate 1e-2"
)
PACKED = f"{SHORT} --packing --packing_strategy wrapped"
TEXTS = ["The quick brown fox jumps.", "Over the lazy dog it goes.", "And the cat looks on."]
MESSAGES = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def run(folder: Path, options: str):
    return main([*options.split(), "--output_dir", str(folder)])


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS * 3])


@pytest.fixture
def base(tmp_path, corpus) -> Path:
    """An untrained model and its tokenizer, as a run saves them."""
    run(tmp_path / "base", f"{TINY} {PACKED} --max_steps 1 --sam_rho 0 --train_file {corpus}")
    return tmp_path / "base"


# ------------------------------------------------------------------------------------ the whole job


def test_the_default_job_saves_model_tokenizer_results_and_picture(tmp_path, capsys):
    few = "--max_train_samples 3 --max_eval_samples 2 --sam_rho 0.1 --compare_with_plain"
    runs = run(tmp_path, f"{TINY} {PACKED} {few}")
    for name in ("model.safetensors", "tokenizer.json", "README.md", "curves.png"):
        assert (tmp_path / name).is_file(), name
    assert [r.name for r in runs] == ["SAM (rho 0.1)", "AdamW"]
    assert runs[0].passes == runs[1].passes  # equal compute
    results = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert runs[0].scores == {"loss": saved["eval_loss"], "perplexity": saved["eval_perplexity"]}
    assert runs[0].scores["perplexity"] == pytest.approx(math.exp(runs[0].scores["loss"]))
    assert results["runs"][0]["scores"] == runs[0].scores
    assert results["training_arguments"]["sam_rho"] == 0.1
    output = capsys.readouterr().out
    assert "language reference of Python 3" in output
    assert f"{runs[0].score:.4f}" in output


def test_the_saved_model_has_the_reported_loss(tmp_path, corpus):
    others = ["A text that nobody has seen.", "And a longer one, which ends here."]
    test = write(tmp_path / "test.jsonl", [{"text": text} for text in others])
    (result,) = run(
        tmp_path / "out", f"{TINY} {SHORT} --train_file {corpus} --validation_file {test}"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    total = tokens = 0
    for text in others:
        ids = torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"][:32]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
        tokens += ids.numel() - 1
    assert total / tokens == pytest.approx(result.score, rel=1e-5)


@slow_unless(kind=["adapters"])
@pytest.mark.parametrize("kind", ["model", "adapters"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, base, corpus, kind):
    options = f"{PACKED} --train_file {corpus} --model_name_or_path {base} --save_strategy steps"
    options += " --save_steps 1" + (" --use_lora" if kind == "adapters" else "")
    run(tmp_path / "a", options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-1").rename(tmp_path / "b" / "checkpoint-1")
    run(tmp_path / "b", f"{options} --resume_from_checkpoint last")
    name = "adapter_model.safetensors" if kind == "adapters" else "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_padding_free_packing_does_not_change_the_count_of_epochs(tmp_path, corpus):
    options = f"{TINY} {SHORT} --train_file {corpus} --max_steps -1 --num_train_epochs 2 --packing"
    (result,) = run(tmp_path / "out", options)
    assert (result.epochs, result.passes) == (2.0, 4.0)


# --------------------------------------------------------------------------------------------- LoRA


def test_lora_trains_only_the_adapters_and_they_load_on_the_base(
    tmp_path, base, corpus, monkeypatch
):
    trainers = []
    monkeypatch.setattr(experiment, "publish", lambda trainer, **card: trainers.append(trainer))
    adapt = f"--model_name_or_path {base} --use_lora --lora_target_modules all-linear --lora_r 4"
    run(
        tmp_path / "lora", f"{PACKED} --train_file {corpus} {adapt} --sam_rho 0.5 --logging_steps 1"
    )
    trained = trainers[0].model
    frozen = {
        name.replace(".base_layer", ""): p
        for name, p in trained.get_base_model().named_parameters()
        if "lora_" not in name
    }
    for name, weight in load_file(base / "model.safetensors").items():
        assert torch.equal(frozen[name], weight), name
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    history = trainers[0].state.log_history
    norms = [e["sam_perturbation_norm"] for e in history if "sam_perturbation_norm" in e]
    assert norms and norms == pytest.approx([0.5] * len(norms), rel=1e-3)

    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora"
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = trained.eval()(tokens).logits
        assert torch.equal(loaded.eval()(tokens).logits, expected)
        assert not torch.equal(plain.eval()(tokens).logits, expected)  # the adapters have an effect
    assert loaded.peft_config["default"].r == 4


def test_adapters_that_cannot_be_made_are_refused(tmp_path, base, corpus):
    options = f"{PACKED} --train_file {corpus} --model_name_or_path {base} --use_lora"
    for option, message in (("--lora_r 0", "positive"), ("--lora_target_modules x", "'x'")):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "out", f"{options} {option}")


def test_weights_stored_in_bf16_are_trained_in_fp32(tmp_path, base, corpus):
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    run(tmp_path / "out", f"{PACKED} --train_file {corpus} --model_name_or_path {base}")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32}


# --------------------------------------------------------------------------------------------- data


def test_sizes_that_depend_on_config_overrides_follow_them():
    overrides = "hidden_size=48,num_attention_heads=3"
    args = LanguageModelArguments(config_overrides=overrides)
    train = datasets.Dataset.from_dict({"text": TEXTS})
    model, _ = build_model(args, SimpleNamespace(max_length=32), train)
    assert (model.config.head_dim, model.config.num_key_value_heads) == (16, 3)
    assert model(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


def test_no_paragraph_of_the_language_reference_is_in_two_of_its_topics():
    texts = language_reference()["text"]
    topics = [{part.strip() for part in text.split("\n\n")} for text in texts]
    assert sum(map(len, topics)) == len(set.union(*topics))
    assert sum(map(len, texts)) > 200_000
    assert min(map(len, texts)) >= 300


def test_the_split_is_the_same_every_time_and_has_no_text_in_both_sets():
    _, train, test = load_data(DataArguments(), "text")
    _, again, _ = load_data(DataArguments(max_train_samples=3), "text")
    assert not set(train["text"]) & set(test["text"])
    assert set(again["text"]) < set(train["text"])
    assert len(test) == round(0.2 * (len(train) + len(test)))


@pytest.mark.parametrize(
    ("name", "content", "columns", "rows"),
    [
        ("a.txt", "One\nparagraph.\n\nAnother.\n", ["text"], ["One\nparagraph.", "Another.\n"]),
        ("a.csv", "text,other\nOne.,1\nTwo.,2\n", ["text"], ["One.", "Two."]),
        (
            "a.jsonl",
            '{"prompt": "P", "completion": "C", "id": 7}\n' * 2,
            ["prompt", "completion"],
            ["P", "P"],
        ),
        (
            "a.json",
            json.dumps([{"prompt": "an id", "messages": MESSAGES, "tools": "[]"}] * 2),
            ["messages", "tools"],
            [MESSAGES] * 2,
        ),
    ],
)
def test_local_files_give_the_columns_that_trl_trains_on(tmp_path, name, content, columns, rows):
    file = tmp_path / name
    file.write_text(content)
    args = DataArguments(train_file=[str(file)], validation_file=[str(file)])
    _, train, test = load_data(args, "text")
    assert train.column_names == test.column_names == columns
    assert train[columns[0]][:] == rows


def test_the_loss_is_that_of_the_completions_without_their_prompts(tmp_path):
    rows = [{"prompt": "Question? " * 3, "completion": "No."}] * 4
    file = write(tmp_path / "pairs.jsonl", rows)
    losses = []
    for name, option in (("completion", ""), ("all", "--completion_only_loss false")):
        (result,) = run(tmp_path / name, f"{TINY} {SHORT} --train_file {file} {option}")
        losses.append(result.score)
    assert losses[0] != losses[1]


def test_the_tokenizer_gives_every_text_back_and_knows_where_it_ends():
    tokenizer = train_tokenizer(iter(TEXTS * 5), 300)
    text = "Größe: 日本 \t\n<b> fox"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 3
    assert len(tokenizer) <= 300
    assert len(tokenizer("The quick brown fox")["input_ids"]) < 15  # it has learnt some words


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lora_r 4", "--lora_r has no effect without --use_lora"),
        ("--use_lora", "--use_lora has no effect on an untrained model"),
        ("--use_lora --model_name_or_path x --lora_dropout 2", "--lora_dropout must be from 0 to"),
        ("--use_lora --model_name_or_path {tmp}", "holds adapters, which new ones would replace"),
        ("--config_overrides a=1 --model_name_or_path x", "has no effect with --model_name_or_pa"),
        ("--config_overrides no_such=1", "--config_overrides 'no_such=1': key no_such"),
        ("--model_name_or_path {tmp}/nowhere", "--model_name_or_path: there is no folder"),
        ("--sam_rho -1", "sam_rho=-1.0 is not allowed"),
        ("--packing_strategy tight", "tight"),
        ("--train_file {tmp}/other.jsonl", r"--dataset_text_field: .*'text' \(did you mean texts"),
        ("--train_file {tmp}/none.jsonl", "--dataset_text_field 'text' holds NoneType"),
        ("--train_file {tmp}/one.jsonl", "--eval_fraction 0.2 cannot be held out"),
        (
            "--train_file {tmp}/one.jsonl --validation_file {tmp}/other.jsonl",
            "--dataset_text_field: there is no column 'text'",
        ),
        ("--train_file {tmp}/chat.jsonl", "chat_template"),
    ],
)
def test_bad_input_is_refused_before_the_training(tmp_path, options, message):
    (tmp_path / "adapter_config.json").write_text("{}")
    write(tmp_path / "other.jsonl", [{"texts": "a"}] * 5)
    write(tmp_path / "none.jsonl", [{"text": "a"}, {"text": None}] * 3)
    write(tmp_path / "one.jsonl", [{"text": "a"}])
    write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}] * 5)
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "out", f"--use_cpu {options.format(tmp=tmp_path)}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["pydoc_lm", "pydoc_lm_lora"])
def test_the_configs_are_valid(file, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "pydoc_lm").mkdir(parents=True)  # pydoc_lm_lora adapts this model
    monkeypatch.chdir(tmp_path)
    parser = OptionParser((DataArguments, LanguageModelArguments, TrainArguments))
    data_args, model_args, training_args = parser.parse([str(ROOT / "configs" / f"{file}.yaml")])
    assert training_args.sam_rho > 0
    assert training_args.output_dir == f"outputs/{file}"
    assert data_args.is_built_in
    assert model_args.use_lora == ("lora" in file)


def test_the_help_names_the_options_of_sam_trl_and_lora():
    text = OptionParser((DataArguments, LanguageModelArguments, TrainArguments)).format_help()
    for option in ("--sam_rho", "--packing", "--lora_target_modules", "--train_file"):
        assert option in text

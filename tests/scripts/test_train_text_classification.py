"""The text classification script, from the command line to the saved files."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import datasets
import pytest
import torch
import train_text_classification
from common.cli import InputError, OptionParser, run_script
from common.docstrings import SECTIONS
from train_text_classification import (
    DataArguments,
    ModelArguments,
    TrainArguments,
    encode,
    main,
    train_tokenizer,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    pipeline,
)

ROOT = Path(__file__).parents[2]
SHORT = "--use_cpu --per_device_train_batch_size 8 --save_strategy no"
TINY = f"{SHORT} --config_overrides hidden_size=8,num_hidden_layers=1,num_attention_heads=2"
SMALL = f"{SHORT} --config_overrides hidden_size=16,num_hidden_layers=1,num_attention_heads=2"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, rows: list[dict]) -> str:
    """The options that name the rows as training and evaluation data."""
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return f"--train_file {file} --validation_file {file}"


@pytest.fixture
def animals(tmp_path):
    return write(
        tmp_path,
        [
            {"text": f"number {i}, a {name}", "label": kind}
            for i in range(8)
            for name, kind in (("cat", "pet"), ("lion", "wild"))
        ],
    )


def run(folder: Path, options: str):
    return main([*options.split(), "--output_dir", str(folder)])


def test_the_default_job_trains_on_docstrings_and_saves_all_its_results(
    tmp_path, monkeypatch, capsys
):
    for section, modules in SECTIONS.items():  # all of them take seconds to parse
        monkeypatch.setitem(SECTIONS, section, modules.split()[0])
    runs = run(
        tmp_path,
        f"{TINY} --max_train_samples 40 --max_eval_samples 20 --label_noise 0.5 --max_length 16 "
        "--sam_rho 0.1 --num_train_epochs 1 --eval_strategy epoch --compare_with_plain",
    )
    for name in ("model.safetensors", "tokenizer.json", "all_results.json", "curves.png"):
        assert (tmp_path / name).is_file(), name
    assert (
        "trained from scratch on the docstrings of Python" in (tmp_path / "README.md").read_text()
    )
    results = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert results["runs"][0]["accuracy"] == saved["eval_accuracy"] == runs[0].score
    assert f"docstrings of Python {sys.version.split()[0]}" in results["data"]
    assert "50% label noise: 40 training and 20 test texts, 9 classes" in capsys.readouterr().out
    assert [r.name for r in runs] == ["SAM (rho 0.1)", "AdamW"]
    assert [(r.epochs, r.passes) for r in runs] == [(1.0, 2.0), (2.0, 2.0)]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert list(model.config.id2label.values()) == list(SECTIONS)
    assert model.config.max_position_embeddings == 16


def test_the_saved_model_serves_a_pipeline_with_the_learned_classes(tmp_path, animals):
    options = f"{SMALL} --max_steps 60 --learning_rate 1e-2 --sam_rho 0.01"
    (result,) = run(tmp_path / "out", f"{options} {animals}")
    assert result.score == 1.0
    classify = pipeline("text-classification", model=str(tmp_path / "out"))
    assert [found["label"] for found in classify(["number 3, a lion", "number 5, a cat"])] == [
        "wild",
        "pet",
    ]


def test_a_run_is_repeated_exactly_by_its_seed(tmp_path, animals):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, f"{TINY} {animals} --max_steps 2 --seed {seed}")
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_the_tokenizer_is_the_same_in_every_process_and_reads_any_text(monkeypatch):
    monkeypatch.setattr(train_text_classification, "VOCAB_SIZE", 268)
    tokenizer = train_tokenizer(iter(["Dry rain, frost and sleet"]), max_length=16)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    # Equally frequent pairs: what an unordered trainer merges first would be different each time.
    assert vocabulary[:3] == ["[PAD]", "[CLS]", "[SEP]"]
    assert vocabulary[-9:] == ["ai", "an", "dr", "ee", "fr", "lee", "os", "rai", "slee"]
    tokens = tokenizer("Été 東京")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == "été 東京"


def test_a_run_that_is_resumed_ends_where_it_would_have_ended(tmp_path, animals):
    options = f"{TINY} {animals} --num_train_epochs 2".replace("strategy no", "strategy epoch")
    run(tmp_path / "a", options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-2")
    run(tmp_path / "b", f"{options} --resume_from_checkpoint last")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert saved[0] == saved[1]


def test_a_glue_task_on_local_files_has_its_own_metrics(tmp_path, capsys):
    rows = [
        {"sentence1": f"it rains {i}", "sentence2": ("wet", "dry")[i % 2], "label": i % 2}
        for i in range(12)
    ]
    (result,) = run(
        tmp_path / "out", f"{TINY} {write(tmp_path, rows)} --task_name mrpc --max_steps 2"
    )
    assert list(result.scores) == ["f1", "accuracy"]
    assert "test f1 test accuracy" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pairs = datasets.Dataset.from_dict({"text": ["it"], "text_pair": ["wet"], "labels": [1]})
    encoded = encode(pairs, tokenizer, max_length=16)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] it[SEP] wet[SEP]"
    assert set(encoded[0]["token_type_ids"]) == {0, 1}
    assert set(encoded.column_names) == {*tokenizer.model_input_names, "labels"}


def test_a_regression_learns_the_order_of_its_numbers(tmp_path):
    rows = [{"text": ["bad", "good", "great"][i % 3], "label": i % 3 - 0.5} for i in range(12)]
    options = f"{SMALL} --max_steps 60 --learning_rate 1e-2 --sam_rho 0.01"
    (result,) = run(tmp_path / "out", f"{options} {write(tmp_path, rows)}")
    assert next(iter(result.scores)) == "pearson"
    assert result.score > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)


def test_a_pretrained_model_continues_from_its_weights_in_fp32(tmp_path, animals):
    (first,) = run(tmp_path / "a", f"{TINY} {animals} --max_length 16 --max_steps 3")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    options = f"{SHORT} --model_name_or_path {tmp_path / 'a'} --max_length 16 --max_steps 1"
    (again,) = run(tmp_path / "b", f"{options} {animals} --learning_rate 0")
    assert again.score == first.score  # learning rate 0: the pretrained weights were used
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in stored.parameters()} == {torch.float32}
    with pytest.raises(InputError, match="--max_length 32 is more than the model's 16 tokens"):
        run(tmp_path / "c", f"{options} {animals} --max_length 32")
    three = write(tmp_path, [{"text": "x", "label": label} for label in "abc"])
    with pytest.raises(InputError, match="You set `ignore_mismatched_sizes` to `False`"):
        run(tmp_path / "d", f"{options} {three}")


def test_a_language_model_without_padding_can_classify(tmp_path, animals):
    tokenizer = GPT2Tokenizer().train_new_from_iterator(["a cat and a lion"], 270)
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    options = f"{SHORT} --model_name_or_path {tmp_path / 'gpt2'} --max_length 32 --max_steps 1"
    run(tmp_path / "out", f"{options} {animals}")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model_name_or_path {tmp}/nowhere", "--model_name_or_path: there is no folder"),
        (
            "--config_overrides hidden_size=9,num_attention_heads=2",
            "--config_overrides 'hidden_size=9,num_attention_heads=2': ",
        ),
        ("--sam_rho -1", "sam_rho=-1.0 is not allowed"),
        ("--sam_roh 1", r"unknown option --sam_roh \(did you mean --sam_rho\?\)"),
        ("--task_name rtx", "--task_name.*: invalid choice: 'rtx'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_training(
    tmp_path, animals, options, message
):
    source = "" if "--task_name" in options else animals
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", f"{source} {options.format(tmp=tmp_path)}")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, animals, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("common.cli.logging.disable_progress_bar", lambda: None)
    datasets.disable_progress_bars()
    for options in (
        "--train_file nowhere.csv",
        f"{animals} --label_column kind",
        "--task_name rtx",
        "--sam_rho -1",
        "--max_lenght 9",
    ):
        with pytest.raises(SystemExit) as end:
            run_script(main, [*options.split(), "--output_dir", str(tmp_path / "out")])
        assert end.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert "error: " in output.err and output.err.count("\n") == 1, output.err


def test_the_model_is_pushed_with_its_card_only_if_asked(tmp_path, animals, monkeypatch):
    pushed, repositories = [], []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: repositories.append(1))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **card: pushed.append(card))
    run(tmp_path / "a", f"{TINY} {animals} --max_steps 1")
    assert pushed == repositories == []
    run(tmp_path / "b", f"{TINY} {animals} --max_steps 1 --push_to_hub --compare_with_plain")
    assert len(repositories) == 1  # none for the plain run
    assert pushed[-1]["tasks"] == "text-classification"


def test_a_failed_push_comes_last_and_says_what_to_do(tmp_path, animals, monkeypatch):
    pushes = []

    def fail(self, **card):
        pushes.append(card)
        raise OSError("connection cut")

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(Trainer, "push_to_hub", fail)
    with pytest.raises(
        InputError, match=r"--push_to_hub: connection cut Nothing is lost.*hf upload"
    ):
        run(tmp_path, f"{TINY} {animals} --max_steps 1 --push_to_hub --compare_with_plain")
    assert len(pushes) == 1
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "results.json", "curves.png", "sam_config.json"} <= saved


def test_a_model_that_cannot_be_scored_is_saved_all_the_same(tmp_path, animals, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("Input contains NaN")

    monkeypatch.setattr(Trainer, "evaluate", fail)
    with pytest.raises(ValueError, match="contains NaN"):
        run(tmp_path, f"{TINY} {animals} --max_steps 1")
    assert (tmp_path / "model.safetensors").exists()


def test_the_help_lists_the_options_of_data_model_and_sam():
    text = OptionParser((DataArguments, ModelArguments, TrainArguments)).format_help()
    for option in ("--task_name", "--text_pair_column", "--config_overrides", "--sam_rho"):
        assert option in text


@pytest.mark.parametrize("file", ["stdlib_docstrings", "glue_rte", "trec6_small"])
def test_the_configs_are_valid(file):
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments))
    data_args, model_args, training_args = parser.parse([str(ROOT / "configs" / f"{file}.yaml")])
    assert training_args.sam_rho > 0
    assert training_args.output_dir == f"outputs/{file}"
    assert (data_args.task_name is not None) == (model_args.model_name_or_path is not None)


@pytest.mark.parametrize("option", ["model_name_or_path", "dataset_name"])
@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_name_that_is_a_path_is_not_looked_for_on_the_hub(
    tmp_path, animals, monkeypatch, option, name
):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the Hub was asked"))
    data = "" if option == "dataset_name" else animals
    with pytest.raises(InputError, match=f"--{option}.*there is no folder '{name}'"):
        run(tmp_path / "run", f"--{option} {name} {data} --use_cpu")

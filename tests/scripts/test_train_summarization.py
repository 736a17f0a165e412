"""The summarization script, from the command line to the saved files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from common.lm_data import train_tokenizer
from common.script_utils import InputError, OptionParser
from common.shared_arguments import ModelArguments
from train_summarization import (
    SENTENCE_AND_REST,
    DataArguments,
    TrainArguments,
    build_model,
    docstring_summaries,
    encode,
    main,
)
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
TINY = (
    "--hidden_size 8 --num_hidden_layers 1 --num_attention_heads 2 --use_cpu --save_strategy no "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 512 --max_steps 2"
)
PAIRS = [
    {"text": "It rained all day long.", "summary": "Rain."},
    {"text": "The sun shone and shone.", "summary": "Sun, and more sun."},
] * 4
COLUMNS = {"text": "text", "summary": "summary"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def pairs(tmp_path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


def run(folder: Path, options: str):
    return main([*TINY.split(), *options.split(), "--output_dir", str(folder)])


def test_the_default_job_saves_model_tokenizer_results_and_picture(tmp_path, capsys):
    few = "--max_train_samples 16 --max_eval_samples 8 --sam_rho 0.1 --compare_with_plain"
    runs = run(tmp_path, f"{few} --learning_rate 1e-2")
    for name in ("model.safetensors", "tokenizer.json", "README.md", "curves.png"):
        assert (tmp_path / name).is_file(), name
    assert [r.name for r in runs] == ["SAM (rho 0.1)", "AdamW"]
    assert runs[0].passes == runs[1].passes
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert runs[0].scores == {"loss": saved["eval_loss"]}
    assert "docstrings of Python 3" in capsys.readouterr().out


def test_the_saved_model_has_the_reported_loss(tmp_path, pairs):
    (result,) = run(tmp_path / "out", f"--train_file {pairs} --validation_file {pairs}")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    total = tokens = 0
    for pair in PAIRS[:2]:
        text, labels = (
            torch.tensor([tokenizer(pair[kind])["input_ids"]]) for kind in ("text", "summary")
        )
        with torch.no_grad():
            total += model(text, labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
    assert total / tokens == pytest.approx(result.score, rel=1e-5)


def test_the_model_learns_where_a_summary_ends():
    data = datasets.Dataset.from_list(PAIRS)
    _, tokenizer = build_model(ModelArguments(hidden_size=8), data)
    row = encode(data, tokenizer, DataArguments(max_source_length=5), COLUMNS)[0]
    assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
    assert len(row["input_ids"]) == 5  # cut off, and still with an end
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == "Rain."


def test_a_vocabulary_that_is_too_small_for_all_bytes_is_refused():
    with pytest.raises(InputError, match=r"--vocab_size must be 260 \(all bytes\) .* got 259"):
        train_tokenizer(iter(["text"]), 259)


def test_the_built_in_summaries_are_the_first_sentences_of_docstrings():
    data = docstring_summaries()
    assert len(data) > 1000
    assert all(row["summary"][-1] in ".!?" and len(row["text"]) >= 80 for row in data)
    rest = "It has more to say about it, and it goes on for long enough to need a summary."
    match = SENTENCE_AND_REST.fullmatch(f"Return x, e.g. the sum of it. {rest} Really. Yes.")
    assert match.groups() == ("Return x, e.g. the sum of it.", f"{rest} Really. Yes.")
    assert SENTENCE_AND_REST.fullmatch("Return x and nothing else. Short.") is None


def test_a_run_that_is_resumed_ends_where_it_would_have_ended(tmp_path, pairs):
    options = f"--train_file {pairs} --save_strategy steps --save_steps 1"
    run(tmp_path / "a", options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-1").rename(tmp_path / "b" / "checkpoint-1")
    run(tmp_path / "b", f"{options} --resume_from_checkpoint last")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_generated_summaries_are_scored_by_rouge_l(tmp_path, pairs):
    pytest.importorskip("rouge_score")
    options = f"--train_file {pairs} --validation_file {pairs} --predict_with_generate "
    options += "--generation_max_length 20"
    (result,) = run(
        tmp_path / "out", f"{options} --hidden_size 16 --max_steps 80 --learning_rate 1e-2"
    )
    assert list(result.scores) == ["rouge_l", "loss"]
    assert result.score > 0.9  # there are two summaries to learn


def test_without_rouge_score_generating_is_refused_in_one_line(tmp_path, pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match="pip install rouge-score"):
        run(tmp_path / "out", f"--train_file {pairs} --predict_with_generate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train_file {pairs} --summary_column sumary", r"'sumary' \(did you mean summary\?\)"),
        ("--text_column x", "--text_column has no effect on the built-in docstrings"),
        (
            "--train_file {pairs} --text_column summary",
            "must be two columns, got 'summary' for both",
        ),
        ("--generation_num_beams 2", "--generation_num_beams has no effect without --predict"),
        ("--generation_max_length 9", "--generation_max_length has no effect without --predict"),
        ("--max_target_length 1", "--max_target_length must be 2 or more, got 1"),
        ("--train_file nowhere.csv", "--train_file 'nowhere.csv': there is no such file"),
        ("--train_file {tmp}", "--train_file '.*' is a directory"),
        ("--train_file {tmp}/a.txt {pairs}", "must be of one kind, got json and text"),
        ("--train_file {tmp}/a.csv", "cannot be loaded: .* Expected 2 fields in line 3, saw 3$"),
        ("--train_file {tmp}/none.jsonl", "'summary' of the training examples holds NoneType"),
        ("--train_file {pairs} --model_name_or_path nowhere", "--model_name_or_path 'nowhere'"),
        ("--sam_rho -1", "sam_rho=-1.0 is not allowed"),
    ],
)
def test_bad_input_is_refused_before_the_training(tmp_path, pairs, options, message):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.csv").write_text("text,summary\na,b\nc,d,e\n")
    (tmp_path / "none.jsonl").write_text('{"text": "a", "summary": null}\n' * 5)
    options = options.format(tmp=tmp_path, pairs=pairs)
    with pytest.raises(InputError, match=message):
        main(["--use_cpu", *options.split(), "--output_dir", str(tmp_path / "out")])


def test_the_config_is_valid():
    parser = OptionParser((DataArguments, ModelArguments, TrainArguments))
    _, _, args = parser.parse([str(ROOT / "configs" / "docstring_summaries.yaml")])
    assert args.sam_rho > 0
    assert args.output_dir == "outputs/docstring_summaries"

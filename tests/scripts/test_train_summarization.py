"""The summarization script, from the command line to the saved files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import train_summarization
from common.arguments import ModelArguments
from common.cli import InputError, OptionParser
from train_summarization import (
    SENTENCE_AND_REST,
    SummaryDataArguments,
    TrainArguments,
    build_model,
    docstring_summaries,
    encode,
    main,
)
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
OVERRIDES = "d_model=8,d_kv=4,d_ff=16,num_layers=1,num_heads=2"
TINY = (
    f"--config_overrides {OVERRIDES} --use_cpu --save_strategy no "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 512 --max_steps 2"
)
PAIRS = [
    {"text": "It rained all day long.", "summary": "Rain."},
    {"text": "The sun shone and shone.", "summary": "Sun, and more sun."},
] * 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def pairs(tmp_path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


@pytest.fixture(scope="module")
def summaries() -> datasets.Dataset:
    return docstring_summaries()  # reading them takes seconds


def run(folder: Path, options: str):
    return main([*TINY.split(), *options.split(), "--output_dir", str(folder)])


def test_the_default_job_saves_model_tokenizer_results_and_picture(
    tmp_path, capsys, summaries, monkeypatch
):
    monkeypatch.setattr(train_summarization, "docstring_summaries", lambda: summaries)
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
    _, tokenizer = build_model(ModelArguments(config_overrides=OVERRIDES), data)
    row = encode(data, tokenizer, SummaryDataArguments(max_source_length=5))[0]
    assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
    assert len(row["input_ids"]) == 5  # cut off, and still with an end
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == "Rain."


def test_the_built_in_summaries_are_the_first_sentences_of_docstrings(summaries):
    assert len(summaries) > 1000
    assert all(row["summary"][-1] in ".!?" and len(row["text"]) >= 80 for row in summaries)
    rest = "It has more to say about it, and it goes on for long enough to need a summary."
    match = SENTENCE_AND_REST.fullmatch(f"Return x, e.g. the sum of it. {rest} Really. Yes.")
    assert match.groups() == ("Return x, e.g. the sum of it.", f"{rest} Really. Yes.")
    assert SENTENCE_AND_REST.fullmatch("Return x and nothing else. Short.") is None


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, pairs):
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
        tmp_path / "out",
        f"{options} --config_overrides d_model=16 --max_steps 40 --learning_rate 3e-2",
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
        ("--text_column x", "--text_column has no effect on the built-in examples"),
        ("--generation_num_beams 2", "--generation_num_beams has no effect without --predict"),
        ("--generation_max_length 9", "--generation_max_length has no effect without --predict"),
        ("--max_target_length 1", "--max_target_length must be 2 or more, got 1"),
        ("--train_file {tmp}/none.jsonl", "--summary_column 'summary' holds NoneType, not text"),
        ("--train_file {pairs} --model_name_or_path nowhere", "--model_name_or_path 'nowhere'"),
        (
            "--train_file {pairs} --config_overrides num_layers=two",
            "--config_overrides 'num_layers=two': invalid",
        ),
        ("--sam_rho -1", "sam_rho=-1.0 is not allowed"),
    ],
)
def test_bad_input_is_refused_before_the_training(tmp_path, pairs, options, message):
    (tmp_path / "none.jsonl").write_text('{"text": "a", "summary": null}\n' * 5)
    options = options.format(tmp=tmp_path, pairs=pairs)
    with pytest.raises(InputError, match=message):
        main(["--use_cpu", *options.split(), "--output_dir", str(tmp_path / "out")])


def test_the_config_is_valid():
    parser = OptionParser((SummaryDataArguments, ModelArguments, TrainArguments))
    _, _, args = parser.parse([str(ROOT / "configs" / "docstring_summaries.yaml")])
    assert args.sam_rho > 0
    assert args.output_dir == "outputs/docstring_summaries"

"""The model card says what SAM did, for every trainer, once, and nothing for a plain run."""

from __future__ import annotations

import logging
import re

import pytest
from combinations import MOVING
from hub_server import hub_server, use_hub
from huggingface_hub import ModelCard
from real_models import bert, tokens
from tiny import Rows, arguments
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from sam_hf import SAMConfig, SAMTrainer, SAMTrainingArguments, with_sam
from sam_hf.config.checks import method_options
from sam_hf.methods import METHODS

ASAM = {"sam_method": "asam", "sam_rho": 0.5, "sam_params": r"layer\.\d|classifier"}


def rows(n=8):
    return Rows([{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens(n)])


def bert_trainer(folder, sam, trainer_class=SAMTrainer, args_class=None, model=None, **args):
    args_class = {} if args_class is None else {"args_class": args_class}
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch"}
    return trainer_class(
        model=bert() if model is None else model,
        args=arguments(output_dir=str(folder), **args_class, **(saving | args)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        sam_config=None if sam is None else SAMConfig(**sam),
    )


def seq2seq_trainer(folder, sam):
    return bert_trainer(folder, sam, with_sam(Seq2SeqTrainer), Seq2SeqTrainingArguments)


def peft_trainer(folder, sam):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    return bert_trainer(folder, sam, model=peft.get_peft_model(bert(), lora))


def sft_trainer(folder, sam, **args):
    pytest.importorskip("trl")
    from text_trainers import TRL, build

    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    return build(TRL["sft"], sam, output_dir=str(folder), **saving, **args)


def sentence_trainer(folder, sam, **args):
    st = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from text_trainers import TEXTS, tokenizer

    embedding = StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=8)
    model = st.SentenceTransformer(modules=[embedding], device="cpu")
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    return with_sam(st.SentenceTransformerTrainer)(
        model=model,
        args=arguments(
            st.SentenceTransformerTrainingArguments, output_dir=str(folder), **saving, **args
        ),
        train_dataset=Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
        sam_config=SAMConfig(**sam),
    )


def tables(text):
    """First cell -> the others, of all tables in the section of SAM."""
    section = text.split("## Sharpness-aware minimization")[1]
    cells = [
        [cell.strip(" `") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


def test_the_card_holds_settings_layout_metrics_readings_and_the_citation(tmp_path):
    trainer = bert_trainer(tmp_path, ASAM, gradient_accumulation_steps=2)
    trainer.train()
    trainer.create_model_card(tags="mine", license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"mine", "generated_from_trainer", "asam", "sharpness-aware-minimization"} == set(
        card.data.tags
    )
    assert card.data.license == "mit"

    cells = tables(card.text)
    assert "| `sam_rho` | `0.5` |" in card.text and cells["sam_method"] == ["asam"]
    assert cells["sam_rho"] == ["0.5", "2", "radius of the update"]
    assert cells["sam_eta"] == ["0.01"] and cells["sam_params"] == [r"layer\.\d\|classifier"]
    unused = {*trainer.sam_config.options_without_effect(), "sam_method_args"}
    assert trainer.sam_config.to_sam_dict().keys() - unused <= cells.keys()
    assert not unused & cells.keys()
    assert cells["distributed type"] == ["NO"] and cells["processes"] == ["1"]
    assert cells["device"] == ["cpu"] and cells["mixed precision"] == ["no"]
    assert cells["micro-batch size"] == ["4"] and cells["examples per update"] == ["8"]

    history = trainer.state.log_history
    last = [entry for entry in history if "loss" in entry][-1]
    evaluated = [entry for entry in history if "eval_loss" in entry][-1]
    for name in [name for name in last if name.startswith("sam_")] + ["loss"]:
        assert cells[name][:2] == [f"{last[name]:.4g}", "2"]
    assert "sam_sharpness" in cells and "share of" in cells["sam_share_norms"][2]
    for name in ("eval_loss", "eval_accuracy"):
        assert cells[name] == [f"{evaluated[name]:.4g}", "2"]
    assert "eval_runtime" not in cells
    assert 'SAMConfig.from_pretrained("' in card.text
    assert METHODS["asam"].citation in card.text and METHODS["sam"].citation not in card.text


@pytest.mark.parametrize("method", MOVING)
def test_the_card_of_a_method_cites_its_paper_and_leaves_out_the_options_of_others(
    method, tmp_path
):
    trainer = bert_trainer(
        tmp_path,
        None,
        args_class=SAMTrainingArguments,
        hub_model_id="me/tiny",
        sam_rho=0.02,
        sam_method=method,
    )
    trainer.create_model_card()  # without a run there are no metrics, and no readings
    card = ModelCard.load(tmp_path / "README.md")
    cells = tables(card.text)
    assert cells["sam_rho"] == ["0.02"] and not {"sam_sharpness", "loss"} & cells.keys()
    options = {name: field.default for name, field in method_options(METHODS[method]).items()}
    assert cells.get("sam_method_args") == ([str(options)] if options else None)
    assert ("sam_eta" in cells) == ("sam_adaptive_scope" in cells) == (method == "asam")
    assert [name for name in METHODS if name in card.data.tags] == [method]
    cited = [name for name, each in METHODS.items() if each.citation in card.text]
    assert cited == [method]
    assert 'SAMConfig.from_pretrained("me/tiny")' in card.text


@pytest.mark.parametrize(
    "build", [bert_trainer, seq2seq_trainer, peft_trainer, sft_trainer, sentence_trainer]
)
def test_the_card_of_every_trainer_gets_the_section_once_and_keeps_its_own_text(build, tmp_path):
    trainer = build(tmp_path, ASAM | {"sam_params": "all"})
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    first = ModelCard.load(tmp_path / "README.md")
    trainer.create_model_card()  # a second time, over the first
    cards = [ModelCard.load(tmp_path / "README.md")]
    if build in (peft_trainer, sentence_trainer):  # these save a card with every model
        cards.append(ModelCard.load(tmp_path / "checkpoint-2" / "README.md"))
    for card in cards:
        assert card.text.count("## Sharpness-aware minimization") == 1
        assert {"asam", "sharpness-aware-minimization"} <= set(card.data.tags)
        assert "| `sam_rho` | `0.5` |" in card.text
    strip = re.compile(r"\*\*.*seconds")  # the sentence transformers' card tells the time
    assert strip.sub("", cards[0].content) == strip.sub("", first.content)
    own = {"sft_trainer": "TRL", "sentence_trainer": "SentenceTransformer"}.get(build.__name__)
    assert (own or "Training procedure") in cards[0].text
    if build is peft_trainer:
        assert cards[0].data.library_name == "peft"


@pytest.mark.parametrize("build", [sft_trainer, sentence_trainer])
def test_trainers_that_push_in_their_own_way_push_card_and_settings(build, tmp_path, monkeypatch):
    with hub_server() as server:
        use_hub(monkeypatch, server.url, str(tmp_path / "cache"))
        pushing = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_strategy": "every_save"}
        trainer = build(tmp_path / "out", ASAM | {"sam_params": "all"}, **pushing)
        trainer.train()
        files = server.repositories["me/tiny"].files
        assert tables(files["README.md"].decode())["sam_method"] == ["asam"]
        assert "model.safetensors" in files
        assert SAMConfig.from_pretrained("me/tiny") == trainer.sam_config


def test_a_new_section_takes_the_place_of_the_old_one_and_leaves_what_stands_around_it(tmp_path):
    trainer = bert_trainer(tmp_path, ASAM)
    trainer.create_model_card()
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## My notes\n\nkept | \\1\n")
    trainer.sam_config.sam_rho = 0.25
    trainer._sam_update_card(tmp_path)
    text = path.read_text()
    assert text.count("sam_hf: begin") == 1 and text.endswith("\n## My notes\n\nkept | \\1\n")
    assert tables(text)["sam_rho"] == ["0.25"] and text.count("- asam") == 1


def test_the_card_of_a_plain_run_is_that_of_the_trainer(tmp_path):
    trainer = bert_trainer(tmp_path, {"sam_rho": 0.0})
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    Trainer.create_model_card(trainer)
    assert card == (tmp_path / "README.md").read_text()


def test_only_the_first_process_writes_a_card(tmp_path, monkeypatch):
    trainer = bert_trainer(tmp_path, ASAM)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_a_readme_that_saving_did_not_write_stays_as_it_is(tmp_path):
    text = "# My project\n\nNotes.\n"
    (tmp_path / "README.md").write_text(text)
    trainer = bert_trainer(tmp_path, ASAM)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("card", [b"---\na: [\n---\n# x\n", "# naïve\n".encode("latin-1")])
def test_a_card_that_cannot_be_read_is_left_with_a_warning(tmp_path, card, caplog):
    trainer = bert_trainer(tmp_path, ASAM)
    (tmp_path / "README.md").write_bytes(card)
    with caplog.at_level(logging.WARNING, logger="sam_hf"):
        trainer._sam_update_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == card
    assert "cannot be read as a model card" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"README.md"}


def test_a_plain_run_takes_the_section_of_an_earlier_one_out_of_the_card(tmp_path):
    peft_trainer(tmp_path, ASAM | {"sam_params": "all"}).save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert "asam" in card.data.tags and "sam_hf: begin" in card.content
    tags = card.data.tags
    peft_trainer(tmp_path, {"sam_rho": 0.0}).save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == [t for t in tags if t not in ("asam", "sharpness-aware-minimization")]
    assert "sam_hf" not in card.content and "Sharpness" not in card.content


def test_a_line_break_or_a_bar_in_an_option_does_not_end_the_cell(tmp_path):
    trainer = bert_trainer(tmp_path, ASAM | {"sam_params": "(?x) layer\n|classifier"})
    trainer.create_model_card()
    cells = tables((tmp_path / "README.md").read_text())
    assert cells["sam_params"] == [r"(?x) layer \|classifier"]

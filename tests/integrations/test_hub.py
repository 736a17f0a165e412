"""The real client, over HTTP, against a Hub on loopback: what arrives is what was saved."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import transformers as hf
from hub_server import LARGE, PART, hub_server, use_hub
from huggingface_hub.errors import HfHubHTTPError
from real_models import bert, tokens
from safetensors.torch import load_file
from tiny import Rows, arguments, assert_same_bits, weights
from transformers import Trainer, TrainerCallback

from sam_hf import SAMConfig, SAMTrainer, SAMTrainingArguments
from sam_hf.compat import upload_exclusions

NAME = "me/tiny-bert"
LEFT_OUT = shlex.join(upload_exclusions("checkpoint-*", "_*"))
IS_PRIVATE = "private" in inspect.signature(Trainer.push_to_hub).parameters
OPTIONS = {"sam_method": "asam", "sam_rho": 0.5, "sam_eta": 0.1, "sam_params": "encoder|classifier"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server() as server:
        use_hub(monkeypatch, server.url, str(tmp_path / "cache"))
        yield server
    assert not server.unknown


def wait_for_pushes():
    """Pushes in the background share one thread: what is queued now runs after all of them."""
    # The client of the pushes: older versions use that of huggingface_hub.
    client = getattr(hf.utils.hub, "hf_api", lambda: huggingface_hub.hf_api.api)()
    client.run_as_future(int).result()


class WaitsForPushes(TrainerCallback):
    """Else a save finds the push of the one before at work, and is not pushed itself."""

    def on_save(self, *args, **kwargs):
        wait_for_pushes()


def rows(n=8):
    return Rows([{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens(n)])


def pushing_trainer(folder, strategy="end", sam=None, callbacks=(WaitsForPushes,), **args):
    args = {"push_to_hub": True, "hub_model_id": NAME, "hub_strategy": strategy} | args
    return SAMTrainer(
        model=bert(),
        args=arguments(
            output_dir=str(folder), max_steps=2, save_strategy="steps", save_steps=1, **args
        ),
        train_dataset=rows(),
        sam_config=SAMConfig(**(OPTIONS if sam is None else sam)),
        callbacks=[callback() for callback in callbacks],
    )


def files(folder, skip="checkpoint-"):
    """The content of each file, by its path."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file()]
    named = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return {name: x for name, x in named.items() if not name.startswith(skip)}


def in_folder(repository, folder):
    start = f"{folder}/"
    return {p.removeprefix(start): x for p, x in repository.files.items() if p.startswith(start)}


# ---- What arrives --------------------------------------------------------------------------------


def test_a_push_at_the_end_brings_every_file_byte_for_byte(hub, tmp_path):
    trainer = pushing_trainer(tmp_path / "out")
    trainer.train()
    assert hub.repositories[NAME].files == {}
    trainer.push_to_hub()

    arrived = hub.repositories[NAME].files
    assert arrived == files(tmp_path / "out")
    assert {"README.md", "config.json", "model.safetensors", "sam_config.json"} <= arrived.keys()
    # all the ways were taken: in the commit, as a large file, and in parts
    sizes = sorted(len(content) for content in arrived.values())
    assert sizes[0] < LARGE and sizes[-1] > PART
    large = {request.rsplit("/", 1)[1] for request in hub.requests if "PUT /large/" in request}
    assert {"1", "2"} <= large


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_each_save_is_pushed_byte_for_byte(hub, tmp_path, strategy):
    trainer = pushing_trainer(tmp_path / "out", strategy)
    trainer.train()

    repository = hub.repositories[NAME]
    checkpoints = {
        name: files(tmp_path / "out" / name) for name in ("checkpoint-1", "checkpoint-2")
    }
    expected = files(tmp_path / "out")
    for name in ("sam_config.json", "model.safetensors", "config.json"):
        assert expected[name] == checkpoints["checkpoint-2"][name]
    assert "## Sharpness-aware minimization" in expected["README.md"].decode()
    if strategy == "checkpoint":
        expected |= {f"last-checkpoint/{p}": x for p, x in checkpoints["checkpoint-2"].items()}
    if strategy == "all_checkpoints":
        expected |= {f"{n}/{p}": x for n, c in checkpoints.items() for p, x in c.items()}
    assert repository.files == expected
    saves = [message for message in repository.messages if "step" in message]
    assert len(saves) == (2 if strategy == "every_save" else 4)


def test_a_pushed_model_comes_back_and_trains_on_with_its_settings(hub, tmp_path):
    trainer = pushing_trainer(tmp_path / "out")
    trainer.train()
    trainer.push_to_hub()

    model = hf.BertForSequenceClassification.from_pretrained(NAME, dtype="float64")
    sam_config = SAMConfig.from_pretrained(NAME)
    assert sam_config == SAMConfig(**OPTIONS)
    assert_same_bits(model, weights(trainer.model))

    def one_update(model, sam_config):
        hf.set_seed(1)
        args = arguments(max_steps=1)
        SAMTrainer(model=model, args=args, train_dataset=rows(), sam_config=sam_config).train()
        return model

    plain = one_update(
        hf.BertForSequenceClassification.from_pretrained(NAME, dtype="float64"),
        SAMConfig(sam_rho=0),
    )
    expected = weights(one_update(trainer.model, SAMConfig(**OPTIONS)))
    assert_same_bits(one_update(model, sam_config), expected)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_bits(plain, expected)


def test_a_plain_run_claims_nothing_and_leaves_no_settings_of_an_earlier_one(hub, tmp_path):
    pushing_trainer(tmp_path / "out", "every_save").train()
    trainer = pushing_trainer(tmp_path / "out", sam={"sam_rho": 0.0})
    trainer.train()
    trainer.push_to_hub()
    card = hub.repositories[NAME].files["README.md"].decode()
    assert "harpness" not in card and "- sam" not in card
    assert SAMConfig.from_pretrained(NAME).sam_rho == 0


def test_what_is_being_pushed_is_left_alone_by_the_saves_in_between(hub, tmp_path):
    cards = []

    class Looks(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            cards.append((tmp_path / "out" / "README.md").read_bytes())
            if state.global_step == 2:
                hub.may_commit.set()

    hub.may_commit.clear()
    trainer = pushing_trainer(tmp_path / "out", "every_save", callbacks=[Looks])
    trainer.train()
    assert len(cards) == 2 and cards[0] == cards[1] == hub.repositories[NAME].files["README.md"]


# ---- What fails ----------------------------------------------------------------------------------


def upload_again(hub, command, home):
    """Run the command that a message gives."""
    hub.broken.clear()
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HOME"] = str(home)
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "error"), [("commit", HfHubHTTPError), ("upload", RuntimeError)], ids=str
)
def test_a_failed_push_loses_nothing_and_says_what_to_do(hub, tmp_path, fault, error):
    folder = tmp_path / "out put"
    trainer = pushing_trainer(folder)
    trainer.train()
    before = files(folder, skip="#")
    hub.broken.add(fault)
    with pytest.raises(error) as caught:
        trainer.push_to_hub()

    assert hub.repositories[NAME].files == {}
    after = files(folder, skip="#")
    assert before.items() <= after.items()
    assert {name for name in after if name not in before} >= {"README.md", "model.safetensors"}
    expected = weights(trainer.model)
    saved = load_file(folder / "model.safetensors")
    assert all((saved[name] == expected[name]).all() for name in saved)
    (note,) = caught.value.__notes__
    assert note.startswith(f"Nothing is lost: the model is saved in {str(folder)!r}.")
    if fault == "commit":
        upload_again(hub, note.split("run: ")[1], tmp_path)
    else:
        hub.broken.clear()
        trainer.push_to_hub()
    assert hub.repositories[NAME].files == files(folder)


def test_a_model_is_saved_when_its_repository_cannot_be_made(hub, tmp_path):
    trainer = pushing_trainer(tmp_path / "out", push_to_hub=False)
    trainer.train()
    hub.broken.add("create")
    with pytest.raises(HfHubHTTPError) as caught:
        trainer.push_to_hub()
    assert {"model.safetensors", "sam_config.json"} <= files(tmp_path / "out").keys()
    assert f"hf upload {NAME} {tmp_path / 'out'} ." in caught.value.__notes__[0]


@pytest.mark.parametrize("private", [None, True, False] if IS_PRIVATE else [None])
def test_the_command_for_a_failed_push_keeps_what_was_asked_for(hub, tmp_path, private):
    trainer = pushing_trainer(tmp_path / "out", hub_private_repo=None if private else True)
    given = {"private": private} if IS_PRIVATE else {}
    hub.broken.add("commit")
    with pytest.raises(HfHubHTTPError) as caught:
        trainer.push_to_hub("A message", True, None, "main", **given)
    command = caught.value.__notes__[0].split("run: ")[1]
    expected = f"hf upload {NAME} {tmp_path / 'out'} . {LEFT_OUT} --revision main"
    assert command == expected + ("" if private is False else " --private")


def test_a_save_that_fails_is_not_said_to_be_safe(hub, tmp_path, monkeypatch):
    trainer = pushing_trainer(tmp_path / "out")
    trainer.save_model(_internal_call=True)  # that one, the failed one may have overwritten

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer.push_to_hub()
    assert not hasattr(caught.value, "__notes__")


def test_training_goes_on_when_a_push_in_the_background_fails(hub, tmp_path, caplog):
    hub.broken.add("commit")
    trainer = pushing_trainer(tmp_path / "out", "checkpoint", hub_revision="main")
    with caplog.at_level(logging.WARNING, logger="sam_hf"):
        trainer.train()
        wait_for_pushes()

    assert trainer.state.global_step == 2 and hub.repositories[NAME].files == {}
    warnings = [r.getMessage() for r in caplog.records if r.name == "sam_hf.hub.publishing"]
    assert len(warnings) == 4 and all("\n" not in w and "500" in w for w in warnings)
    model, checkpoint = (w.split("run: ")[1] for w in warnings[2:])
    folder = tmp_path / "out"
    assert model == f"hf upload {NAME} {folder} . {LEFT_OUT} --revision main"
    assert checkpoint == f"hf upload {NAME} {folder}/checkpoint-2 last-checkpoint --revision main"
    upload_again(hub, checkpoint, tmp_path)
    assert in_folder(hub.repositories[NAME], "last-checkpoint") == files(folder / "checkpoint-2")


def test_a_push_that_nobody_waits_for_tells_that_it_failed(hub, tmp_path, caplog):
    trainer = pushing_trainer(tmp_path / "out")
    hub.broken.add("commit")
    with caplog.at_level(logging.WARNING, logger="sam_hf"):
        with pytest.raises(HfHubHTTPError):
            trainer.push_to_hub(blocking=False).result()
        wait_for_pushes()
    assert f"hf upload {NAME} " in caplog.text


# ---- sam_config.json -----------------------------------------------------------------------------


def test_settings_come_back_from_a_folder_with_what_the_caller_replaces(tmp_path):
    SAMConfig(**OPTIONS).save_pretrained(tmp_path / "new" / "folder")
    saved = json.loads((tmp_path / "new" / "folder" / "sam_config.json").read_text())
    assert saved["sam_hf_version"] and saved["sam_params"] == OPTIONS["sam_params"]
    read = SAMConfig.from_pretrained(tmp_path / "new" / "folder", sam_rho=2.0)
    assert read == SAMConfig(**OPTIONS | {"sam_rho": 2.0})
    with pytest.raises(TypeError, match="sam_roh"):
        SAMConfig.from_pretrained(tmp_path / "new" / "folder", sam_roh=2.0)


def test_training_arguments_save_and_read_the_fields_of_sam_alone(tmp_path):
    args = arguments(SAMTrainingArguments, learning_rate=0.5, **OPTIONS)
    args.save_pretrained(tmp_path)
    assert "learning_rate" not in (tmp_path / "sam_config.json").read_text()
    read = SAMTrainingArguments.from_pretrained(tmp_path)
    assert type(read) is SAMConfig and read == SAMConfig(**OPTIONS)
    assert arguments(SAMTrainingArguments, **read.to_sam_dict()).sam_rho == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sam_rho": 0.1, "sam_lr": 1, "sam_hf_version": "9.9"}', r"'sam_lr'.*9\.9"),
        ('{"sam_rho": 0.', "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
        ("[1]", r"\[1\].*JSON object"),
        ('{"sam_rho": -1}', "sam_rho=-1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "sam_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        SAMConfig.from_pretrained(tmp_path)
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any(str(tmp_path / "sam_config.json") in line for line in said)


@pytest.mark.parametrize("where", ["folder", "hub", "offline"])
def test_a_missing_file_is_told_in_one_line_with_what_was_looked_for(
    hub, tmp_path, monkeypatch, where
):
    name = {"folder": str(tmp_path), "hub": "me/unknown", "offline": "me/unknown"}[where]
    if where == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        SAMConfig.from_pretrained(name)
    assert str(caught.value).startswith(f"sam_config.json could not be read from {name!r}")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_file_of_before(tmp_path, monkeypatch):
    SAMConfig(sam_rho=0.1).save_pretrained(tmp_path)

    def half(path, text, **kwargs):
        with open(path, "w") as file:
            file.write(text[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        SAMConfig(sam_rho=0.2).save_pretrained(tmp_path)
    assert SAMConfig.from_pretrained(tmp_path).sam_rho == 0.1
    assert os.listdir(tmp_path) == ["sam_config.json"]

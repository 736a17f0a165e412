"""From which checkpoint a training resumes, and when it is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from common.cli import InputError
from common.resuming import prepare, require_writable, write_settings
from train_image_classification import DataArguments, main

from sam_hf import SAMTrainingArguments
from sam_hf.config.file import changed_since


def resume(
    folder: Path, asked: str | None = "last", data: DataArguments | None = None, **options: Any
) -> str | None:
    options = {"resume_from_checkpoint": asked, "num_train_epochs": 4.0, **options}
    args = SAMTrainingArguments(str(folder), **options)
    args.torch_num_threads = None
    return prepare(args, data or DataArguments())


def save_checkpoint(folder: Path, step: int, **options: Any) -> Path:
    """A checkpoint of a run of 12 updates in 3 epochs, with its settings."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    state = {"global_step": step, "max_steps": 12, "num_train_epochs": 3, "epoch": step / 4}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write_settings(SAMTrainingArguments(str(folder), **options), DataArguments())
    return checkpoint


def test_last_is_the_newest_checkpoint_and_a_fresh_run_does_not_mix_with_it(tmp_path):
    assert resume(tmp_path, None) is None
    for newest in ("last", "True"):
        with pytest.raises(InputError, match=f"checkpoint {newest}: no checkpoint in"):
            resume(tmp_path, newest)
    for step in (5, 10):
        save_checkpoint(tmp_path, step)
    for newest in ("last", "True", "true"):
        assert resume(tmp_path, newest) == str(tmp_path / "checkpoint-10")
    assert resume(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="holds checkpoint-10 of an earlier run"):
        resume(tmp_path, None)
    with pytest.raises(InputError, match=f"--resume_from_checkpoint {tmp_path}: no checkpoint"):
        resume(tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [["--train_file", "nowhere.parquet"], ["--config_overrides", "image_size=7,patch_size=2"]],
)
def test_a_start_that_is_refused_leaves_nothing(tmp_path, options):
    with pytest.raises(InputError):
        main([*options, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    no_place = [tmp_path / "file" / "folder"]
    if sys.platform == "linux":
        no_place.append(Path("/proc/self"))  # not even root can write to it
    for folder in no_place:
        with pytest.raises(InputError, match=r"--output_dir .* cannot be used"):
            require_writable(str(folder))
    require_writable(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_an_incomplete_checkpoint_is_skipped(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(InputError, match="no checkpoint in"):
        resume(tmp_path)
    save_checkpoint(tmp_path, 5)
    assert resume(tmp_path) == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="holds checkpoint-10 of an earlier run"):
        resume(tmp_path, None)


@pytest.mark.parametrize(
    ("step", "options", "said"),
    [
        (
            12,
            {"num_train_epochs": 3.0},
            "--num_train_epochs 3: .*checkpoint-12 has already reached it",
        ),
        (10, {"num_train_epochs": 2.5}, "--num_train_epochs 2.5: .*checkpoint-10 has"),
        (8, {"max_steps": 8}, "--max_steps 8: "),
        (8, {"max_steps": 4}, "--max_steps 4: "),
        (8, {"num_train_epochs": 3.0}, None),
        (12, {"num_train_epochs": 4.0}, None),
        (8, {"max_steps": 9}, None),
    ],
)
def test_a_finished_run_is_not_resumed(tmp_path, step, options, said):
    checkpoint = save_checkpoint(tmp_path, step)
    if said is None:
        assert resume(tmp_path, **options) == str(checkpoint)
        return
    with pytest.raises(InputError, match=said):
        resume(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 0.1}, ": learning_rate was 5e-05 and is 0.1, which a resumed"),
        ({"optim": "sgd"}, ": optim was adamw_torch.* and is sgd"),
        ({"optim_args": "eps=1e-6"}, ": optim_args was None and is eps=1e-6"),
        ({"seed": 7}, ": seed was 42 and is 7"),
        ({"data_seed": 7}, ": data_seed was 42 and is 7"),
        ({"dataloader_drop_last": True}, ": dataloader_drop_last was False and is True"),
        ({"per_device_train_batch_size": 3}, ": batch size of an update was 8 and is 3"),
        ({"data": DataArguments(max_train_samples=24)}, ": max_train_samples was None and is 24"),
        ({"data": DataArguments(label_noise=0.4)}, ": label_noise was 0.0 and is 0.4"),
    ],
)
def test_options_that_a_resumed_run_would_ignore_or_mix_are_refused(tmp_path, options, said):
    save_checkpoint(tmp_path, 8)
    with pytest.raises(InputError, match=said):
        resume(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_epochs": 5.0, "logging_steps": 3, "sam_rho": 0.5},
        {"data_seed": 42},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"data": DataArguments(max_eval_samples=9)},
    ],
)
def test_options_that_mean_the_same_or_may_change_are_accepted(tmp_path, options):
    checkpoint = save_checkpoint(tmp_path, 8)
    assert resume(tmp_path, **options) == str(checkpoint)


def test_a_checkpoint_without_settings_is_accepted(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 8)
    (tmp_path / "training_settings.json").unlink()
    assert resume(tmp_path, seed=7) == str(checkpoint)


TINY = "--max_train_samples 32 --per_device_train_batch_size 16 --disable_tqdm true --use_cpu"
TINY += " --save_strategy epoch --save_total_limit 1 --logging_steps 1 --config_overrides"
TINY += " hidden_size={},num_hidden_layers=1,num_attention_heads=1,intermediate_size=8"


def test_another_model_is_refused_and_another_radius_is_warned_of(tmp_path, recwarn):
    options = [*TINY.format(8).split(), "--output_dir", str(tmp_path), "--num_train_epochs"]
    main([*options, "1", "--sam_rho", "0.1"])
    results = (tmp_path / "results.json").read_bytes()
    again = [*options, "2", "--resume_from_checkpoint", "last"]
    with pytest.raises(InputError, match="checkpoint-2 cannot be loaded into the model"):
        main([*again, "--sam_rho", "0.1", *TINY.format(16).split()])
    with pytest.raises(InputError, match="checkpoint-2: seed was 42 and is 7"):
        main([*again, "--sam_rho", "0.1", "--seed", "7"])
    assert (tmp_path / "results.json").read_bytes() == results  # those of the run that finished
    recwarn.clear()
    main([*again, "--sam_rho", "0.2"])
    said = [str(w.message) for w in recwarn if "SAM options that differ" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("the checkpoint's: sam_rho was 0.1 and is 0.2.")
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="checkpoint-4 cannot be loaded"):
        main([*options, "4", "--resume_from_checkpoint", "last", "--sam_rho", "0.2"])


@pytest.mark.parametrize("content", ["[]", "3", "not JSON", '{"sam_rho": 0.1}'])
def test_options_of_a_checkpoint_that_cannot_be_read_are_not_compared(tmp_path, content):
    (tmp_path / "sam_config.json").write_text(content)
    assert changed_since(tmp_path, {"sam_rho": 0.1, "sam_eta": 0.0}) == []

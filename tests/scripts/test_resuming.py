"""From which checkpoint the scripts go on, and with what they do not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from common.image_arguments import DataArguments
from common.resuming import SETTINGS_NAME, checkpoint_to_resume, write_settings
from common.script_utils import InputError
from train_image_classification import main

from sam_hf import SAMTrainingArguments
from sam_hf.config.file import changed_since


def resume(folder: Path, asked: str | None, **options: Any) -> str | None:
    args = {"max_steps": -1, "num_train_epochs": 4.0, **options}
    return checkpoint_to_resume(
        SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=asked, **args), None
    )


def save_checkpoint(folder: Path, step: int) -> Path:
    """Of a run of 12 updates in 3 epochs."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    state = {"global_step": step, "max_steps": 12, "num_train_epochs": 3, "epoch": step / 4}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
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
    with pytest.raises(InputError, match="is neither a checkpoint nor True"):
        resume(tmp_path, str(tmp_path))


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    for options in (
        ["--train_file", "nowhere.parquet"],
        ["--image_size", "7", "--patch_size", "2"],
    ):
        with pytest.raises(InputError):
            main([*options, "--output_dir", str(folder)])
        assert not folder.exists()


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint in"):
        resume(tmp_path, "last")
    save_checkpoint(tmp_path, 5)
    with pytest.warns(UserWarning, match="checkpoint-10 is not complete: going on from checkpoi"):
        assert resume(tmp_path, "last") == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="holds checkpoint-10 of an earlier run"):
        resume(tmp_path, None)


@pytest.mark.parametrize(
    ("step", "options", "said"),
    [
        (12, {"num_train_epochs": 3.0}, r"update 12 \(epoch 3\), and --num_train_epochs 3 ends"),
        (10, {"num_train_epochs": 2.5}, r"--num_train_epochs 2.5 ends the training"),
        (8, {"max_steps": 8}, r"--max_steps 8 ends"),
        (8, {"max_steps": 4}, r"--max_steps 4 ends"),
        (8, {"num_train_epochs": 3.0}, None),
        (12, {"num_train_epochs": 4.0}, None),
        (8, {"max_steps": 9}, None),
    ],
)
def test_a_run_that_is_finished_is_not_gone_on_with(tmp_path, step, options, said):
    checkpoint = save_checkpoint(tmp_path, step)
    if said is None:
        assert resume(tmp_path, "last", **options) == str(checkpoint)
        return
    with pytest.raises(InputError, match=said):
        resume(tmp_path, "last", **options)


def begin(folder: Path, data: DataArguments | None = None, **options: Any) -> Path:
    """Of a training that has begun, with a checkpoint of it."""
    checkpoint = save_checkpoint(folder, 8)
    (checkpoint / "optimizer.pt").touch()
    write_settings(SAMTrainingArguments(str(folder), **options), asdict(data or DataArguments()))
    return checkpoint


def go_on(folder: Path, data: DataArguments | None = None, **options: Any) -> str | None:
    options = {"resume_from_checkpoint": "last", "num_train_epochs": 4.0} | options
    args = SAMTrainingArguments(str(folder), **options)
    return checkpoint_to_resume(args, data or DataArguments())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 0.1}, "--learning_rate 0.1: .* was made with 5e-05, and the optimizer"),
        ({"optim": "sgd"}, "--optim sgd: .* was made with adamw_torch, and the optimizer"),
        ({"optim_args": "eps=1e-6"}, "--optim_args eps=1e-6: .* was made with None"),
        ({"seed": 7}, "--seed 7: .* was made with 42, and the rest"),
        ({"data_seed": 7}, "--data_seed 7: .* was made with 42, and the rest"),
        ({"dataloader_drop_last": True}, "--dataloader_drop_last True: .* was made with False"),
        ({"per_device_train_batch_size": 3}, "3 examples an update .* was made with 8"),
    ],
)
def test_what_a_checkpoint_would_overrule_or_see_otherwise_is_refused(tmp_path, options, said):
    begin(tmp_path)
    with pytest.raises(InputError, match=said):
        go_on(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_epochs": 5.0, "logging_steps": 3, "sam_rho": 0.5},
        {"data_seed": 42, "optim_args": "", "optim": "adamw_torch"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_what_means_the_same_or_may_change_is_taken(tmp_path, options):
    checkpoint = begin(tmp_path)
    assert go_on(tmp_path, **options) == str(checkpoint)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataArguments(max_train_samples=24), "--max_train_samples 24: .* was made with None"),
        (DataArguments(label_noise=0.4), "--label_noise 0.4: .* was made with 0.0"),
        (DataArguments(max_eval_samples=9), None),
    ],
)
def test_other_training_data_are_refused(tmp_path, data, said):
    checkpoint = begin(tmp_path)
    if said is None:
        assert go_on(tmp_path, data) == str(checkpoint)
        return
    with pytest.raises(InputError, match=said):
        go_on(tmp_path, data)


def test_without_its_state_an_optimizer_may_be_another(tmp_path):
    checkpoint = begin(tmp_path)
    (checkpoint / "optimizer.pt").unlink()  # --save_only_model true
    assert go_on(tmp_path, optim="sgd", learning_rate=0.1) == str(checkpoint)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_settings_that_cannot_be_read_are_not_compared(tmp_path, content):
    checkpoint = save_checkpoint(tmp_path, 8)
    if content is not None:
        (tmp_path / SETTINGS_NAME).write_text(content)
    assert go_on(tmp_path, seed=7) == str(checkpoint)


TINY = "--hidden_size 8 --num_hidden_layers 1 --num_attention_heads 1 --intermediate_size 8"
TINY += " --max_train_samples 32 --per_device_train_batch_size 16 --disable_tqdm true --use_cpu"
TINY += " --save_strategy epoch --save_total_limit 1 --logging_steps 1"


def test_a_checkpoint_of_another_model_and_another_radius_are_told(tmp_path, recwarn):
    options = f"{TINY} --output_dir {tmp_path} --num_train_epochs"
    main([*options.split(), "1", "--sam_rho", "0.1"])
    results = (tmp_path / "results.json").read_bytes()
    again = [*options.split(), "2", "--resume_from_checkpoint", "last"]
    with pytest.raises(InputError, match="checkpoint-2 cannot be loaded into the model"):
        main([*again, "--sam_rho", "0.1", "--hidden_size", "16"])
    with pytest.raises(InputError, match=r"--seed 7: .*checkpoint-2 was made with 42"):
        main([*again, "--sam_rho", "0.1", "--seed", "7"])
    assert (tmp_path / "results.json").read_bytes() == results  # those of the run that was finished
    recwarn.clear()
    main([*again, "--sam_rho", "0.2"])
    said = [str(w.message) for w in recwarn if "SAM options that differ" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("the checkpoint's: sam_rho was 0.1 and is 0.2.")
    recwarn.clear()
    main([*options.split(), "3", "--resume_from_checkpoint", "last", "--sam_rho", "0.2"])
    assert not [w for w in recwarn if "SAM options that differ" in str(w.message)]
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="checkpoint-6 cannot be loaded"):
        main([*options.split(), "4", "--resume_from_checkpoint", "last", "--sam_rho", "0.2"])


@pytest.mark.parametrize("content", ["[]", "3", "not JSON", '{"sam_rho": 0.1}'])
def test_options_of_a_checkpoint_that_cannot_be_read_are_not_compared(tmp_path, content):
    (tmp_path / "sam_config.json").write_text(content)
    assert changed_since(tmp_path, {"sam_rho": 0.1, "sam_eta": 0.0}) == []

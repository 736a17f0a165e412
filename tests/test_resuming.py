"""From which checkpoint the scripts go on, and with what they do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from resuming import checkpoint_to_resume
from script_utils import InputError
from train_image_classification import main

from sam_hf import SAMTrainingArguments


def resume(folder: Path, asked: str | None, **options: Any) -> str | None:
    args = {"max_steps": -1, "num_train_epochs": 4.0, **options}
    return checkpoint_to_resume(
        SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=asked, **args)
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
    with pytest.raises(InputError, match="no checkpoint in"):
        resume(tmp_path, "last")
    for step in (5, 10):
        save_checkpoint(tmp_path, step)
    assert resume(tmp_path, "last") == str(tmp_path / "checkpoint-10")
    assert resume(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="holds checkpoint-10 of an earlier run"):
        resume(tmp_path, None)
    with pytest.raises(InputError, match="is neither a checkpoint nor 'last'"):
        resume(tmp_path, str(tmp_path))


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 0.1}, "--learning_rate 0.1: .* was made with 5e-05, and the optimizer"),
        ({"optim": "sgd"}, "--optim sgd: .* was made with adamw_torch_fused, and the optimizer"),
        ({"optim_args": "eps=1e-6"}, "--optim_args eps=1e-6: .* was made with None"),
        ({"seed": 7}, "--seed 7: .* was made with 42, and the examples"),
        ({"per_device_train_batch_size": 3}, "--per_device_train_batch_size 3: .* with 8"),
        ({"num_train_epochs": 5.0, "logging_steps": 3, "sam_rho": 0.5}, None),
    ],
)
def test_what_a_checkpoint_would_overrule_is_refused(tmp_path, options, said):
    checkpoint = save_checkpoint(tmp_path, 8)
    torch.save(SAMTrainingArguments(str(tmp_path)), checkpoint / "training_args.bin")
    arguments = {"resume_from_checkpoint": "last", "num_train_epochs": 4.0} | options
    args = SAMTrainingArguments(str(tmp_path), **arguments)
    if said is None:
        assert checkpoint_to_resume(args) == str(checkpoint)
        return
    with pytest.raises(InputError, match=said):
        checkpoint_to_resume(args)


def test_arguments_that_cannot_be_read_are_not_compared(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 8)
    (checkpoint / "training_args.bin").write_bytes(b"of another version")
    args = SAMTrainingArguments(str(tmp_path), resume_from_checkpoint="last", num_train_epochs=4)
    assert checkpoint_to_resume(args) == str(checkpoint)


TINY = "--hidden_size 8 --num_hidden_layers 1 --num_attention_heads 1 --intermediate_size 8"
TINY += " --max_train_samples 32 --per_device_train_batch_size 16 --disable_tqdm true --use_cpu"
TINY += " --save_strategy epoch --save_total_limit 1 --logging_steps 1"


def test_a_checkpoint_of_another_model_and_another_radius_are_told(tmp_path, recwarn):
    options = f"{TINY} --output_dir {tmp_path} --num_train_epochs"
    main([*options.split(), "1", "--sam_rho", "0.1"])
    again = [*options.split(), "2", "--resume_from_checkpoint", "last"]
    with pytest.raises(InputError, match="checkpoint-2 is of another model than the options"):
        main([*again, "--sam_rho", "0.1", "--hidden_size", "16"])
    recwarn.clear()
    main([*again, "--sam_rho", "0.2"])
    said = [str(w.message) for w in recwarn if "other options of SAM" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("begun with: sam_rho was 0.1 and is 0.2.")
    recwarn.clear()
    main([*options.split(), "3", "--resume_from_checkpoint", "last", "--sam_rho", "0.2"])
    assert not [w for w in recwarn if "other options of SAM" in str(w.message)]

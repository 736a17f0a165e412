"""The loop of one's own: one process, two processes, resumed, and wrong options."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import train_loop
from common.cli import InputError, run_script
from loops import new_accelerator
from safetensors.torch import load_file

from sam_hf import SAMConfig

SCRIPT = Path(train_loop.__file__)
TINY = ["--use_cpu", "--num_train_epochs", "2", "--batch_size", "120", "--sam_rho", "0.1"]
TINY += ["--config_overrides", "hidden_size=16,num_hidden_layers=1"]


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    new_accelerator()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_trains_saves_and_is_resumed_to_the_bit(tmp_path, capsys):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    accuracy = train_loop.main([*TINY, "--output_dir", str(whole)])
    lines = re.findall(r"epoch \d: loss [\d.]+.*'sam_grad_cosine'", capsys.readouterr().out)
    assert len(lines) == 2 and 0 <= accuracy <= 1
    assert SAMConfig.from_pretrained(whole).sam_rho == 0.1
    new_accelerator()
    resume = ["--resume_from_checkpoint", str(whole / "epoch_1")]
    assert train_loop.main([*TINY, "--output_dir", str(rest), *resume]) == accuracy
    for name, w in weights(whole).items():
        assert torch.equal(weights(rest)[name], w), name


def test_two_processes_with_half_the_batch_are_one_process(tmp_path):
    """The last update, of 57 and 60 images on two processes, has a low learning rate."""
    one = tmp_path / "one"
    options = ["--use_cpu", *TINY[3:], "--num_train_epochs", "1", "--learning_rate", "0.001"]
    train_loop.main([*options, "--output_dir", str(one)])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", str(SCRIPT.parents[1] / "configs/accelerate/ddp.yaml")]
    options[options.index("120")] = "60"
    done = subprocess.run(
        [*command, str(SCRIPT), *options, "--output_dir", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1:") == 1  # from one process
    first, second = (weights(tmp_path / name) for name in ("one", "two"))
    apart = max(float((second[name] - w).abs().max()) for name, w in first.items())
    assert apart < 1e-4, apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sam_roh", "1"], r"unknown option --sam_roh \(did you mean --sam_rho\?\)"),
        (["--sam_rho", "-1"], "sam_rho=-1.0 is not allowed"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere': there is no checkpoint"),
        (["--dataset_name", "./nowhere"], "--dataset_name './nowhere'"),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path: there is no folder"),
        (["--output_dir", f"{__file__}/folder"], "--output_dir .*folder' cannot be used"),
        (["--config_overrides", "nothing=1"], "--config_overrides 'nothing=1'"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    with pytest.raises(InputError, match=message):
        train_loop.main(options)
    with pytest.raises(SystemExit) as stopped:
        run_script(train_loop.main, options)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1

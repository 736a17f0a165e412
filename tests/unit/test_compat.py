"""The differences between versions of torch and transformers, and errors of an import."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tiny import Classifier

from sam_hf import SAMConfig, compat
from sam_hf.distributed import validation


@pytest.mark.parametrize(
    "version, is_supported",
    [("2.6.0+cu124", False), ("2.10.1", False), ("2.11.0", True), ("2.13.0+cpu", True)],
)
def test_sharded_weights_are_refused_below_torch_2_11(version, is_supported, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert compat.supports_fsdp2() == is_supported
    arguments = Classifier(), SAMConfig(), True
    if is_supported:
        validation._validate_parameters(*arguments)
        return
    with pytest.raises(
        ValueError, match=re.escape(f"need torch 2.11 or later, and this is torch {version}")
    ):
        validation._validate_parameters(*arguments)


def test_tf32_is_forbidden_by_the_settings_that_the_version_has(monkeypatch):
    names = [name for _, name, _ in compat.precision_settings()]
    assert len(set(names)) == 1 and names[0] in ("fp32_precision", "allow_tf32")
    old = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cudnn", old)
    assert (old, "allow_tf32", False) in compat.precision_settings()


@pytest.mark.parametrize(
    "args, saves",
    [
        ({}, False),
        ({"enable_jit_checkpoint": False}, False),
        ({"enable_jit_checkpoint": True}, True),
    ],
)
def test_only_newer_trainers_save_within_an_update(args, saves):
    assert compat.saves_within_updates(SimpleNamespace(**args)) == saves


@pytest.mark.parametrize(
    "version, words",
    [("0.36.2", "--exclude a* b*"), ("1.0.0", "--exclude a* --exclude b*")],
)
def test_all_patterns_are_left_out_of_an_upload(version, words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "__version__", version)
    assert " ".join(compat.upload_exclusions("a*", "b*")) == words


def test_an_error_while_a_module_is_imported_is_not_hidden():
    code = (
        "import torch.distributed.tensor as t; del t.DTensor; import sys\n"
        "class Broken:\n"
        "    def __getattr__(self, name): raise AttributeError(f'broken has no {name}')\n"
        "sys.modules['transformers.trainer_pt_utils'] = Broken()\n"
        "from sam_hf import SAMTrainer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and "ImportError" in last and "SAMTrainer" not in last

"""The launch files start what they say, and the scripts run in several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors import safe_open
from scaling_table import bytes_sent
from train_image_classification import DataArguments, load_data
from transformers import AutoImageProcessor, AutoModelForImageClassification

ROOT = Path(__file__).parents[2]
FILES = {file.stem: file for file in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
WORKER = ROOT / "tests" / "distributed" / "workers" / "launch_worker.py"

SMALL = "--use_cpu --max_steps 2 --logging_strategy steps --logging_steps 1 --eval_strategy no"
TINY = "--config_overrides hidden_size=8,num_hidden_layers=1,num_attention_heads=2"
IMAGES = (
    f"train_image_classification.py configs/digits_asam.yaml {SMALL} {TINY} "
    "--per_device_train_batch_size 16 --sam_rho 3"
)
LAYERS = "--fsdp_transformer_layer_cls_to_wrap"
PLAIN = "--compare_with_plain false"
TWO = f"{PLAIN} --gradient_accumulation_steps 2"


def case(file: str, script: str, *shims: str, extra: str = "") -> dict[str, Any]:
    name, *options = script.split()
    # The recipes are named from the root, as in the README.
    options = [str(ROOT / o) if o.startswith("configs/") else o for o in options]
    launch = ["--config_file", str(FILES[file]), "--num_processes", "2", *extra.split()]
    return {"launch": [*launch, str(ROOT / "scripts" / name), *options], "shims": shims}


CASES = {
    "ddp": case("ddp", IMAGES),
    "bf16": case("bf16", f"{IMAGES} {PLAIN}"),
    "fp16": case("fp16", f"{IMAGES} {PLAIN}", "with_loss_scaling"),
    "fsdp2": case(
        "fsdp2", f"{IMAGES} {TWO}", "as_on_a_gpu", "counting_bytes", extra=f"{LAYERS} ViTLayer"
    ),
    "fsdp2-llama": case(
        "fsdp2",
        f"train_causal_lm.py configs/pydoc_lm.yaml {SMALL} --max_eval_samples 3 {TWO} "
        "--sam_scope micro_batch",
        "as_on_a_gpu",
        "counting_bytes",
    ),
    "deepspeed_zero1": case(
        "deepspeed_zero1", f"{IMAGES} {TWO}", "without_compiler", "counting_bytes"
    ),
    "deepspeed_zero2": case(
        "deepspeed_zero2",
        f"{IMAGES} {TWO} --sam_scope micro_batch",
        "without_compiler",
        "counting_bytes",
    ),
    "fsdp2-on-cpu": case("fsdp2", IMAGES),
    "deepspeed-compared": case("deepspeed_zero2", IMAGES, "without_compiler"),
    "alone": case("ddp", IMAGES.replace("--use_cpu", "")),
    "text": case(
        "ddp",
        f"train_text_classification.py configs/stdlib_docstrings.yaml {SMALL} {TINY} "
        "--train_file {folder}/texts.jsonl --text_column text --sam_start_ratio 0",
    ),
    "causal_lm": case(
        "ddp", f"train_causal_lm.py configs/pydoc_lm.yaml {SMALL} {TINY} --max_eval_samples 3"
    ),
    "grpo": case(
        "ddp",
        f"train_grpo.py configs/grpo_digits.yaml {SMALL} {TINY} --num_eval_prompts 8 "
        "--per_device_eval_batch_size 8",
    ),
    "summarization": case(
        "ddp",
        f"train_summarization.py configs/docstring_summaries.yaml {SMALL} "
        "--config_overrides d_model=8,d_kv=4,num_layers=1,num_heads=2 "
        "--train_file {folder}/texts.jsonl --predict_with_generate",
    ),
}
REFUSED = {
    "alone": "several processes without a GPU each train alone: give --use_cpu",
    "deepspeed-compared": "--compare_with_plain is not supported with DeepSpeed",
    "fsdp2-on-cpu": "FSDP was requested, but Accelerate does not shard on cpu: these 2 processes",
}
ENDS_WELL = [name for name in CASES if name not in REFUSED]


def launch(home: Path, *options: str) -> subprocess.Popen[str]:
    """`accelerate launch` with empty caches, and its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        | {"PYTHONPATH": str(ROOT), "HF_HOME": str(home)},
    )


def write_cases(folder: Path, names: Sequence[str]) -> None:
    """What the worker reads, and a file of texts for the cases that ask for it."""
    cases = {}
    for name in names:
        command = [word.format(folder=folder) for word in CASES[name]["launch"]]
        cases[name] = {**CASES[name], "launch": [*command, "--output_dir", str(folder / name)]}
    (folder / "cases.json").write_text(json.dumps(cases))
    rows = [
        {"text": f"{i} and {i * i} make {i + i * i}", "label": "ab"[i % 2], "summary": f"{i} more"}
        for i in range(103)  # two processes cannot share them out evenly
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[dict[str, Any], dict[str, Any], Path]]:
    """What the two processes of each case printed, and its folder: one launch for all of them."""
    folder = tmp_path_factory.mktemp("launch")
    write_cases(folder, list(CASES))
    options = ("--config_file", str(FILES["ddp"]), "--num_processes", "2")
    process = launch(folder / "hf", *options, str(WORKER), str(folder / "cases.json"), str(folder))
    try:
        output, _ = process.communicate(timeout=280)
    finally:
        process.terminate()  # and torchrun ends those that it started
    assert process.returncode == 0, output[-6000:]
    first, second = (json.loads((folder / f"rank{i}.json").read_text()) for i in (0, 1))
    return {name: (first[name], second[name], folder / name) for name in CASES}


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def number_of_weights(result: dict[str, Any]) -> int:
    line = next(line for line in result["output"].splitlines() if " parameters; " in line)
    return int(line.split()[1].replace(",", ""))


STARTS = {
    "ddp": "DistributedDataParallel, float32 weights",
    "bf16": "DistributedDataParallel, float32 weights, bf16 compute",
    "fp16": "DistributedDataParallel, float32 weights, fp16 compute, loss scaling",
    "fsdp2": "FSDPViTForImageClassification, float32 weights, bf16 compute",
    "fsdp2-llama": "FSDPLlamaForCausalLM, float32 weights, bf16 compute",
    "deepspeed_zero1": "DeepSpeedEngine (ZeRO-1), float32 weights",
    "deepspeed_zero2": "DeepSpeedEngine (ZeRO-2), float32 weights",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_a_launch_file_starts_what_it_says(runs, name):
    first = runs[name][0]
    assert first["code"] == 0, first["errors"][-3000:]
    assert first["layout"] == STARTS[name]
    examples = 64 if "deepspeed" in name or name == "fsdp2" else 32
    assert f"; 2 x cpu, {examples} examples an update" in first["output"].splitlines()[1]


def test_every_launch_file_is_started():
    assert set(FILES) - {"multi_node"} <= set(STARTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS_WELL)
def test_a_script_in_two_processes_trains_with_sam_and_saves_once(runs, name):
    first, second, folder = runs[name]
    assert first["code"] == second["code"] == 0, first["errors"][-3000:] + second["errors"][-3000:]
    assert second["output"] == ""  # only the main process reports
    assert first["output"].count("; 2 x cpu, ") == 1
    updates = [entry for entry in history(folder) if "sam_sharpness" in entry]
    assert [entry["step"] for entry in updates] == [1, 2]
    assert all(entry["sam_perturbation_norm"] > 0.01 for entry in updates)
    assert updates[-1]["sam_sharpness"] != 0  # the second pass saw other weights
    results = json.loads((folder / "results.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        tied = {"lm_head.weight"} if name == "fsdp2-llama" else set()  # FSDP saves it twice
        keys = set(file.keys()) - tied
        saved = sum(file.get_tensor(key).numel() for key in keys)
    # All of the weights, and not one process's shard.
    assert saved == number_of_weights(first)
    assert len({run["passes"] for run in results["runs"]}) == 1
    for file in ("README.md", "curves.png", "sam_config.json", "all_results.json"):
        assert (folder / file).is_file(), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "scope"),
    [
        ("fsdp2", "FSDP2", "batch"),
        ("fsdp2-llama", "FSDP2", "micro_batch"),
        ("deepspeed_zero1", "ZeRO-1", "batch"),
        ("deepspeed_zero2", "ZeRO-2", "micro_batch"),
    ],
)
def test_an_update_sends_what_the_table_of_the_readme_says(runs, name, layout, scope):
    lines = runs[name][0]["output"].splitlines()
    weights = number_of_weights(runs[name][0])
    expected = bytes_sent(layout, scope, weights, gpus=2, micro_batches=2)
    sent = [int(line.split()[0]) for line in lines if line.endswith(" bytes sent")]
    assert len(sent) == 2
    # Of models so small, what FSDP2 does not gather a second time is a part that shows.
    assert sent == pytest.approx([expected] * 2, rel=0.1)


@pytest.mark.slow
def test_the_score_is_that_of_one_process_on_all_test_images(runs):
    _, _, folder = runs["ddp"]
    _, _, test, _ = load_data(DataArguments(label_noise=0.4))
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        logits = model(**processor(test["image"][:], return_tensors="pt")).logits
    expected = (logits.argmax(-1) == torch.tensor(test["labels"][:])).float().mean().item()
    results = json.loads((folder / "results.json").read_text())
    assert results["runs"][0]["accuracy"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_run_as_asked_is_refused_in_one_line_before_the_training(runs, name):
    if name == "alone" and torch.accelerator.is_available():
        pytest.skip("without --use_cpu they train together on the accelerators")
    for ended in runs[name][:2]:
        assert ended["code"] == 2, ended["errors"][-3000:]
        lines = [line for line in ended["errors"].splitlines() if "error: " in line]
        assert len(lines) == 1 and REFUSED[name] in lines[0]
    assert not (runs[name][2] / "trainer_state.json").exists()


@pytest.mark.slow
def test_two_machines_find_each_other(tmp_path):
    """Two launchers on one machine, each with a rank and a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    name, *options = f"{IMAGES} {PLAIN}".split()
    shared = ["--config_file", str(FILES["multi_node"]), "--num_processes", "2"]
    shared += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    folders = [tmp_path / "first", tmp_path / "second"]
    launchers = [
        launch(
            tmp_path / f"hf{rank}",
            *[*shared, "--machine_rank", str(rank), f"scripts/{name}", *options],
            *["--output_dir", str(folder)],
        )
        for rank, folder in enumerate(folders)
    ]
    try:
        outputs = [launcher.communicate(timeout=200)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    assert [launcher.returncode for launcher in launchers] == [0, 0], "".join(outputs)[-6000:]
    assert "; 2 x cpu, " in outputs[0] and " x cpu, " not in outputs[1]
    assert (folders[0] / "model.safetensors").is_file()
    assert not list(folders[1].glob("*"))  # --save_on_each_node was not asked for


@pytest.mark.parametrize("name", FILES)
def test_accelerate_knows_every_key_of_a_launch_file(name):
    written = yaml.safe_load(FILES[name].read_text())
    assert isinstance(load_config_from_file(str(FILES[name])), ClusterConfig)
    known = {action.dest for action in launch_command_parser()._actions}
    for part in ("fsdp_config", "deepspeed_config"):  # there a mistyped key is ignored
        assert set(written.get(part, {})) <= known
    # With the defaults in the file, a command line without options starts a process for each GPU.
    assert written["num_processes"] == 8 * written["num_machines"]
    assert written["mixed_precision"] in ("no", "bf16", "fp16")


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_a_launch_file_names_that_file_and_ones_that_exist(name):
    lines = FILES[name].read_text().splitlines()
    commands = [line.split() for line in lines if line.startswith("#   accelerate launch")]
    assert commands
    for command in commands:
        assert f"configs/accelerate/{name}.yaml" in command
        files = [word for word in command if word.startswith(("configs/", "scripts/"))]
        assert len(files) == 3 and all((ROOT / file).is_file() for file in files)

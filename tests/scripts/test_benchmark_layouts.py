"""What the benchmark counts on two processes, against what the parameters say by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmark_step
import pytest
import torch
from benchmark_utils import build_model
from scaling_table import bytes_sent
from slow import slow_unless
from transformers import HfArgumentParser, ViTConfig

from sam_hf.engine.parameters import select_parameters

ROOT = Path(__file__).parents[2]
TINY = ["--model", "transformer-tiny", "--batch_size", "2", "--sequence_length", "16"]
TINY += ["--threads", "1"]
SCRIPT = ROOT / "scripts" / "benchmarks" / "benchmark_step.py"


def launch(
    layout: str, folder: Path, rounds: int = 1, rows: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """What the benchmark writes and prints. It starts the two processes itself."""
    path = folder / f"{layout}.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--layout", layout, "--rounds", str(rounds)]
    command += ["--rows", *rows] if rows else []
    done = subprocess.run(
        [*command, "--output_json", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """The bytes of the parameters, and how many tensors they are."""
    model = build_model("transformer-tiny", 16)
    parts = {"all": model, "blocks": model.transformer.h, "head": model.lm_head}
    sizes = {k: sum(p.nbytes for p in part.parameters()) for k, part in parts.items()}
    sizes["norms"] = sum(p.nbytes for p in select_parameters(model, "norms").values())
    return sizes | {"tensors": len(list(model.parameters()))}


def collectives(row: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {kind: (calls, row["bytes"][kind]) for kind, calls in row["calls"].items()}


@pytest.mark.slow
def test_under_ddp_scope_micro_batch_sends_what_a_plain_update_sends(tmp_path, sizes):
    names = ("sam", "sam, micro_batch", "sam, norms")
    result, printed = launch("ddp", tmp_path, rounds=2, rows=names)
    rows = {name: collectives(row) for name, row in result["rows"].items()}
    # The gradients in one bucket, and an int32 for each tensor that says whether it was used.
    assert rows["plain"] == {"all_reduce": (2, sizes["all"] + 4 * sizes["tensors"])}
    assert rows["sam, micro_batch"] == rows["plain"]
    calls, whole = rows["plain"]["all_reduce"]
    assert rows["sam"] == rows["two passes"] == {"all_reduce": (2 * calls, 2 * whole)}
    # Where the ascent computes the gradients of the norms alone, they are reduced in one bucket.
    assert rows["sam, norms"] == {"all_reduce": (calls + 1, whole + sizes["norms"])}
    column = printed.splitlines().index("") + 1
    header, _, *lines = [re.split(" {2,}", line.strip()) for line in printed.splitlines()[column:]]
    per_pass = {line[0]: line[header.index("calls / pass")] for line in lines}
    assert per_pass == {
        "plain": "2",
        "two passes": "2",
        "sam": "2",
        "sam, micro_batch": "1",
        "sam, norms": "1.5",
    }

    assert [len(row["seconds"]) for row in result["rows"].values()] == [2] * 5
    weights = sizes["all"] // 4
    for name, scope in (("plain", "plain"), ("sam", "batch"), ("sam, micro_batch", "micro_batch")):
        on_paper = bytes_sent("DDP", scope, weights, gpus=2, micro_batches=1)
        assert result["rows"][name]["sent_bytes"] == pytest.approx(on_paper, rel=1e-3)
    assert printed.strip().endswith(benchmark_step.table(result))
    of_plain = {line[0]: line[-1] for line in lines}
    assert of_plain["sam"] == "2.000" and of_plain["sam, micro_batch"] == "1.000"


@pytest.mark.slow
def test_under_fsdp2_both_scopes_send_twice_and_one_number(tmp_path, sizes):
    rows = {n: collectives(row) for n, row in launch("fsdp2", tmp_path)[0]["rows"].items()}
    plain = rows["plain"]
    # The tied head counts on its own. What is not in a block stays gathered for the backward pass;
    # each of the two blocks is gathered for both. Gathered are the two blocks and what is left.
    whole = sizes["all"] + sizes["head"]
    assert plain["reduce_scatter"] == (3, whole)
    assert plain["all_gather"] == (5, whole + sizes["blocks"])
    assert plain["all_reduce"] == (1, 4 * sizes["tensors"])  # a norm of each gradient, to clip
    for name in ("sam", "sam, micro_batch"):
        for kind in ("all_gather", "reduce_scatter"):
            assert rows[name][kind] == tuple(2 * n for n in plain[kind])
        assert rows[name]["all_reduce"] == (2, plain["all_reduce"][1] + 4)  # and |g|


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_under_deepspeed_the_bytes_are_those_of_the_table_of_the_docs(tmp_path, sizes, stage):
    pytest.importorskip("deepspeed")
    rows = launch(f"zero{stage}", tmp_path)[0]["rows"]
    for name, scope in (("plain", "plain"), ("sam", "batch"), ("sam, micro_batch", "micro_batch")):
        on_paper = bytes_sent(f"ZeRO-{stage}", scope, sizes["all"] // 4, gpus=2, micro_batches=1)
        assert rows[name]["sent_bytes"] == pytest.approx(on_paper, rel=1e-3)
    plain = collectives(rows["plain"])
    assert collectives(rows["sam, micro_batch"]) == plain
    # DeepSpeed reduces g_s as in plain training; g goes before that, in one bucket.
    calls, whole = plain["all_reduce"]
    assert collectives(rows["sam"]) == plain | {"all_reduce": (calls + 1, whole + sizes["all"])}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "ddp", "--rows", "hand-written"], "layout='ddp'"),
        (["--layout", "ddp", "--processes", "0"], "processes=0"),
        (["--layout", "ddp", "--device", "cuda", "--processes", "99"], "processes=99"),
        (["--layout", "ddp", "--model", "/no/such/model"], "/no/such/model"),
        (["--layout", "zero3"], "zero3"),
        (["--accumulation_steps", "0"], "accumulation_steps=0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_processes_start(
    options, said, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark_step, "start_processes", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit) as exit_info:
        benchmark_step.main([*TINY, *options])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_without_deepspeed_its_layouts_are_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        benchmark_step, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    with pytest.raises(ValueError, match="pip install deepspeed"):
        benchmark_step.BenchmarkArguments(layout="zero2")


@pytest.fixture
def folders(tmp_path) -> dict[str, list[str]]:
    """Small models in the place of those that are built in."""
    small = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    small.save_pretrained(tmp_path)
    return {"vit-base": ["--model", str(tmp_path)], "decoder-1b": TINY[:2], "bert-base": TINY[:2]}


def gpu_commands() -> list[list[str]]:
    page = (ROOT / "docs/guides/cost.md").read_text("utf-8")
    block = page.split("<!-- gpu -->\n```bash\n")[1].split("\n```")[0]
    return [shlex.split(line) for line in block.splitlines() if line]


def is_cheap(command: list[str]) -> bool:
    """Whether the command starts no training here, or a small eager one in bfloat16."""
    is_small = {"vit-base", "bf16"} <= set(command) and "--torch_compile" not in command
    return "--layout" in command or is_small


def test_the_commands_for_a_gpu_say_what_they_are_to_measure():
    commands = [" ".join(command) for command in gpu_commands()]
    assert all(c.startswith("python scripts/benchmarks/benchmark_step.py") for c in commands)
    assert all("--device cuda" in c for c in commands)
    for wanted in [
        "vit-base",
        "bert-base",
        "decoder-1b",
        "bf16",
        "fp16",
        "--torch_compile",
        "--layout",
        "--steady",
    ]:
        assert any(wanted in c for c in commands), wanted


@slow_unless(command=is_cheap)
@pytest.mark.parametrize("command", gpu_commands(), ids=" ".join)
def test_the_commands_for_a_gpu_run_on_a_cpu(command, folders, capsys, monkeypatch):
    arguments = " ".join(command[2:]).replace("--device cuda", "--device cpu")
    given = vars(
        HfArgumentParser(benchmark_step.BenchmarkArguments).parse_args_into_dataclasses(
            arguments.split()
        )[0]
    )
    arguments = re.sub(r"--(model|batch_size|sequence_length|rounds) \S+", "", arguments).split()
    small = [*folders[given["model"]], "--batch_size", "1", "--sequence_length", "8"]
    small += ["--rounds", "1", "--imports", "0", "--threads", "1"]
    small += ["--updates", "2"] if given["steady"] else []
    if given["torch_compile"]:
        small += ["--torch_compile_backend", "aot_eager"]
    if given["layout"] != "one":  # these are launched above
        started: list[list[str]] = []
        result = {"rows": {}, "options": {}}
        monkeypatch.setattr(
            benchmark_step, "start_processes", lambda argv, *_: started.append(argv) or result
        )
        monkeypatch.setattr(benchmark_step, "table", lambda _: "")
        benchmark_step.main([*arguments, *small])
        assert started == [[*arguments, *small]]
        return
    threads = torch.get_num_threads()
    result = benchmark_step.main([*arguments, *small])
    torch.set_num_threads(threads)
    assert result["options"]["dtype"] == given["dtype"] != "fp32"
    assert set(given["rows"] or benchmark_step.ROWS) <= set(result["rows"])
    lines = capsys.readouterr().out.splitlines()
    shown = next(line for line in lines if "real_accelerator.py" not in line)  # DeepSpeed's logs
    assert given["dtype"] in shown and (", compiled" in shown) == given["torch_compile"]
    assert ("1 images" in shown) == (given["model"] == "vit-base")

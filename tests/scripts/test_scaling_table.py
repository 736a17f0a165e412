"""The costs on paper: counted again one message after the other, and the tables of the docs."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaling_table import LAYOUTS, METHODS, bytes_held, bytes_sent, flops, main

ROOT = Path(__file__).parents[2]
P, N = 1000.0, 4
FP32, BF16 = 4 * P * (N - 1) / N, 2 * P * (N - 1) / N  # to gather or to reduce all of it once


def messages(layout: str, method: str, micro_batches: int) -> list[float]:
    """What one GPU sends, in the order in which it does, written from the trainer's course."""
    sent: list[float] = []

    def sharded_pass(reduces: bool) -> None:
        sent.extend([BF16, BF16] + [BF16] * reduces)

    def whole_pass(is_last: bool) -> None:
        if layout == "ZeRO-2" or is_last:
            sent.extend([FP32, FP32])

    for i in range(micro_batches):
        is_last = i == micro_batches - 1
        if layout == "FSDP2":
            sharded_pass(reduces=is_last or method == "micro_batch")
            if method == "micro_batch":
                sharded_pass(reduces=True)
        elif method != "batch":
            whole_pass(is_last)  # its ascent, if it has one, stays with this GPU
    if method == "batch":
        if layout != "FSDP2":
            sent.extend([FP32, FP32])  # the ascent of all micro-batches
        for i in range(micro_batches):
            is_last = i == micro_batches - 1
            sharded_pass(is_last) if layout == "FSDP2" else whole_pass(is_last)
    if layout.startswith("ZeRO"):
        sent.append(FP32)  # the weights that each GPU has updated
    return sent


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_are_those_of_the_messages_of_an_update(layout, method, micro_batches):
    expected = sum(messages(layout, method, micro_batches))
    assert bytes_sent(layout, method, P, N, micro_batches) == pytest.approx(expected)
    assert bytes_sent(layout, method, P, 1, micro_batches) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_one_gpu_no_layout_holds_less_than_weights_gradient_optimizer_and_copy(layout):
    master = 4 * P if layout.startswith("ZeRO") else 0  # DeepSpeed's own, also of float32 weights
    assert bytes_held(layout, "plain", P, 1, 1) == 16 * P + master
    for method in ("batch", "micro_batch"):
        assert bytes_held(layout, method, P, 1, 1) == 20 * P + master
    # Only FSDP2 gets rid of the copy by sharding.
    left = bytes_held(layout, "batch", P, 10**9, 1) - bytes_held(layout, "plain", P, 10**9, 1)
    assert left == pytest.approx({"FSDP2": 0, "ZeRO-2": 8 * P}.get(layout, 4 * P), abs=1e-3)


def test_sam_computes_twice_as_much():
    assert flops("plain", 7e9, 100) == 6 * 7e9 * 100
    assert {flops(m, 7e9, 100) for m in ("batch", "micro_batch")} == {12 * 7e9 * 100}


def test_the_page_on_scaling_shows_what_the_script_prints(capsys):
    main([])
    formulas, numbers = capsys.readouterr().out.strip().split("\n\n")
    page = (ROOT / "docs/evidence/scaling.md").read_text("utf-8")
    assert f"<!-- formulas -->\n{formulas}\n\n" in page
    assert f"<!-- numbers -->\n{numbers}\n\n" in page


@pytest.mark.parametrize("option", ["--tokens", "--micro_batches", "--tflops", "--between"])
def test_a_number_that_makes_no_sense_is_refused(option, capsys):
    with pytest.raises(SystemExit) as end:
        main([option, "0"])
    assert end.value.code == 2
    assert f"{option} must be above 0, got 0" in capsys.readouterr().err


def test_the_options_change_what_they_name(capsys):
    main(["--all"])
    tables = capsys.readouterr().out
    assert len(tables.strip().split("\n\n")[1].splitlines()) == 2 + 3 * 4 * 3
    main(["--micro_batches", "2"])
    assert "| 70B | FSDP2 | 8 | 17 / 34 / 34 |" in capsys.readouterr().out

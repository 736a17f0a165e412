"""Print the theoretical cost of an update: plain, and SAM in scope batch or micro_batch.

Examples:
    python scripts/benchmarks/scaling_table.py
    python scripts/benchmarks/scaling_table.py --tokens 4096 --micro_batches 4 --all

The passes and the large messages and tensors are counted. Not counted: the optimizer's own work,
activations, buckets, casts of weights and the one or two layers that FSDP2 has gathered. SAM is on
in every update and perturbs all weights. The seconds assume no overlap.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

FP32, BF16, ADAM = 4, 2, 8  # bytes for each weight; Adam has two numbers in fp32
METHODS = ("plain", "batch", "micro_batch")
LAYOUTS = ("DDP", "ZeRO-1", "ZeRO-2", "FSDP2")
# The smallest layout that is needed for each size, and machines of eight GPUs.
SIZES = {"1B": (1e9, "DDP"), "7B": (7e9, "FSDP2"), "70B": (70e9, "FSDP2")}
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions behind the seconds. Those of docs/evidence/scaling.md are the defaults."""

    tokens: int = 8192  # of one micro-batch on one GPU
    micro_batches: int = 1  # in an update
    tflops: float = 400.0  # that a GPU reaches in bf16
    inside: float = 450.0  # GB/s that a GPU sends within a machine
    between: float = 50.0  # and from machine to machine


def flops(method: str, weights: float, tokens: float) -> float:
    """FLOPs of one GPU in one update: 2 for each weight and token forward, 4 backward."""
    return 6 * weights * tokens * (1 if method == "plain" else 2)


def bytes_sent(layout: str, method: str, weights: float, gpus: int, micro_batches: int) -> float:
    """Bytes sent by one GPU in one update, over rings.

    Gathering a whole from its shards and reducing a whole to shards send (N-1)/N of it each; an
    all-reduce is both.
    """
    part = (gpus - 1) / gpus * weights
    passes = micro_batches * (1 if method == "plain" else 2)
    if layout == "FSDP2":
        # Gathered in bf16, forward and again backward. The gradient is reduced in bf16: at the end
        # of the ascent and of the descent, or, with an e for each micro-batch, in every pass.
        reductions = {"plain": 1, "batch": 2, "micro_batch": passes}[method]
        return part * BF16 * (2 * passes + reductions)
    # Every GPU holds all weights. The ascent is reduced once where e is that of all examples.
    ascent = 2 * FP32 * part if method == "batch" else 0.0
    reductions = micro_batches if layout == "ZeRO-2" else 1
    # DeepSpeed reduces to all where a reduction to shards would do, and gathers the new weights.
    gathering = 0.0 if layout == "DDP" else FP32 * part
    return ascent + 2 * FP32 * part * reductions + gathering


def bytes_held(layout: str, method: str, weights: float, gpus: float, micro_batches: int) -> float:
    """Peak bytes on one GPU."""
    shard = weights / gpus
    # Scope micro_batch sets aside what the micro-batches before have added up.
    aside = FP32 if method == "micro_batch" and micro_batches > 1 else 0
    copy = 0 if method == "plain" else FP32
    if layout == "FSDP2":
        # A gradient that is not reduced before the last micro-batch is a whole one.
        is_whole = micro_batches > 1 and method != "micro_batch"
        held = shard * (FP32 + FP32 + ADAM + copy + aside)
        return held + (weights * BF16 if is_whole else 0)
    if layout == "DDP":
        return weights * (FP32 + FP32 + ADAM + copy + aside)
    state = shard * (FP32 + ADAM)  # with DeepSpeed's own copy of its share of the weights
    if layout == "ZeRO-1":
        return weights * (FP32 + FP32 + copy + aside) + state
    # ZeRO-2 shards the gradient of the descent, but that of the ascent is a whole one.
    if method == "plain":
        return weights * FP32 + shard * FP32 + state
    return weights * (FP32 + FP32 + copy) + shard * aside + state


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def formulas() -> str:
    """Bytes of the methods in each layout, read off the functions above."""
    rows = []
    for layout, method in itertools.product(LAYOUTS, METHODS):
        sent = [bytes_sent(layout, method, 2.0, 2, a) for a in (0, 1)]
        held = [[bytes_held(layout, method, 1.0, n, a) for n in (math.inf, 1)] for a in (1, 2)]
        scope = "none (plain)" if method == "plain" else f"`{method}`"
        in_words = [_in_words(*sent, "A"), *(_in_words(*values, "/ N") for values in held)]
        rows.append((layout, scope, *in_words))
    head = ("layout", "scope", "sent, bytes · P (N−1)/N", "held, bytes · P", "held if A > 1")
    return table(head, rows)


def _in_words(constant: float, total: float, slope: str) -> str:
    """`5 A + 3` for a line that is 3 at 0 and 8 at 1."""
    terms = [f"{total - constant:g} {slope}"] if total != constant else []
    return " + ".join([*terms, f"{constant:g}"] if constant or not terms else terms)


def numbers(given: Assumptions, every_layout: bool = False) -> str:
    """Seconds and GB for each size of model and number of GPUs."""
    rows = []
    passes = given.micro_batches
    for name, (weights, needed) in SIZES.items():
        computing = [flops(m, weights, given.tokens * passes) / given.tflops for m in METHODS]
        layouts = LAYOUTS if every_layout else (needed,)
        for layout, gpus in itertools.product(layouts, GPUS):
            speed = given.inside if gpus <= 8 else given.between
            sent = [bytes_sent(layout, m, weights, gpus, passes) / 1e9 for m in METHODS]
            held = [bytes_held(layout, m, weights, gpus, passes) / 1e9 for m in METHODS]
            sending = [x / speed for x in sent]
            cells = map(_cell, ([x / 1e12 for x in computing], sending, sent, held))
            rows.append((name, layout, str(gpus), *cells))
    head = ("P", "layout", "N", "computing, s", "sending, s", "sent, GB", "held, GB")
    return table(head, rows)


def _cell(values: list[float]) -> str:
    return " / ".join(f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in values)


def main(argv: list[str] | None = None) -> None:
    """Print the formulas and the numbers as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Assumptions()
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="in a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=usual.micro_batches, help="an update")
    parser.add_argument("--tflops", type=float, default=usual.tflops, help="of a GPU, in bf16")
    parser.add_argument("--inside", type=float, default=usual.inside, help="GB/s in a machine")
    parser.add_argument("--between", type=float, default=usual.between, help="GB/s between them")
    parser.add_argument("--all", action="store_true", help="each size in each layout")
    options = vars(parser.parse_args(argv))
    every_layout = options.pop("all")
    for name, value in options.items():
        if not value > 0:
            parser.error(f"--{name} must be above 0, got {value}")
    print(formulas(), numbers(Assumptions(**options), every_layout), sep="\n\n")


if __name__ == "__main__":
    main()

"""The results of the benchmark as tables; `benchmark_step.py` says what their columns mean."""

from __future__ import annotations

import statistics
from typing import Any

from benchmark_utils import format_table

PLAIN, FLOOR, BY_HAND = "plain", "two passes", "hand-written"
MIB = 2**20


def title(result: dict[str, Any]) -> str:
    options = result["options"]
    where = options["device"]
    if options["layout"] != "one":
        where = f"{options['layout']} on {options['processes']} {where} processes"
    steps = f"{options['accumulation_steps']} x " if options["accumulation_steps"] > 1 else ""
    compiled = ", compiled" if options["torch_compile"] else ""
    examples = f"{options['batch_size']} x {options['sequence_length']} tokens"
    if result["inputs"] == "pixel_values":
        examples = f"{options['batch_size']} images"
    steady = f" of {options['updates']} updates" if options["steady"] else ""
    return (
        f"{options['model']}: {result['parameters'] / 1e6:.1f} million parameters, "
        f"{steps}{examples}, "
        f"{options['dtype']}{compiled}, "
        f"{where}, {result['threads']} threads, {options['rounds']} rounds{steady}"
    )


def layout_table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["calls"]))
    lines = []
    for name, row in rows.items():
        ms, plain = row["median_ms"], rows[PLAIN]
        line = [name, f"{ms:.1f}", f"{ms / rows[FLOOR]['median_ms']:.3f}"]
        line += [
            f"{row['calls'].get(kind, 0)} x {row['bytes'].get(kind, 0) / MIB:.3f}" for kind in kinds
        ]
        line += [f"{sum(row['calls'].values()) / (1 if name == PLAIN else 2):g}"]
        line += [f"{row['sent_bytes'] / MIB:.3f}"]
        line += [f"{row['sent_bytes'] / plain['sent_bytes']:.3f}"]
        if row["peak_bytes"] is not None:
            line += [f"{(row['peak_bytes'] - plain['peak_bytes']) / MIB:.1f}"]
        lines.append(line)
    header = ["update", "ms", "/ two passes", *kinds, "calls / pass", "sent MiB", "/ plain"]
    header += ["extra MiB"]
    return "\n".join([title(result), "", format_table(header[: len(lines[0])], lines)])


def host_table(result: dict[str, Any]) -> str:
    options = result["options"]
    lines = []
    for name, model in result["host"].items():
        us = {row: 1e6 * statistics.median(seconds) for row, seconds in model["seconds"].items()}
        by_hand, sam = us[BY_HAND] - us[FLOOR], us["sam"] - us[FLOOR]
        launches = model["launches"]["sam"] - model["launches"][FLOOR]
        times = [f"{number:.0f}" for number in (us[PLAIN], us[FLOOR], by_hand, sam)]
        ratios = [f"{sam / by_hand:.2f}", f"{us['sam'] / us[BY_HAND]:.2f}"]
        lines.append([name, *times, *ratios, str(launches)])
    beyond = [f"{row} - {FLOOR}" for row in (BY_HAND, "sam")]
    header = ["model", PLAIN, FLOOR, *beyond, "ratio", "whole", "launches beyond the passes"]
    title = (
        f"host time per update in microseconds: cpu, {result['threads']} threads, "
        f"{options['rounds']} rounds of {options['updates']} updates"
    )
    return "\n".join([title, "", format_table(header, lines)])


def table(result: dict[str, Any]) -> str:
    if "host" in result:
        return host_table(result)
    if result["options"]["layout"] != "one":
        return layout_table(result)
    rows = result["rows"]
    lines = []
    for name, row in rows.items():
        ms = [1e3 * s for s in row["seconds"]]
        low, _, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
        ratios = [
            f"{row['median_ms'] / rows[base]['median_ms']:.3f}" if base in rows else "-"
            for base in (FLOOR, BY_HAND)
        ]
        extra = row["extra_bytes"]
        memory = [f"{extra / MIB:.1f}", f"{extra / row['perturbed_bytes']:.2f}"]
        if name in (PLAIN, FLOOR):
            memory[1] = "-"  # they perturb nothing
        lines.append([name, f"{row['median_ms']:.1f}", f"{high - low:.1f}", *ratios, *memory])
    header = ["update", "ms", "quartiles", "/ two passes", "/ hand-written", "extra MiB"]
    imports = [
        f"{statement}: {1e3 * added:.0f} ms on top of {1e3 * before:.0f} ms for its prerequisite"
        for statement, (added, before) in result["imports"].items()
    ]
    return "\n".join(
        [title(result), "", format_table([*header, "x perturbed"], lines), "", *imports]
    )

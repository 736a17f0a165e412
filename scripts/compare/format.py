"""How `compare_methods.py` writes its tables: cells, names of levels, Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compare.statistics import Estimate


def in_words(level: str) -> str:
    """'10 % of the data, 40 % wrong labels', or the column of the labels that people gave."""
    labels, _, fraction = level.partition(" at ")
    part = f"{100 * float(fraction):g} % of the data, " if fraction else ""
    try:
        return f"{part}{100 * float(labels):g} % wrong labels"
    except ValueError:
        return part + labels.replace("_", " ")


def in_order(levels: Iterable[str]) -> list[str]:
    """All data first, and of each part from few wrong labels to many, then those of people."""

    def key(level: str) -> tuple[float, bool, float, str]:
        labels, _, fraction = level.partition(" at ")
        part = -float(fraction or 1)
        try:
            return part, False, float(labels), ""
        except ValueError:
            return part, True, 0.0, labels

    return sorted(levels, key=key)


def shared_part(levels: Sequence[str]) -> tuple[str, list[str]]:
    """'10 % of the data' if all levels have that part of them or '', and the rest of each name."""
    parts, _, rest = zip(*(in_words(level).rpartition(", ") for level in levels), strict=True)
    if len(set(parts)) == 1:
        return parts[0], list(rest)
    return "", [in_words(level) for level in levels]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = [head, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def with_error(estimate: Estimate, digits: int = 3) -> str:
    half = f" ± {estimate.half_width:.{digits}f}" if estimate.is_bounded else ""
    return f"{estimate.value:.{digits}f}{half}"


def points(estimate: Estimate) -> str:
    """A difference of shares, in points, with its interval."""
    return signed(estimate, digits=1, factor=100)


def signed(estimate: Estimate, digits: int, factor: float = 1) -> str:
    low, high = (f"{factor * end:+.{digits}f}" for end in (estimate.low, estimate.high))
    interval = f" [{low}, {high}]" if estimate.is_bounded else ""
    return f"{factor * estimate.value:+.{digits}f}{interval}"

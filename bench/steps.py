"""What a whole training step took: tokens per second, memory, and where the time went."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pyfinetune.bench.breakdown import GROUPS

STEP, LIMIT = "step", "limit"
_NONE = "-"


def step_rows(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(setting, row) of the steps that were measured."""
    return [
        (page, row)
        for page, run in result["runs"].items()
        for row in run["rows"]
        if row["op"] == STEP and any("ms" in found for found in row.get("results", {}).values())
    ]


def breakdowns(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By who ran it, milliseconds by group, and under `LIMIT` what the machine's rate allows; empty groups left out.

    The profiler's shares are scaled to the time measured without it.
    """
    found = {}
    for name, taken in row["results"].items():
        if "parts_ms" in taken and "ms" in taken:
            scale = taken["ms"] / max(sum(taken["parts_ms"].values()), 1e-9)
            found[name] = {group: scale * taken["parts_ms"].get(group, 0.0) for group in GROUPS}
    if found:
        found[LIMIT] = {group: row["parts_floor_ms"].get(group, 0.0) for group in GROUPS}
    used = [group for group in GROUPS if any(parts[group] > 0 for parts in found.values())]
    return {name: {group: parts[group] for group in used} for name, parts in found.items()}


def _rate(tokens: int | None, milliseconds: float) -> str:
    """Tokens per second; results of an older format do not say how many tokens there were."""
    return _NONE if tokens is None else f"{1e3 * tokens / milliseconds:.0f}"


def step_lines(row: dict[str, Any]) -> list[list[str]]:
    """Of each way to run the step: who, tokens per second, milliseconds, share of the limit, and memory in MB."""
    tokens, lines = row.get("tokens"), []
    for name, found in row["results"].items():
        if "ms" not in found:
            lines.append([name, "WRONG", _NONE, _NONE, _NONE, _NONE])
            continue
        weights, peak = found.get("resident_mb"), found.get("peak_mb", {}).get("both")
        lines.append(
            [
                name,
                _rate(tokens, found["ms"]),
                f"{found['ms']:.0f}",
                f"{row['floor_ms'] / found['ms']:.0%}",
                _NONE if weights is None else f"{weights:.0f}",
                _NONE if None in (weights, peak) else f"{weights + peak:.0f}",
            ]
        )
    lines.append([LIMIT, _rate(tokens, row["floor_ms"]), f"{row['floor_ms']:.0f}", "100%", _NONE, _NONE])
    return lines


STEP_HEADERS = ("who", "tokens/s", "ms", "of limit", "weights, MB", "peak, MB")


def breakdown_lines(row: dict[str, Any]) -> list[list[str]]:
    """A header of who ran it, and for each group the milliseconds of each."""
    found = breakdowns(row)
    if not found:
        return []
    groups = list(next(iter(found.values())))
    return [["", *found], *([group, *(f"{parts[group]:.0f}" for parts in found.values())] for group in groups)]


def step_tables(result: dict[str, Any]) -> list[Table]:
    """Two tables for each step: the ways to run it, and where their time goes."""
    tables = []
    for page, row in step_rows(result):
        table = Table(title=f"{row['case']} ({page} pages)", title_justify="left")
        for header in STEP_HEADERS:
            table.add_column(header, justify="left" if header == "who" else "right")
        for line in step_lines(row):
            table.add_row(*line)
        tables.append(table)
        parts = breakdown_lines(row)
        if parts:
            table = Table(title="milliseconds by group, as the profiler shares them out", title_justify="left")
            for i, header in enumerate(parts[0]):
                table.add_column(header, justify="right" if i else "left")
            for line in parts[1:]:
                table.add_row(*line)
            tables.append(table)
    return tables

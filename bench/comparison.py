"""A result against an older one: what got slower or faster, beyond what such numbers scatter anyway."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pyfinetune.bench.harness import OURS
from pyfinetune.errors import UserError

LEAST = 0.05  # a change smaller than that is noise, however little the times of one run scatter
SLOWER, FASTER, SAME = "slower", "faster", "same"


@dataclass(frozen=True)
class Change:
    """One case of ours under one allocator setting, then and now.

    Args:
        op, case, page: what was measured.
        before, after: median milliseconds.
        ratio: after / before.
        low, high: between which the ratio lies, from the quartiles of both.
        machine: by what factor the machine's own rate, measured beside the case, made it slower.
    """

    op: str
    case: str
    page: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    machine: float

    @property
    def verdict(self) -> str:
        """Slower or faster only where all of the range is, with and without what the machine itself did."""
        for verdict, outside in ((SLOWER, lambda x: x > 1 + LEAST), (FASTER, lambda x: x < 1 - LEAST)):
            nearest = self.low if verdict == SLOWER else self.high
            if outside(nearest) and outside(nearest / self.machine):
                return verdict
        return SAME


def _times(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By (op, case, setting) the rows in which ours was right and timed."""
    return {
        (row["op"], row["case"], page): row
        for page, run in result["runs"].items()
        for row in run["rows"]
        if "ms" in row.get("results", {}).get(OURS, {})
    }


def changes(older: dict[str, Any], newer: dict[str, Any]) -> list[Change]:
    """What both results have, in the newer one's order.

    Args:
        older, newer: results of `runner.run`, or its JSON files.

    Example:
        >>> [change.verdict for change in changes(result, result)]  # doctest: +SKIP
        ['same', 'same']
    """
    before, found = _times(older), []
    for key, row in _times(newer).items():
        if key not in before:
            continue
        then, now = before[key]["results"][OURS], row["results"][OURS]
        ends = [(now.get(a, now["ms"]) / then.get(b, then["ms"])) for a, b in (("ms_q1", "ms_q3"), ("ms_q3", "ms_q1"))]
        same_bound = row.get("bound") == before[key].get("bound") and before[key]["floor_ms"]
        machine = row["floor_ms"] / before[key]["floor_ms"] if same_bound else 1.0
        found.append(Change(*key, then["ms"], now["ms"], now["ms"] / then["ms"], *ends, machine))
    return found


def _identity(result: dict[str, Any]) -> dict[str, str]:
    machine, cpu = result["machine"], result["machine"]["cpu"]
    return {
        "device": result["device"],
        "processor": str(cpu["model"]),
        "threads": str(cpu["threads"]),
        "instruction set": str(cpu["isa"]),
        "GPU": ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or "none",
    }


def differences(older: dict[str, Any], newer: dict[str, Any]) -> list[str]:
    """In what the machines of two results differ, in words."""
    then, now = _identity(older), _identity(newer)
    return [f"{name} was {then[name]}, is {now[name]}" for name in then if then[name] != now[name]]


def check_comparable(
    older: dict[str, Any], newer: dict[str, Any], cases: Iterable[tuple[str, str]], any_machine: bool
) -> None:
    """Raise where a comparison would say nothing.

    Args:
        older: the older result.
        newer: the newer one, of which `device` and `machine` are enough.
        cases: (op, case) of what is to be measured, or was.
        any_machine: compare different machines all the same.

    Raises:
        UserError: no case is in both, or it was another machine and `any_machine` is not set.
    """
    if not {(op, case) for op, case, _page in _times(older)} & set(cases):
        raise UserError(
            "--compare: the older result has none of these cases",
            fix="run it with the options of the older one" + (", which was --quick" if older.get("quick") else ""),
        )
    different = differences(older, newer)
    if different and not any_machine:
        raise UserError(
            f"--compare: the older result is another machine's: {'; '.join(different)}",
            fix="--any-machine compares them all the same",
        )


def show_comparison(older: dict[str, Any], newer: dict[str, Any], any_machine: bool, console: Console) -> None:
    """Print each case's change, and in a line what got slower.

    Raises:
        UserError: see `check_comparable`.
    """
    found = changes(older, newer)
    if found or not newer["interrupted"]:
        check_comparable(older, newer, [(change.op, change.case) for change in found], any_machine)
    for difference in differences(older, newer):
        console.print(f"ANOTHER MACHINE: {difference}; these ratios say nothing about the code", style="bold red")
    versions = [result["machine"]["versions"] for result in (older, newer)]
    table = Table(title=f"against the result of {older['created'][:10]}", title_justify="left")
    for header in ("case", "pages", "then, ms", "now, ms", "now / then", "between", "machine", ""):
        table.add_column(header, overflow="fold", justify="left" if header in ("case", "pages", "") else "right")
    styles = {SLOWER: "red", FASTER: "green", SAME: None}
    for change in found:
        table.add_row(
            change.case,
            change.page,
            f"{change.before:.3g}",
            f"{change.after:.3g}",
            f"{change.ratio:.2f}",
            f"{change.low:.2f} to {change.high:.2f}",
            f"{change.machine:.2f}",
            change.verdict,
            style=styles[change.verdict],
        )
    console.print(table)
    console.print(
        "'between': from the quartiles of both runs; 'machine': by how much its own rate, measured beside the case, "
        f"made it slower. Slower or faster is what lies beyond both, by more than {LEAST:.0%}."
    )
    for name in versions[1]:
        if versions[0].get(name) != versions[1][name]:
            console.print(f"{name} was {versions[0].get(name)}, is {versions[1][name]}")
    slower = [f"{change.case} ({change.page}, {change.ratio:.2f}x)" for change in found if change.verdict == SLOWER]
    console.print(f"slower: {'; '.join(slower)}" if slower else "nothing of ours got slower beyond noise")

"""From what was measured to what is shown: ratios, targets met or missed, in the terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from pyfinetune.bench.harness import OURS

PAGES = ("default", "recycled")
_NONE = "-"


@dataclass
class Line:
    """Ours against one peer in one case; values by allocator setting ("default", "recycled").

    Args:
        op, case: what was measured.
        peer: what it was compared with; None where nothing could be.
        ours, theirs: median milliseconds.
        ratio: theirs / ours, taken within one run.
        of_limit: the floor set by the machine's rates / our time, 1.0 being as fast as it can be.
        target: the case's `Target` against this peer as a dictionary, or None.
        saved: megabytes that ours and the peer keep for the backward pass, where measured.
        problems: what went wrong, in words; `wrong` says whether it was ours.
    """

    op: str
    case: str
    peer: str | None = None
    ours: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    of_limit: dict[str, float] = field(default_factory=dict)
    target: dict[str, float | None] | None = None
    saved: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    wrong: bool = False
    detail: str = ""

    @property
    def headline(self) -> float | None:
        """The smaller of the ratios: what is promised whatever the allocator does."""
        return min(self.ratio.values(), default=None)

    @property
    def met(self) -> bool | None:
        """Whether every part of the target that was measured is reached; None without a target or a measurement."""
        if self.target is None:
            return None
        parts = [self.ratio[page] >= self.target[page] for page in self.ratio if self.target[page] is not None]
        if self.target["of_floor"] is not None:
            parts += [1 / share <= self.target["of_floor"] for share in self.of_limit.values()]
        return all(parts) if parts else None


def _add(line: Line, page: str, row: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """Enter one run's row into a line; `theirs` is the peer's result, None without a peer."""
    ours = row["results"][OURS]
    line.detail = line.detail or ours["detail"]
    if not ours["ok"]:
        line.wrong = True
        line.problems.append(f"WRONG ({page}): {ours['detail']}")
        return
    line.ours[page] = ours["ms"]
    line.of_limit[page] = row["floor_ms"] / ours["ms"]
    if "saved_mb" in ours:
        line.saved[OURS] = ours["saved_mb"]
    if theirs is None:
        return
    if not theirs["ok"]:
        line.problems.append(f"peer WRONG ({page}): {theirs['detail']}")
        return
    line.theirs[page] = theirs["ms"]
    line.ratio[page] = theirs["ms"] / ours["ms"]
    if "saved_mb" in theirs:
        line.saved["peer"] = theirs["saved_mb"]


def _opponents(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str | None, dict[str, Any] | None]:
    """What a row is compared with: its peers, or ours under the best instruction set, or nothing."""
    if row["versus"] is not None:
        best = rows.get(row["versus"], {}).get("results", {}).get(OURS)
        return {"ours, best ISA": best} if best else {None: None}
    peers = {name: result for name, result in row["results"].items() if name != OURS}
    return peers or {None: None}


def lines_of(result: dict[str, Any]) -> list[Line]:
    """One line for each case and peer, over all runs of a result.

    Args:
        result: what `runner.run` returned, or a JSON file of `pyfinetune bench --json`.
    """
    found: dict[tuple[str, str, str | None], Line] = {}
    for page, run in result["runs"].items():
        rows = {row["case"]: row for row in run["rows"]}
        for row in run["rows"]:
            if "error" in row:
                line = found.setdefault((row["op"], row["case"], None), Line(row["op"], row["case"]))
                line.wrong = True
                line.problems.append(f"ERROR ({page}): {row['error']}")
                continue
            for peer, theirs in _opponents(row, rows).items():
                key = (row["op"], row["case"], peer)
                target = row.get("targets", {}).get(peer, row["target"])
                line = found.setdefault(key, Line(row["op"], row["case"], peer, target=target))
                _add(line, page, row, theirs)
                notes = [f"{name} missing: {why}" for name, why in row["missing"].items()]
                line.problems += [note for note in notes if note not in line.problems]
    return list(found.values())


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _pair(values: dict[str, float], form: str | Callable[[float], str]) -> str:
    shown = form if callable(form) else lambda value: format(value, form)
    return " / ".join(shown(values[page]) if page in values else _NONE for page in PAGES) if values else _NONE


def _target_text(line: Line) -> str:
    if line.target is None:
        return _NONE
    if line.target["of_floor"] is not None:
        return f"≤ {line.target['of_floor']:g} x limit"
    return "≥ " + _pair({page: line.target[page] for page in PAGES if line.target[page] is not None}, ".3g")


def _check_text(line: Line) -> str:
    return "; ".join(line.problems) if line.problems else line.detail


def _cells(line: Line) -> list[str]:
    saved = _NONE
    if line.saved:
        saved = " / ".join(f"{line.saved[who]:.1f}" for who in (OURS, "peer") if who in line.saved)
    return [
        line.case,
        _pair(line.ours, _milliseconds),
        line.peer or _NONE,
        _pair(line.theirs, _milliseconds),
        _pair(line.ratio, ".2f"),
        _NONE if line.headline is None else f"{line.headline:.2f}x",
        _target_text(line) + {True: " ✓", False: " missed", None: ""}[line.met],
        _pair(line.of_limit, ".0%"),
        saved,
    ]


HEADERS = (
    "case",
    "ours, ms",
    "peer",
    "peer, ms",
    "peer / ours",
    "headline",
    "target",
    "of limit",
    "saved, MB",
)
SHORT_HEADERS = ("case", "ours, ms", "peer", "peer, ms", "headline", "target")


def machine_line(result: dict[str, Any]) -> str:
    """The machine and versions of a result in one line."""
    machine = result["machine"]
    cpu, versions = machine["cpu"], machine["versions"]
    packages = [f"{name} {versions[name]}" for name in ("torch", "bitsandbytes", "peft") if versions[name]]
    return (
        f"{cpu['model']}, {cpu['threads']} threads, {cpu['isa']}; pyfinetune {versions['pyfinetune']}, "
        f"{', '.join(packages)}; {result['created'][:10]}"
    )


def ceilings_line(result: dict[str, Any]) -> str:
    """What the machine itself can do, as measured in each run."""
    parts = []
    for page, run in result["runs"].items():
        rates = run["ceilings"]
        if rates:
            parts.append(
                f"{page}: copy {rates['copy_gbs']:.1f} GB/s, GEMM {rates['gemm_bf16_gflops']:.0f} GFLOP/s bf16, "
                f"{rates['gemm_fp32_gflops']:.0f} fp32"
            )
    return "limits measured, " + "; ".join(parts)


EXPLANATION = (
    "Pairs are with the allocator as it comes / with recycled pages; the headline is the smaller ratio. "
    "'of limit': time that the machine's own GEMM or copy rate, measured with each case, allows / our time. "
    "'saved': kept for the backward pass, ours / peer."
)


def table_of(result: dict[str, Any]) -> Table:
    """The result as a table for the terminal."""
    table = Table(title=machine_line(result), caption=f"{ceilings_line(result)}\n{EXPLANATION}", title_justify="left")
    for header in (*HEADERS, "check"):
        table.add_column(header, overflow="fold", no_wrap=header == "headline")
    last_op = None
    for line in lines_of(result):
        if last_op not in (None, line.op):
            table.add_section()
        last_op = line.op
        style = "red" if line.wrong else "yellow" if line.met is False else None
        table.add_row(*_cells(line), _check_text(line), style=style)
    return table


def markdown_of(result: dict[str, Any], promised: bool = False) -> str:
    """The result as a Markdown table with the machine above it and what the columns mean below.

    Args:
        result: what `runner.run` returned.
        promised: only the cases that have a target, and fewer columns.
    """
    columns = [HEADERS.index(header) for header in (SHORT_HEADERS if promised else HEADERS)]
    rows = []
    for line in lines_of(result):
        if promised and line.target is None and not line.wrong:
            continue
        cells = _cells(line)
        if line.wrong:
            cells[HEADERS.index("ours, ms")] = "WRONG"
        rows.append([cells[column].replace("|", "\\|") for column in columns])
    head = [[HEADERS[column] for column in columns], ["---"] * len(columns)]
    table = [f"| {' | '.join(cells)} |" for cells in head + rows]
    notes = [] if promised else [ceilings_line(result) + ". " + EXPLANATION]
    return "\n".join([machine_line(result) + ".", "", *table, *(["", *notes] if notes else [])])

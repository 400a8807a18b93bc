"""From what was measured to what is shown: ratios, targets met or missed, in the terminal or in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pyfinetune.bench.harness import OURS
from pyfinetune.errors import UserError
from pyfinetune.machine import info

PAGES = ("default", "recycled")
PEER, BEST_ISA = "peer", "ours, best ISA"
EVEN = 0.03  # a headline within that of 1 is neither a gain nor a loss
_NONE = "-"


def facts_to_share() -> dict[str, Any]:
    """`pf.info` as it is kept with a result: without the package's place, which says only whose machine it is."""
    return {name: value for name, value in info().items() if name != "path"}


def read_result(path: Path, option: str) -> dict[str, Any]:
    """A result that was written by `pyfinetune bench --json`.

    Args:
        path: the file.
        option: what it was given with, for the message.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        lines_of(result)
        machine_line(result)
        return result
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{option} {path}: is no result of the benchmark ({type(error).__name__}: {error})",
            fix=f"write one: pyfinetune bench --json {path}",
        ) from error


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
        spread: the middle half of our times, as a share of the median.
        forward, backward: median milliseconds of ours and the peer's in each pass, with the first setting measured.
        saved: megabytes that ours and the peer keep for the backward pass, where measured.
        peak: megabytes that they take at their peak.
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
    spread: dict[str, float] = field(default_factory=dict)
    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    wrong: bool = False
    detail: str = ""

    @property
    def headline(self) -> float | None:
        """The smaller of the ratios: what is promised whatever the allocator does."""
        return min(self.ratio.values(), default=None)

    @property
    def compared(self) -> bool:
        """Whether there is a ratio to a peer; ours under another instruction set is none."""
        return self.headline is not None and self.peer != BEST_ISA

    @property
    def lost(self) -> bool:
        """Whether the peer is faster, by more than nothing."""
        return self.compared and self.headline < 1 - EVEN

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
    if "ms_q1" in ours:
        line.spread[page] = (ours["ms_q3"] - ours["ms_q1"]) / ours["ms"]
    _add_details(line, OURS, ours)
    if theirs is None:
        return
    if not theirs["ok"]:
        line.problems.append(f"peer WRONG ({page}): {theirs['detail']}")
        return
    line.theirs[page] = theirs["ms"]
    line.ratio[page] = theirs["ms"] / ours["ms"]
    _add_details(line, PEER, theirs)


def _add_details(line: Line, who: str, result: dict[str, Any]) -> None:
    """What is measured beside the time, from the first setting that has it."""
    for half in ("forward", "backward"):
        if half in result:
            getattr(line, half).setdefault(who, result[half]["ms"])
    if "saved_mb" in result:
        line.saved.setdefault(who, result["saved_mb"])
    if "peak_mb" in result:
        line.peak.setdefault(who, result["peak_mb"]["both"])


def _opponents(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str | None, dict[str, Any] | None]:
    """What a row is compared with: its peers, or ours under the best instruction set, or nothing."""
    if row["versus"] is not None:
        best = rows.get(row["versus"], {}).get("results", {}).get(OURS)
        return {BEST_ISA: best} if best else {None: None}
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


def _two(values: dict[str, float], form: Callable[[float], str]) -> str:
    """Ours / the peer's."""
    return " / ".join(form(values[who]) for who in (OURS, PEER) if who in values) or _NONE


def _cells(line: Line) -> dict[str, str]:
    return {
        "case": line.case,
        "ours, ms": _pair(line.ours, _milliseconds),
        "spread": _pair(line.spread, ".0%"),
        "peer": line.peer or _NONE,
        "peer, ms": _pair(line.theirs, _milliseconds),
        "peer / ours": _pair(line.ratio, ".2f"),
        "headline": _NONE if line.headline is None else f"{line.headline:.2f}x",
        "target": _target_text(line) + {True: " ✓", False: " missed", None: ""}[line.met],
        "of limit": _pair(line.of_limit, ".0%"),
        "forward, ms": _two(line.forward, _milliseconds),
        "backward, ms": _two(line.backward, _milliseconds),
        "saved, MB": _two(line.saved, lambda value: f"{value:.1f}"),
        "peak, MB": _two(line.peak, lambda value: f"{value:.1f}"),
    }


_ALL_HEADERS = tuple(_cells(Line("", "")))
_EVERYWHERE = ("case", "ours, ms", "peer", "peer, ms", "headline")  # whatever was measured
SHORT_HEADERS = ("case", "ours, ms", "peer", "peer, ms", "headline", "target")
_TERMINAL = ("case", "ours, ms", "spread", "peer", "peer, ms", "headline", "target", "of limit", "forward, ms")
_TERMINAL += ("backward, ms", "peak, MB")


def _headers(cells: list[dict[str, str]], among: Iterable[str]) -> list[str]:
    """Those of the columns that hold anything."""
    return [header for header in among if header in _EVERYWHERE or any(row[header] != _NONE for row in cells)]


def rows_of(lines: list[Line], promised: bool = False) -> tuple[list[str], list[list[str]]]:
    """The headers and the cells of a table of the lines; `promised` for fewer columns."""
    cells = [_cells(line) | ({"ours, ms": "WRONG"} if line.wrong else {}) for line in lines]
    headers = _headers(cells, SHORT_HEADERS if promised else _ALL_HEADERS)
    return headers, [[row[header] for header in headers] for row in cells]


def peers_line(result: dict[str, Any]) -> str:
    """The peers with their versions, and which are missing and why."""
    peers = result.get("peers", {})
    here = [f"{n} {p['version']}" for n, p in peers.items() if not p["missing"] and not p["left_out"]]
    missing = [f"{name} ({peer['missing']})" for name, peer in peers.items() if peer["missing"]]
    left = [f"{n} ({p['left_out']})" for n, p in peers.items() if p["left_out"] and not p["missing"]]
    parts = [("peers", here), ("missing", missing), ("left out", left)]
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in parts if found)


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
    "'spread': the middle half of our times, as a share of the median. Ours / the peer's: time of the 'forward' "
    "and the 'backward' pass, megabytes 'saved' for the backward pass, and taken at the 'peak' of the whole call."
)


def table_of(result: dict[str, Any]) -> Table:
    """The result as a table for the terminal."""
    table = Table(title=machine_line(result), caption=f"{ceilings_line(result)}\n{EXPLANATION}", title_justify="left")
    lines = lines_of(result)
    cells = [_cells(line) for line in lines]
    headers = _headers(cells, _TERMINAL)
    for header in (*headers, "check"):
        table.add_column(header, overflow="fold", no_wrap=header == "headline")
    for line, row, before in zip(lines, cells, [None, *lines], strict=False):
        if before is not None and before.op != line.op:
            table.add_section()
        style = "red" if line.wrong else "yellow" if line.met is False else None
        table.add_row(*(row[header] for header in headers), _check_text(line), style=style)
    return table


def markdown_of(result: dict[str, Any], promised: bool = False) -> str:
    """The result as a Markdown table with the machine above it and what the columns mean below.

    Args:
        result: what `runner.run` returned.
        promised: only the cases that have a target, and fewer columns.
    """
    lines = [line for line in lines_of(result) if not promised or line.target is not None or line.wrong]
    headers, rows = rows_of(lines, promised)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    table = [f"| {' | '.join(row)} |" for row in [headers, ["---"] * len(headers), *rows]]
    notes = [] if promised else [ceilings_line(result) + ". " + EXPLANATION]
    if not promised and "peers" in result:
        notes.append(peers_line(result) + ".")
    return "\n".join([machine_line(result) + ".", "", *table, *(line for note in notes for line in ("", note))])

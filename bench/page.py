"""One page of a result that opens from disk: tables and pictures in one file, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from pyfinetune.bench.plots import time_name, write_figures
from pyfinetune.bench.results import EVEN, EXPLANATION, Line, ceilings_line, lines_of, machine_line, rows_of
from pyfinetune.bench.steps import STEP_HEADERS, breakdown_lines, step_lines, step_rows

NAME = "report.html"

_CSS = """
:root { color-scheme: light dark; --ink: #222; --dim: #666; --line: #ddd; --paper: #fff; --bad: #b3261e;
  --good: #0b6e4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --dim: #a0a0a0; --line: #3a3a3a; --paper: #16181b; --bad: #ff8a80; --good: #6fd3a7; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1180px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } .dim { color: var(--dim); font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; padding: 0; list-style: none; }
.tiles li { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; }
.tiles b { display: block; font-size: 1.4rem; line-height: 1.2; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0 1rem; }
.scroll img { display: block; width: 100%; min-width: 640px; height: auto; background: #fff; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child { white-space: normal; min-width: 15rem; } tr:last-child td { border-bottom: 0; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); }
"""


def _table(headers: list[str], rows: list[list[str]], classes: list[str] | None = None) -> str:
    head = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in headers)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row, kind in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<div class="scroll" tabindex="0"><img alt="{html.escape(what, quote=True)}" '
        f'src="data:image/svg+xml;base64,{data}"></div>'
    )


def _tiles(lines: list[Line]) -> str:
    """How many cases won, lost, met their target, and were wrong."""
    compared = [line for line in lines if line.compared]
    faster = sum(line.headline > 1 + EVEN for line in compared)
    wrong = sum(line.wrong for line in lines)
    slower = sum(line.lost for line in lines)
    aimed = [line for line in lines if line.met is not None]
    numbers = [
        (f"{faster} of {len(compared)}", "comparisons in which ours is faster", ""),
        (str(slower), "in which ours is slower", "bad" if slower else ""),
        *([(f"{sum(line.met for line in aimed)} of {len(aimed)}", "targets met", "")] if aimed else []),
        (str(wrong), "wrong or failed", "bad" if wrong else "good"),
    ]
    tiles = "".join(f'<li><b class="{kind}">{number}</b>{text}</li>' for number, text, kind in numbers)
    return f'<ul class="tiles">{tiles}</ul>'


def _losses(lines: list[Line]) -> str:
    """The cases that ours loses, before anything else."""
    lost = sorted((line for line in lines if line.lost), key=lambda line: line.headline)
    if not lost:
        return ""
    headers, rows = rows_of(lost)
    return "<h2>Where ours is slower</h2>" + _table(headers, rows)


def _op_section(op: str, lines: list[Line], pictures: dict[str, str]) -> str:
    headers, rows = rows_of(lines)
    kinds = ["bad" if line.wrong or line.lost else "" for line in lines]
    checks = [["; ".join(line.problems) or line.detail] for line in lines]
    table = _table([*headers, "check"], [row + check for row, check in zip(rows, checks, strict=True)], kinds)
    return f"<h2>{html.escape(op)}</h2>{pictures.get(time_name(op), '')}{table}"


def _steps(result: dict[str, Any], pictures: dict[str, str]) -> str:
    """The training steps: tokens per second, memory, and where the time goes."""
    parts = [picture for name, picture in pictures.items() if name.startswith("step-")]
    for page, row in step_rows(result):
        parts.append(f"<p><b>{html.escape(row['case'])}</b>, {page} pages</p>")
        parts.append(_table(list(STEP_HEADERS), step_lines(row)))
        found = breakdown_lines(row)
        if found:
            parts.append('<p class="dim">Milliseconds by group, as the profiler shares them out.</p>')
            parts.append(_table(found[0], found[1:]))
    return "<h2>Training steps</h2>" + "".join(parts) if parts else ""


def _peers(result: dict[str, Any]) -> str:
    rows = [
        [name, peer["version"] or "-", peer["missing"] or peer["left_out"] or "measured where a case has it"]
        for name, peer in result.get("peers", {}).items()
    ]
    return "<h2>Peers</h2>" + _table(["peer", "version", "here"], rows) if rows else ""


def page_of(result: dict[str, Any], pictures: dict[str, str]) -> str:
    """The whole page.

    Args:
        result: what `runner.run` returned.
        pictures: HTML by name, as `write_page` makes it of `plots.write_figures`.
    """
    lines = lines_of(result)
    notes = ["Quick: small shapes, where fixed costs count."] if result["quick"] else []
    notes += ["Interrupted: this is what was done."] if result["interrupted"] else []
    ops = dict.fromkeys(line.op for line in lines)
    body = [
        "<h1>pyfinetune bench</h1>",
        f'<p class="dim">{html.escape(machine_line(result))}</p>',
        *(f"<p><b>{note}</b></p>" for note in notes),
        _tiles(lines),
        _losses(lines),
        "<h2>Against every peer</h2>" + pictures["ratios"] if "ratios" in pictures else "",
        _steps(result, pictures),
        *(_op_section(op, [line for line in lines if line.op == op], pictures) for op in ops),
        _peers(result),
        f"<h2>How to read this</h2><p>{html.escape(EXPLANATION)}</p>",
        f'<p class="dim">{html.escape(ceilings_line(result))}</p>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>pyfinetune bench</title><style>{_CSS}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Write the pictures (PNG and SVG) and `report.html`, which holds them all, to a folder.

    Args:
        result: what `runner.run` returned.
        folder: where; made where it is missing.

    Returns:
        The page.

    Example:
        >>> write_page(result, Path("plots"))  # doctest: +SKIP
        PosixPath('plots/report.html')
    """
    written = write_figures(result, folder)
    pictures = {name: _picture(path, what) for name, what, path in written}
    path = folder / NAME
    path.write_text(page_of(result, pictures), encoding="utf-8")
    return path

"""The result of `gpu_check` as Markdown: machine, benchmark, tests, and what went wrong."""

from __future__ import annotations

from typing import Any

from pyfinetune.bench.harness import OURS

_NONE = "-"
HEADERS = ("case", "goal", "who", "ms", "forward, ms", "with host, ms", "tokens/s", "theirs / ours", "of limit")
HEADERS += ("peak, MB", "note")
_BLANK = [_NONE] * (len(HEADERS) - 4)


def _number(value: float | None, form: str = ".3g") -> str:
    return _NONE if value is None else format(value, form)


def what_is_wrong(ours: dict[str, Any]) -> str:
    """Why our own result does not count, in words."""
    return f"{'OUT OF MEMORY' if ours.get('out_of_memory') else 'WRONG'}: {ours['detail']}"


def _row_cells(row: dict[str, Any], name: str) -> list[str]:
    """One line of the table: ours, or a peer beside it."""
    result, ours = row["results"][name], row["results"][OURS]
    milliseconds = result.get("ms")
    ratio = milliseconds / ours["ms"] if name != OURS and milliseconds and "ms" in ours else None
    note = "; ".join(part for part in (result["detail"], ", ".join(row["ran_on"])) if part) if name == OURS else ""
    if not result["ok"]:
        note = what_is_wrong(result) if name == OURS else f"not right here: {result['detail']}"
    return [
        row["case"] if name == OURS else "",
        row["goal"] if name == OURS else "",
        name,
        _number(milliseconds),
        _number(result.get("forward_ms")),
        _number(result.get("wall_ms")),
        _number(result.get("tokens_per_second"), ".0f"),
        _number(ratio, ".2f"),
        _NONE if not milliseconds else f"{row['floor_ms'] / milliseconds:.0%}",
        _number(result.get("peak_mb"), ".0f") + _planned(result),
        note,
    ]


def _planned(result: dict[str, Any]) -> str:
    """What the peak was predicted to be, where it was."""
    return f" ({result['planned_mb']:.0f} planned)" if "planned_mb" in result else ""


def _bench_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for part in result["parts"]:
        for row in part.get("rows", ()):
            if "error" in row:
                rows.append([row["case"], "", OURS, *_BLANK, f"ERROR: {row['error']}"])
                continue
            rows += [_row_cells(row, name) for name in row["results"]]
            rows += [["", "", name, *_BLANK, why] for name, why in row["missing"].items()]
        if part.get("cut_off"):
            rows.append([part["cut_off"], "", OURS, *_BLANK, "cut off: the time was up"])
    return rows


def _table(headers: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |")
    return lines


def _machine_lines(result: dict[str, Any]) -> list[str]:
    facts = result["machine"]
    gpus = "; ".join(f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gb']:.0f} GB" for gpu in facts["gpus"])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [f"{gpus or 'no GPU'}; {facts['cpu']['model']}; {versions}."]
    if facts.get("nvidia_smi"):
        lines.append(f"Driver, highest SM clock, power limit: {facts['nvidia_smi']}.")
    rates = next((part["ceilings"] for part in result["parts"] if part.get("ceilings")), None)
    if rates:
        lines.append(
            f"Limits measured: copy {rates['copy_gbs']:.0f} GB/s, GEMM {rates['gemm_bf16_gflops'] / 1e3:.3g} TFLOP/s "
            f"bf16, {rates['gemm_fp32_gflops'] / 1e3:.3g} fp32."
        )
    return lines


def _test_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for part in result["parts"]:
        if part["kind"] == "tests":
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(part["counts"].items()))
            rows.append([part["name"], part["status"], f"{part['seconds']:.0f}", counts or "nothing ran"])
    return rows


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


def markdown_of(result: dict[str, Any]) -> str:
    """Everything that a reader wants to see of a result of `gpu_check.run`."""
    title = "# GPU check" + (" (dry run on a CPU: the numbers mean nothing)" if result["dry_run"] else "")
    took = f"{result['created']}, {result['seconds']:.0f} s, of which the build {result['build_seconds']:.0f} s."
    lines = [title, "", took, "", *_machine_lines(result), ""]
    lines += [f"- Problem: {problem}" for problem in result["problems"]]
    lines += [f"- Note: {note}" for note in result["notes"]]
    lines += [""] * bool(result["problems"] or result["notes"])
    bench = _bench_rows(result)
    if bench:
        lines += ["## Benchmark", "", *_table(HEADERS, bench), ""]
        lines += [
            "'ms': median of the GPU's own time, cache flushed, host ahead. 'with host': one call from start to end.",
            "'of limit': the time that the machine's own GEMM or copy rate allows / the time taken.",
            "",
        ]
    tests = _test_rows(result)
    if tests:
        lines += ["## Tests", "", *_table(("part", "status", "seconds", "outcomes"), tests), ""]
    for part in result["parts"]:
        for failure in part.get("failures", ()):
            lines.append(f"- `{failure['test']}`: {_last_line(failure['message'])}")
        lines += [f"- {error}" for error in part.get("errors", ())]
        if part["status"] == "timed out":
            lines.append(f"- {part['name']} took longer than it may")
        elif part["status"].startswith(("left out", "not run")):
            lines.append(f"- {part['name']}: {part['status']}")
        elif part["status"] == "failed" and not part.get("failures") and not part.get("errors"):
            lines.append(f"- {part['name']} ended with {part['exit_code']}: {_last_line(part.get('log', ''))}")
    return "\n".join(lines) + "\n"

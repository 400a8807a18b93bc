"""`pyfinetune bench`: the same cases under two allocator settings, one table, and an exit code.

glibc gives every tensor of 32 MiB and more fresh pages, and touching those costs more than most kernels do. Whoever
makes fewer large tensors then looks faster than its kernels are; so everything is measured twice, with the allocator
as it comes and with pages recycled, and the headline is the smaller gain.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyfinetune.bench import cases_of, op_names
from pyfinetune.bench.results import PAGES, lines_of, table_of
from pyfinetune.errors import UserError
from pyfinetune.machine import info

RECYCLED = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
_ALLOCATOR_SETTINGS = (*RECYCLED, "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
_WIDE = 170  # columns, where the output is no terminal


def worker_environment(pages: str, isa: str | None) -> dict[str, str]:
    """The environment of a worker: ours without what sets the allocator up, plus what this run asks for."""
    environment = {name: value for name, value in os.environ.items() if name not in _ALLOCATOR_SETTINGS}
    if pages == "recycled":
        environment |= RECYCLED
    if isa is not None:
        environment["PYFINETUNE_CPU_ISA"] = isa
    # A checkout's folders `kernels` and `bench` must not pass for packages of those names.
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def worker_messages(arguments: list[str], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Start a worker and yield what it says; an abnormal end is the last message, {"died": ..., "stderr": ...}."""
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "pyfinetune.bench.worker", "--fd", str(write_end), *arguments]
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[write_end],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        os.close(write_end)
        try:
            with os.fdopen(read_end, encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if code:
            errors.seek(0)
            yield {"died": code, "stderr": errors.read().decode(errors="replace").strip()}


def _collect(run: dict[str, Any], messages: Iterator[dict[str, Any]], on_start: Callable[[str], None], on_row) -> None:
    """Enter a worker's messages into the run."""
    started = None
    for message in messages:
        if "ceilings" in message:
            run["ceilings"] = run["ceilings"] or message["ceilings"]
        elif "start" in message:
            started = message["start"]
            on_start(started)
        elif "row" in message:
            run["rows"].append(message["row"])
            started = None
            on_row()
        else:
            tail = message["stderr"].splitlines()[-1:] or ["no message"]
            where = started or "starting up"
            row = {
                "op": "worker",
                "case": where,
                "isa": None,
                "error": f"process ended with {message['died']}: {tail[0]}",
            }
            run["rows"].append(row)


def _isas_to_force(cases: list, facts: dict[str, Any]) -> list[str]:
    """The instruction sets that cases ask for, that this machine has, and that are not the best one anyway."""
    cpu = facts["cpu"]
    if "PYFINETUNE_CPU_ISA" in os.environ:
        return []
    wanted = dict.fromkeys(case.isa for case in cases if case.isa is not None)
    return [isa for isa in wanted if isa in cpu["isas"] and isa != cpu["isa"]]


def run(
    ops: list[str],
    quick: bool = False,
    recycled: bool | None = None,
    seconds: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure, and return everything in plain values.

    Args:
        ops: which; all when empty.
        quick: small shapes and little time, to see that all is right.
        recycled: True or False for one allocator setting only, None for both.
        seconds: time to spend on timing each case; 3, or 0.3 with `quick`.
        device: "cpu" or "cuda"; on a GPU there is one allocator setting, the one as it comes.
        progress: shows how far it is.

    Returns:
        `created`, `quick`, `device`, `machine` (see `pf.info`), `interrupted`, and under `runs` for each allocator
        setting the `ceilings` and `rows` of `harness.measure`. Ctrl-C ends it early with what there is.

    Raises:
        UserError: an op that has no benchmark.
    """
    cases, facts = cases_of(ops, quick), info()
    pages = [page for page in PAGES if recycled is None or recycled == (page == "recycled")]
    if device != "cpu":
        pages = pages[:1]
    isas = _isas_to_force(cases, facts) if device == "cpu" else []
    seconds = seconds if seconds is not None else 0.3 if quick else 3.0
    arguments = ["--device", device, "--seconds", str(seconds), *(["--quick"] if quick else [])]
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "device": device,
        "machine": dict(facts),
        "interrupted": False,
        "runs": {page: {"ceilings": {}, "rows": []} for page in pages},
    }
    progress = progress or Progress(disable=True)
    count = sum(case.isa is None or case.isa in isas for case in cases)
    task = progress.add_task("measuring the machine", total=count * len(pages))
    try:
        for page in pages:
            for isa in (None, *isas):
                chosen = [*arguments, *(["--isa", isa] if isa else []), *ops]
                with contextlib.closing(worker_messages(chosen, worker_environment(page, isa))) as messages:
                    _collect(
                        result["runs"][page],
                        messages,
                        lambda name, page=page: progress.update(task, description=f"{name} ({page} pages)"),
                        lambda: progress.advance(task),
                    )
    except KeyboardInterrupt:
        result["interrupted"] = True
    return result


def main(
    ops: list[str] | None = None,
    quick: bool = False,
    json_path: str | os.PathLike | None = None,
    recycled: bool | None = None,
    seconds: float | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> int:
    """Measure, print the table, and write it where asked.

    Args:
        ops, quick, recycled, seconds, device: see `run`.
        json_path: file to write the whole result to.
        console: where to print.

    Returns:
        The exit code: 1 when a result of ours is wrong or a case failed, 130 when interrupted, else 0.

    Raises:
        UserError: an op that has no benchmark, a device that is not there, or a file that cannot be written.

    Example:
        >>> from pyfinetune.bench import runner
        >>> runner.main(["nf4"], quick=True)
    """
    console = console or Console(width=None if sys.stdout.isatty() else _WIDE)
    path = None if json_path is None else Path(json_path)
    if path is not None and not path.resolve().parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}", fix=f"mkdir -p {path.parent}")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: is neither cpu nor cuda")
    if device == "cuda" and not info()["gpus"]:
        raise UserError("--device cuda: torch sees no GPU on this machine", fix="pyfinetune bench --device cpu")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        result = run(list(ops or []), quick, recycled, seconds, device, progress)
    console.print(table_of(result))
    if quick:
        console.print("quick: small shapes, where fixed costs count; targets are stated for the full ones.")
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {path}")
    if result["interrupted"]:
        console.print("interrupted: the table holds what was done")
        return 130
    return int(any(line.wrong for line in lines_of(result)))


__all__ = ["main", "op_names", "run"]

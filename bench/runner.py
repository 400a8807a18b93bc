"""`pyfinetune bench`: the same cases under two allocator settings, one table, and an exit code.

glibc gives every tensor of 32 MiB and more fresh pages, and touching those costs more than most kernels do. Whoever
makes fewer large tensors then looks faster than its kernels are; so everything is measured twice, with the allocator
as it comes and with pages recycled, and the headline is the smaller gain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyfinetune.bench.comparison import check_comparable, show_comparison
from pyfinetune.bench.peer_names import peer_list
from pyfinetune.bench.request import Request
from pyfinetune.bench.results import PAGES, facts_to_share, lines_of, peers_line, read_result, table_of
from pyfinetune.bench.steps import step_tables
from pyfinetune.errors import UserError
from pyfinetune.machine import info

RECYCLED = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
_ALLOCATOR_SETTINGS = (*RECYCLED, "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
_WIDE = 170  # columns, where the output is no terminal


def worker_environment(pages: str, isa: str | None, backend: str | None = None) -> dict[str, str]:
    """The environment of a worker: ours without what sets the allocator up, plus what this run asks for."""
    environment = {name: value for name, value in os.environ.items() if name not in _ALLOCATOR_SETTINGS}
    if pages == "recycled":
        environment |= RECYCLED
    if isa is not None:
        environment["PYFINETUNE_CPU_ISA"] = isa
    if backend is not None:
        environment["PYFINETUNE_BACKEND"] = backend
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


def run(request: Request, recycled: bool | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, and return everything in plain values.

    Args:
        request: what.
        recycled: True or False for one allocator setting only, None for both; a GPU has one, the one as it comes.
        progress: shows how far it is.

    Returns:
        `created`, `quick`, `device`, `machine` (see `pf.info`), `request`, `peers` (see `peer_list`), `left_out`,
        `interrupted`, and under `runs` for each allocator setting the `ceilings` and `rows` of `harness.measure`.
        Ctrl-C ends it early with what there is.

    Raises:
        UserError: a request that makes no sense here.
    """
    request.check()
    cases, facts = request.cases(), info()
    pages = [page for page in PAGES if recycled is None or recycled == (page == "recycled")]
    if request.device != "cpu":
        pages = pages[:1]
    isas = _isas_to_force(cases, facts) if request.device == "cpu" and request.backend in (None, "cpu") else []
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": request.quick,
        "device": request.device,
        "machine": facts_to_share(),
        "request": dataclasses.asdict(request),
        "peers": peer_list(request.device, request.peers),
        "left_out": request.left_out(),
        "interrupted": False,
        "runs": {page: {"ceilings": {}, "rows": []} for page in pages},
    }
    progress = progress or Progress(disable=True)
    count = sum(case.isa is None or case.isa in isas for case in cases)
    task = progress.add_task("measuring the machine", total=count * len(pages))
    try:
        for page in pages:
            for isa in (None, *isas):
                if not any(case.isa == isa for case in cases):
                    continue
                chosen = ["--request", request.to_json(), *(["--isa", isa] if isa else [])]
                chosen += ["--once"] if page == pages[0] else []
                environment = worker_environment(page, isa, request.backend)
                with contextlib.closing(worker_messages(chosen, environment)) as messages:
                    _collect(
                        result["runs"][page],
                        messages,
                        lambda name, page=page: progress.update(task, description=f"{name} ({page} pages)"),
                        lambda: progress.advance(task),
                    )
    except KeyboardInterrupt:
        result["interrupted"] = True
    return result


@dataclass(frozen=True)
class Output:
    """What becomes of a result.

    Args:
        json_path: file to write the whole result to.
        plot_dir: folder for pictures and the page that holds them; made where it is missing.
        compare_path: an older result to compare with.
        any_machine: compare with it even if it is another machine's.
    """

    json_path: Path | None = None
    plot_dir: Path | None = None
    compare_path: Path | None = None
    any_machine: bool = False

    def check(self) -> dict[str, Any] | None:
        """Raise what can be known before anything is measured; returns the older result.

        Raises:
            UserError: a folder that is not there, a result that cannot be read, or matplotlib is missing.
        """
        if self.json_path is not None and not self.json_path.resolve().parent.is_dir():
            parent = self.json_path.parent
            raise UserError(f"--json {self.json_path}: there is no folder {parent}", fix=f"mkdir -p {parent}")
        if self.plot_dir is not None:
            if self.plot_dir.exists() and not self.plot_dir.is_dir():
                raise UserError(f"--plot {self.plot_dir}: is no folder")
            if importlib.util.find_spec("matplotlib") is None:
                raise UserError("--plot: needs matplotlib", fix="pip install 'pyfinetune[bench]'")
        return None if self.compare_path is None else read_result(self.compare_path, "--compare")


def main(
    request: Request,
    output: Output | None = None,
    recycled: bool | None = None,
    load: Path | None = None,
    console: Console | None = None,
) -> int:
    """Measure, print the table, and write it where asked.

    Args:
        request: what to measure.
        output: what becomes of it; printed only without it.
        recycled: see `run`.
        load: a result to take instead of measuring one.
        console: where to print.

    Returns:
        The exit code: 1 when a result of ours is wrong or a case failed, 130 when interrupted, else 0.

    Raises:
        UserError: a request that makes no sense here, or a file that cannot be read or written.

    Example:
        >>> from pyfinetune.bench import runner
        >>> runner.main(Request(("nf4",), quick=True))
    """
    console = console or Console(width=None if sys.stdout.isatty() else _WIDE)
    output = output or Output()
    older = output.check()
    if load is not None:
        result = read_result(load, "--load")
    else:
        request.check()
        if older is not None:
            facts = {"device": request.device, "machine": info()}
            check_comparable(older, facts, [(case.op, case.name) for case in request.cases()], output.any_machine)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            result = run(request, recycled, progress)
    show(result, console)
    if older is not None:
        show_comparison(older, result, output.any_machine, console)
    if output.json_path is not None:
        output.json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {output.json_path}")
    if output.plot_dir is not None:
        from pyfinetune.bench.page import write_page

        console.print(f"pictures and report: {write_page(result, output.plot_dir)}")
    if result["interrupted"]:
        console.print("interrupted: the table holds what was done")
        return 130
    return int(any(line.wrong for line in lines_of(result)))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables of a result, and what is not in them."""
    console.print(table_of(result))
    for table in step_tables(result):
        console.print(table)
    console.print(peers_line(result))
    if result.get("left_out"):
        console.print(f"no cases of what was asked for: {', '.join(result['left_out'])}")
    if result["quick"]:
        console.print("quick: small shapes, where fixed costs count; targets are stated for the full ones.")

"""What the Triton kernels take on every supported GPU: `python -m pyfinetune.bench.compile_report`, no GPU needed.

It ends with 1 when a kernel would not run there, or not well: too much shared memory, spilled registers, a matrix
product without tensor cores, or an error of the compiler.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyfinetune.bench.compilations import (
    CAPABILITIES,
    Compiled,
    compilations_of,
    kernel_modules,
    kernels_never_compiled,
    prepare_worker,
    tasks,
    work,
)
from pyfinetune.errors import UserError

_JOBS = 2
_WIDE = 190  # columns, where the output is no terminal


def compile_all(
    modules: list[str],
    capabilities: list[int],
    jobs: int = _JOBS,
    done: Callable[[Compiled], None] = lambda row: None,
    alternatives: bool = True,
) -> list[Compiled]:
    """Compile everything that the modules would launch on the GPUs, in processes of its own.

    Args:
        modules: names from `kernel_modules`.
        capabilities: of the GPUs, 86 for sm_86.
        jobs: processes at a time.
        done: is told of each kernel when it is finished.
        alternatives: also the configurations that only a measurement could choose.

    Returns:
        A row for each, in the modules' order.
    """
    rows: dict[tuple[str, int, int], Compiled] = {}
    with tempfile.TemporaryDirectory(prefix="pyfinetune-triton-") as cache:
        waiting = todo = list(tasks(modules, capabilities, alternatives))
        while waiting:
            for task, row in _compiled(waiting, jobs, cache):
                rows[task] = row
                done(row)
            # A compiler that crashes takes its process and the pool along: the first of what is left is to blame, or
            # is compiled alone to find out.
            waiting = [task for task in waiting if task not in rows]
            if waiting:
                rows[waiting[0]] = _alone(waiting.pop(0), cache)
                done(next(reversed(rows.values())))
    return [rows[task] for task in todo]


def pool_of(jobs: int, cache: str) -> ProcessPoolExecutor:
    """Processes that compile, at most so many."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_worker, initargs=(cache,))


def _compiled(waiting: list, jobs: int, cache: str) -> Iterator[tuple[tuple[str, int, int], Compiled]]:
    """What could be compiled before the pool broke, if it did."""
    with pool_of(jobs, cache) as pool:
        futures = {pool.submit(work, task): task for task in waiting}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result()


def _alone(task: tuple[str, int, int], cache: str) -> Compiled:
    for _task, row in _compiled([task], 1, cache):
        return row
    module, capability, index = task
    compilation = compilations_of(module, capability)[index]
    row = Compiled(module, compilation.name, compilation.kernel.__name__, capability, str(compilation.config))
    row.violations.append("the compiler crashes")
    return row


def table_of(rows: list[Compiled]) -> Table:
    """The rows as a table for the terminal, those that fail in red."""
    table = Table(title=f"{len(rows)} kernels compiled", title_justify="left")
    for header in ("module", "instance", "configuration"):
        table.add_column(header, overflow="fold")
    for header in ("sm", "registers", "spilled", "shared, KB", "of, KB", "occupancy", "seconds"):
        table.add_column(header, justify="right")
    for header in ("tensor cores", "violations"):
        table.add_column(header, overflow="fold")
    last = None
    for row in rows:
        if last not in (None, row.module):
            table.add_section()
        last = row.module
        table.add_row(
            row.module,
            row.name,
            row.config,
            str(row.capability),
            str(row.registers),
            str(row.spilled or "-"),
            f"{row.shared / 1024:.1f}",
            f"{row.shared_limit / 1024:.0f}",
            f"{row.occupancy:.0%}",
            f"{row.seconds:.1f}",
            row.tensor_cores or "-",
            "; ".join(row.violations) or "-",
            style="red" if row.violations else None,
        )
    return table


def _capabilities(text: str) -> list[int]:
    try:
        asked = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--capability {text}: needs numbers such as 86,90") from None
    for capability in asked:
        if capability not in CAPABILITIES:
            known = ",".join(map(str, CAPABILITIES))
            raise UserError(f"--capability {text}: {capability} is not known", fix=f"choose from {known}")
    return asked


def report(
    modules: list[str], capabilities: list[int], json_path: Path | None, jobs: int, console: Console, chosen: bool
) -> int:
    """Compile, print the table and write it where asked; returns the exit code."""
    known = kernel_modules()
    for module in modules:
        if module not in known:
            raise UserError(f"{module}: is no kernel module", fix=f"choose from: {', '.join(known)}")
    modules = modules or known
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("compiling", total=len(list(tasks(modules, capabilities, not chosen))))

        def done(row: Compiled) -> None:
            progress.update(bar, advance=1, description=f"{row.module}: {row.name} for sm_{row.capability}")

        rows = compile_all(modules, capabilities, jobs, done, not chosen)
    console.print(table_of(rows))
    # Some kernels are for some GPUs only.
    left = [set(kernels_never_compiled(capability)) for capability in CAPABILITIES]
    forgotten = sorted(set.intersection(*left)) if modules == known else []
    for kernel in forgotten:
        console.print(f"{kernel}: no module says with `compilations` how it is launched", style="red")
    if json_path is not None:
        json_path.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {json_path}")
    wrong = sum(bool(row.violations) for row in rows)
    console.print(f"{len(rows)} compiled, {wrong} wrong, {len(forgotten)} forgotten")
    return int(bool(wrong or forgotten))


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m pyfinetune.bench.compile_report`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.compile_report", description=__doc__)
    parser.add_argument("modules", nargs="*", help="kernel modules; all by default")
    parser.add_argument("--capability", default=",".join(map(str, CAPABILITIES)), help="such as 86,90; all by default")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--jobs", type=int, default=_JOBS, help="processes at a time")
    parser.add_argument("--chosen", action="store_true", help="what is launched without a measurement, nothing else")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    try:
        return report(args.modules, _capabilities(args.capability), args.json, args.jobs, console, args.chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

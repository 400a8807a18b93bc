"""One command for a machine with a GPU: `python -m pyfinetune.bench.gpu_check`, or `make gpu-check` in a checkout.

First the tests: those of every op over the Triton kernels on the GPU, in bfloat16 too, what only a GPU can show
(tests/test_gpu.py), and small shapes under compute-sanitizer where there is one. Then the benchmark, one group of cases
after the other, against the peers that are installed. Each part is a process of its own with a time of its own; one
that fails or takes too long is recorded, and the next goes on. All is written to one JSON file and one Markdown file,
anew after each part, so that what has been found is there even when the whole is cut off.

`--dry-run` does the same on a CPU with tiny shapes and a few tests of each file, to see that it will work.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyfinetune.bench.gpu_results import markdown_of, what_is_wrong
from pyfinetune.bench.results import facts_to_share
from pyfinetune.errors import UserError

TOTAL = 480  # seconds for everything, the build with it where `--started` says when that began
_TESTS = 140  # seconds for the tests, which run side by side
_LEAST = 5  # seconds that a part must have left to be started
_BROKEN = 99  # how a test process ends whose GPU context is lost, see tests/report_lines.py
_RESTARTS = 3
_GRACE = 5  # seconds from asking a process to end until it is made to
_SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
_SANITIZER_WHEEL = "nvidia/*/bin/compute-sanitizer"  # where the wheel of that name has it
# Whatever torch asks of the driver in vain is none of ours; children are compilers.
_WATCHED = ("--error-exitcode", "86", "--target-processes", "application-only", "--report-api-errors", "no")
_MEMCHECK = ("--tool", "memcheck", *_WATCHED, "--padding", "64")
_RACECHECK = ("--tool", "racecheck", *_WATCHED)
CANNOT = "cannot run here"
_running: set[subprocess.Popen] = set()
_UNSUPPORTED = ("Device not supported",)  # what the sanitizer says in some virtual machines
# Ops whose test files hold the native CPU kernels alone.
_CPU_ONLY = {"test_lora_thin.py", "test_row_kernels.py"}


@dataclass
class Part:
    """One process of the check.

    Args:
        name: as it is reported.
        kind: "tests" or "bench".
        command: arguments of the process.
        budget: seconds it may take.
        lines: the file it writes what it finds to, a JSON object a line.
        environment: variables beside those that all have.
        alone: whether it has the GPU to itself; the others run side by side with their neighbours.
    """

    name: str
    kind: str
    command: list[str]
    budget: float
    lines: Path
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = True


def _pytest(files: Iterable[Path], *more: str) -> list[str]:
    options = ["-q", "--no-header", "-p", "report_lines", "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
    return [sys.executable, "-m", "pytest", *options, *more, *map(str, files)]


def _triton_tests(tests: Path) -> list[Path]:
    """The test files of the ops that have Triton kernels."""
    root = tests.parent
    stems = {path.stem for path in (root / "kernels").glob("*.py")}
    stems &= {path.stem for path in (root / "pyfinetune" / "ops").glob("*.py")}
    found = {path for stem in stems for path in tests.glob(f"test_{stem}*.py")}
    return sorted(path for path in found if path.name not in _CPU_ONLY)


def find_sanitizer(peers: Path) -> str | None:
    """compute-sanitizer on the machine, or among the unpacked wheels."""
    for found in peers.glob(_SANITIZER_WHEEL):
        found.chmod(0o755)
        return str(found)
    return next((found for name in _SANITIZER if (found := shutil.which(name))), None)


def test_parts(tests: Path, folder: Path, dry_run: bool, sanitizer: str | None) -> list[Part]:
    """The tests, in parts that run side by side: what one does to its GPU context is its own.

    Args:
        tests: the checkout's folder of tests.
        folder: for what they find.
        dry_run: on a CPU, a few of each file.
        sanitizer: the path of compute-sanitizer, where there is one.
    """
    common = {"PYFINETUNE_TEST_BACKENDS": "triton", "PYTHONPATH": _path_with(tests)}
    if dry_run:
        common |= {"TRITON_INTERPRET": "1", "PYFINETUNE_GPU_REHEARSAL": "1", "OPENBLAS_NUM_THREADS": "1"}
    of_op = {"PYFINETUNE_TEST_LIMIT": "2"} if dry_run else {"PYFINETUNE_TEST_DEVICE": "cuda"}

    def part(name: str, command: list[str], environment: dict[str, str]) -> Part:
        lines = folder / f"{_file_name(name)}.jsonl"
        environment = {**common, **environment, "PYFINETUNE_TEST_LINES": str(lines)}
        return Part(name, "tests", command, _TESTS, lines, environment, alone=False)

    only_gpu, cuda = tests / "test_gpu.py", tests / "test_gpu_nf4.py"
    parts = [part("GPU alone", _pytest([only_gpu]), {}), part("CUDA C++", _pytest([cuda]), {})]
    if sanitizer is not None and not dry_run:
        # Without the caching allocator, so that each tensor has bounds of its own that can be watched.
        uncached, small = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "(test_small or test_products) and bfloat16"
        command = [sanitizer, *_MEMCHECK, *_pytest([only_gpu, cuda], "-k", small)]
        parts.append(part("compute-sanitizer", command, uncached))
        command = [sanitizer, *_RACECHECK, *_pytest([cuda], "-k", "test_products and bfloat16")]
        parts.append(part("racecheck", command, uncached))
    return parts + [part(path.stem, _pytest([path]), of_op) for path in _triton_tests(tests)]


def bench_parts(folder: Path, dry_run: bool, groups: list[str] | None) -> list[Part]:
    """The groups of the benchmark, which have the GPU to themselves."""
    from pyfinetune.bench.gpu_cases import GROUPS

    parts = []
    for name, group in GROUPS.items():
        if groups is not None and name not in groups:
            continue
        lines = folder / f"bench-{_file_name(name)}.jsonl"
        options = ["--device", "cpu", "--quick", "--seconds", "0.02"] if dry_run else ["--seconds", "0.5"]
        command = [sys.executable, "-W", "ignore", "-m", "pyfinetune.bench.gpu_worker", name, str(lines), *options]
        parts.append(Part(name, "bench", command, group.budget, lines, alone=group.timed))
    return parts


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _path_with(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def install_wheels(folder: Path, site: Path) -> str | None:
    """Unpack the peers' wheels where the benchmark's processes find them; returns what went wrong, if it did."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return f"{folder} holds no wheels"
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.stderr.strip() if done.returncode else None


def _run_once(part: Part, log, seconds: float) -> int | None:
    """Run a part's process; its exit code, or None when its time was up."""
    # A checkout's folders `kernels` and `bench` must not pass for packages of those names.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "4", **part.environment}
    # A session of its own: what it started ends with it.
    process = subprocess.Popen(
        part.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    _running.add(process)
    try:
        return process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
        _running.discard(process)


def _end(process: subprocess.Popen) -> None:
    """Ask a process and what it started to end, and make them when they do not."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: Part, deadline: float) -> dict[str, Any]:
    """Run a part, again where its GPU context broke, and say what it found; without time for it, say that."""
    start = time.monotonic()
    until = min(start + part.budget, deadline)
    if deadline - start < _LEAST:
        return _not_run(part, "left out: no time was left for it")
    code = None
    with tempfile.TemporaryFile() as log:
        for _attempt in range(_RESTARTS + 1):
            code = _run_once(part, log, until - time.monotonic())
            # A process that died by a signal in the middle of a test goes on behind that test, too.
            if code is None or part.kind != "tests" or (code != _BROKEN and code >= 0):
                break
        log.seek(0)
        tail = log.read().decode(errors="replace")[-4000:]
    found = [json.loads(line) for line in _lines(part.lines)]
    result = {"name": part.name, "kind": part.kind, "seconds": round(time.monotonic() - start, 1), "exit_code": code}
    result |= _tests_of(found) if part.kind == "tests" else _rows_of(found)
    wrong = result.get("failures") or result.get("errors") or code not in (0, None)
    result["status"] = "timed out" if code is None else "failed" if wrong else "ok"
    if any(text in tail for text in _UNSUPPORTED):
        result["status"] = CANNOT
    if code != 0:
        result["log"] = tail
    return result


def _not_run(part: Part, status: str) -> dict[str, Any]:
    result = {"name": part.name, "kind": part.kind, "seconds": 0.0, "exit_code": None}
    return result | (_tests_of([]) if part.kind == "tests" else _rows_of([])) | {"status": status}


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may have been cut off in one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.split("\n")[:-1]


def _tests_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of outcomes, the tests that failed, and why others were skipped."""
    last = {line["test"]: line for line in found}
    counts: dict[str, int] = {}
    for line in last.values():
        outcome = "crashed or cut off" if line["outcome"] == "started" else line["outcome"]
        counts[outcome] = counts.get(outcome, 0) + 1
    failed = [line for line in found if line["outcome"] == "failed"]
    failed += [line for line in last.values() if line["outcome"] == "started"]
    reasons: dict[str, int] = {}
    for line in last.values():
        if line["outcome"] == "skipped":
            reasons[line["message"]] = reasons.get(line["message"], 0) + 1
    failures = [{"test": line["test"], "message": line.get("message", "crashed or cut off")} for line in failed]
    slowest = sorted(last.values(), key=lambda line: -line.get("seconds", 0))[:3]
    return {
        "counts": counts,
        "failures": failures,
        "skipped": reasons,
        "slowest": [{"test": line["test"], "seconds": line.get("seconds")} for line in slowest],
    }


def _rows_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of the machine, rows measured, what went wrong, and the case that was cut off, if one was."""
    rows = [line["row"] for line in found if "row" in line]
    errors = [f"{row['case']}: {row['error']}" for row in rows if "error" in row]
    for row in rows:
        ours = row.get("results", {}).get("ours", {"ok": True})
        if not ours["ok"]:
            errors.append(f"{row['case']}: {what_is_wrong(ours)}")
    started = [line["started"] for line in found if "started" in line]
    return {
        "ceilings": next((line["ceilings"] for line in found if "ceilings" in line), {}),
        "rows": rows,
        "errors": errors,
        "cut_off": started[-1] if len(started) > len(rows) else None,
        "tuned": next((line["tuned"] for line in found if "tuned" in line), []),
    }


def machine() -> dict[str, Any]:
    """`pf.info`, and what else a reader of GPU times wants to know."""
    facts = facts_to_share()
    facts["versions"]["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    if shutil.which("nvidia-smi"):
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        facts["nvidia_smi"] = done.stdout.strip()
    return facts


def _run_all(parts: list[Part], deadline: float, found: Callable[[Part, dict[str, Any]], None]) -> None:
    """Neighbours that may share the GPU side by side, the others one at a time; each result goes to `found`."""
    lock = threading.Lock()

    def run(part: Part, until: float) -> None:
        result = run_part(part, until)
        with lock:
            found(part, result)

    for (alone, _kind), neighbours in itertools.groupby(parts, lambda part: (part.alone, part.kind)):
        group = list(neighbours)
        workers = 1 if alone else max(2, min(len(group), (os.cpu_count() or 2) - 2))
        # One that waits for a place beside the others has what is left of their time.
        until = deadline if alone else min(deadline, time.monotonic() + max(part.budget for part in group))
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(functools.partial(run, until=until), group))
            except BaseException:  # an interrupt must not wait for what is still running
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(_running):
                    _end(process)
                raise


def _say(result: dict[str, Any]) -> None:
    if result["kind"] == "tests":
        what = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result["counts"].items())) or "nothing ran"
        more = [failure["test"] for failure in result["failures"]]
    else:
        what, more = f"{len(result['rows'])} cases", result["errors"]
    print(f"{result['kind']} {result['name']}: {result['status']} after {result['seconds']:.0f} s: {what}", flush=True)
    for line in more[:10]:
        print(f"  {line[:300]}", flush=True)


def run(
    tests: Path | None,
    dry_run: bool = False,
    wheels: Path | None = None,
    groups: list[str] | None = None,
    spent: float = 0.0,
    write: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Everything, in plain values.

    Args:
        tests: the checkout's folder of tests; None runs none.
        dry_run: on a CPU, with tiny shapes.
        wheels: a folder of peers' wheels that are not installed.
        groups: of the benchmark; all when None.
        spent: seconds of the time for everything that are gone already.
        write: is given the result when it has begun, and again after each part.
    """
    start = time.monotonic() - spent
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": dry_run,
        "build_seconds": round(spent, 1),
        "machine": machine(),
        "problems": [],
        "notes": [],
    }
    with tempfile.TemporaryDirectory(prefix="pyfinetune-gpu-") as name:
        folder, peers = Path(name), Path(name) / "peers"
        bench = bench_parts(folder, dry_run, groups)
        if wheels is not None:
            problem = install_wheels(wheels, peers)
            result["problems"] += [f"--wheels: {problem}"] if problem else []
            for part in bench:
                part.environment["PYTHONPATH"] = _path_with(peers)
        sanitizer = find_sanitizer(peers)
        if sanitizer is None:
            result["notes"].append("there is no compute-sanitizer here, so nothing ran under it")
        parts = ([] if tests is None else test_parts(tests, folder, dry_run, sanitizer)) + bench
        results = {part.name: _not_run(part, "not run: the check was cut off before it") for part in parts}

        def found(part: Part, outcome: dict[str, Any]) -> None:
            results[part.name] = outcome
            _say(outcome)
            publish()

        def publish() -> None:
            result["parts"], result["seconds"] = list(results.values()), round(time.monotonic() - start, 1)
            write(result)

        publish()
        _run_all(parts, start + TOTAL - 2 * _GRACE, found)
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m pyfinetune.bench.gpu_check`; returns 1 when a part failed or took too long."""
    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write to; bench/results/gpu by default")
    parser.add_argument("--wheels", type=Path, help="folder of peers' wheels, such as bitsandbytes and liger-kernel")
    parser.add_argument("--tests", type=Path, default=Path("tests"), help="the checkout's folder of tests")
    parser.add_argument("--no-tests", action="store_true", help="the benchmark alone")
    parser.add_argument("--bench", help="groups of the benchmark, such as nf4,rows; 'none' for the tests alone")
    parser.add_argument("--started", type=float, help="when the build began, in seconds since 1970: it counts as well")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with tiny shapes")
    args = parser.parse_args(argv)
    try:
        return _main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("torch sees no GPU on this machine", fix="rehearse with --dry-run")
    tests = None if args.no_tests else args.tests.resolve()
    if tests is not None and not (tests / "test_gpu.py").is_file():
        raise UserError(f"--tests {args.tests}: holds no test_gpu.py", fix="run this in a checkout, or pass --no-tests")
    groups = None if args.bench is None else [name for name in args.bench.split(",") if name != "none"]
    spent = 0.0 if args.started is None else max(0.0, time.time() - args.started)
    out = args.out or Path("build/gpu-check" if args.dry_run else "bench/results/gpu")
    out.mkdir(parents=True, exist_ok=True)
    stem = "dry-run" if args.dry_run else _file_name(torch.cuda.get_device_name())

    def write(result: dict[str, Any]) -> None:
        _replace(out / f"{stem}.json", json.dumps(result, indent=1) + "\n")
        _replace(out / f"{stem}.md", markdown_of(result))

    result = run(tests, args.dry_run, args.wheels, groups, spent, write)
    print(f"{result['seconds']:.0f} s; written to {out / stem}.json and .md")
    return int(any(part["status"] not in ("ok", CANNOT) for part in result["parts"]) or bool(result["problems"]))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    half = path.with_name(path.name + ".part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


if __name__ == "__main__":
    sys.exit(main())

"""Time on a GPU: what the kernels take, and what the whole call takes with the host in it.

Before each call the second-level cache is filled with something else, and the GPU is kept busy until the host has
handed over the whole call: what two events around it then measure is the GPU's own work. Calls are made in turn, so
that a clock that moves, moves for all.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyfinetune.bench.ceilings import RATES, cache_bytes, synchronizer, yardstick
from pyfinetune.bench.harness import OURS, Case, Setup, floor_seconds, saved_bytes, summary
from pyfinetune.ops._op import Op

MIN_ROUNDS, MAX_ROUNDS = 5, 60
_CYCLES = 2e9  # a second, about; only how long to keep the GPU busy depends on it
_LONG = 0.02  # seconds: a call as long as that hides what the host does by itself


@dataclass(frozen=True)
class GpuCase(Case):
    """A case of the GPU table.

    Args:
        goal: what it is measured for, in words.
        tokens: that a call trains on, where that is how its speed is told.
    """

    goal: str = ""
    tokens: int = 0


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """Copy and GEMM rates of torch's own kernels, as `bench.ceilings` names them, on operands that fill a GPU."""
    sizes = (1 << 20, 512) if quick else (1 << 30, 8192)
    rates = {}
    for rate in RATES:
        call, work = yardstick(rate, device, *sizes)
        rates[rate] = work / best(call, device)
    return rates


def best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the shortest of a few calls."""
    return min(interleave({"": lambda i: call()}, 0.3, device)[""])


class _Clock:
    """Seconds between `start` and `stop`, of the GPU's work where there is one."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device) if self.cuda else None

    def start(self, ahead: float) -> None:
        if not self.cuda:
            self.began = time.perf_counter()
            return
        self.flush.zero_()
        if ahead:
            torch.cuda._sleep(int(ahead * _CYCLES))
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.began.record()

    def stop(self) -> float:
        if not self.cuda:
            return time.perf_counter() - self.began
        self.ended.record()
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3


def _host_seconds(call: Callable[[int], object], device: torch.device) -> tuple[float, float]:
    """(seconds until the host has handed the call over, seconds until it is done), after a call to warm up."""
    synchronize = synchronizer(device)
    call(0)
    synchronize()
    call(1)
    synchronize()
    start = time.perf_counter()
    call(2)
    handed = time.perf_counter() - start
    synchronize()
    return handed, time.perf_counter() - start


def interleave(
    calls: Mapping[str, Callable[[int], object]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, by name: `MIN_ROUNDS` of each, and more until the time is up."""
    if not calls:
        return {}
    clock, names, ahead = _Clock(device), list(calls), {}
    for name, call in calls.items():
        handed, done = _host_seconds(call, device)
        ahead[name] = 0.0 if done > _LONG else min(1.5 * handed + 1e-4, _LONG)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for i in range(MAX_ROUNDS):
        if i >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            clock.start(ahead[name])
            calls[name](i)
            times[name].append(clock.stop())
    return times


@contextlib.contextmanager
def backends_used() -> Iterator[set[str]]:
    """Collects what runs inside the block, as "op: backend"."""
    used, choose = set(), Op.choose

    def noting(self, *args):
        backend = choose(self, *args)
        used.add(f"{self.name}: {backend.name}")
        return backend

    Op.choose = noting
    try:
        yield used
    finally:
        Op.choose = choose


def _peak_mb(call: Callable[[int], object], device: torch.device) -> float | None:
    """What a call takes at most beside what is there already."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _judged(setup: Setup, name: str, device: torch.device) -> dict[str, Any]:
    """Whether a result is right; one that cannot be had at all is a wrong one, and says why."""
    try:
        verdict = setup.check[name]()
        result = {"ok": verdict.ok, "detail": verdict.detail}
        if verdict.ok:
            result["peak_mb"] = _peak_mb(setup.calls[name], device)
            if name in setup.forward:
                result["saved_mb"] = saved_bytes(setup.forward[name], setup.inputs) / 2**20
        return result
    except Exception as error:  # a peer that fails must not take the others along
        return {"ok": False, "detail": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}


def measure(case: Case, device: torch.device, rates: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """Check and time one case.

    Args:
        case: what to measure.
        device: where.
        rates: the machine's, from `ceilings`.
        seconds: to spend on timing.

    Returns:
        Plain values, ready for JSON: the case, its floor, the missing peers, what ours ran on, and by name under
        `results` the verdict and, where it is right, median and quartiles of the GPU's milliseconds, `wall_ms` of the
        call with the host, `forward_ms` of the forward pass alone, tokens a second of a step, and megabytes at the peak
        and saved for backward.
    """
    with torch.no_grad():  # a call that needs gradients turns them on itself
        setup = case.build(device)
        with backends_used() as used:
            ours = _judged(setup, OURS, device)
        results = {OURS: ours} | {name: _judged(setup, name, device) for name in setup.calls if name != OURS}
        right = {name: setup.calls[name] for name, result in results.items() if result["ok"]}
        for name, taken in interleave(right, seconds, device).items():
            results[name] |= summary(taken)
            if getattr(case, "tokens", 0):
                results[name]["tokens_per_second"] = 1e3 * case.tokens / results[name]["ms"]
        for name, call in right.items():
            results[name]["wall_ms"] = 1e3 * min(_host_seconds(call, device)[1] for _ in range(3))
        forward = {name: _ignoring(setup.forward[name]) for name in right if name in setup.forward}
        for name, taken in interleave(forward, seconds / 2, device).items():
            results[name]["forward_ms"] = 1e3 * statistics.median(taken)
    floors = floor_seconds(case, rates)
    bound = max(floors, key=floors.get)
    return {
        "op": case.op,
        "case": case.name,
        "goal": getattr(case, "goal", ""),
        "bound": bound,
        "floor_ms": floors[bound] * 1e3,
        "missing": setup.missing,
        "ran_on": sorted(used),
        "results": results,
    }


def _ignoring(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda i: call()

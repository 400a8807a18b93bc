"""How a case is declared, checked and timed.

Ours and its peers run in one process and in turn, so that whatever slows the machine down for a moment slows all of
them; medians are compared. A result is checked before it is timed, and a wrong one gets no time.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pyfinetune.bench.breakdown import time_by_group
from pyfinetune.bench.ceilings import COPY, GEMM_BF16, GEMM_FP32, synchronizer, yardstick
from pyfinetune.bench.memory import peak_mb
from pyfinetune.bench.peer_names import Choice

OURS = "ours"
MACHINE = "machine"
MIN_ROUNDS = 5
MAX_ROUNDS = 200
MACHINE_ROUNDS = 5
LONG_CALL = 3.0  # seconds; what takes longer is warm after one call


@dataclass(frozen=True)
class Target:
    """What a case has to reach.

    Args:
        default: least peer's time / our time with the allocator as it comes.
        recycled: the same with pages recycled; see `runner`.
        of_floor: most of our time / the floor that the machine's own rates set.
    """

    default: float | None = None
    recycled: float | None = None
    of_floor: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a result is right, and by what measure."""

    ok: bool
    detail: str


@dataclass(frozen=True)
class Passes:
    """A call in its two halves, so that each of them can be timed.

    Args:
        forward: takes the call's number and returns what the backward pass begins from.
        backward: takes the call's number and that.
    """

    forward: Callable[[int], Any]
    backward: Callable[[int, Any], Any]

    def __call__(self, i: int) -> Any:
        return self.backward(i, self.forward(i))


@dataclass
class Setup:
    """A case made ready: tensors made, modules built.

    Args:
        calls: by name ("ours", "bitsandbytes", ...) a function of the call's number, or `Passes`, which does the whole
            work once; memory-bound cases use another set of inputs in each call, so that none of them sits in a cache.
        check: by the same names, a function that says whether that call's result is right.
        missing: peers that cannot run here, with the reason.
        inputs: tensors whose memory does not count as saved for the backward pass.
        forward: our and the peers' forward pass alone, to measure what it saves; empty for ops without a backward.
        resident_mb: what the weights of whole models take.
    """

    calls: dict[str, Callable[[int], Any]]
    check: dict[str, Callable[[], Verdict]]
    missing: dict[str, str] = field(default_factory=dict)
    inputs: list[torch.Tensor] = field(default_factory=list)
    forward: dict[str, Callable[[], Any]] = field(default_factory=dict)
    resident_mb: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        op: the op's stem.
        name: what is measured, unique within the op.
        build: makes the case ready on a device; the only expensive part.
        flops: of the matrix products that no implementation can do without.
        dtype: of those products; picks the rate they are held against.
        bytes: that have to be read and written at least once.
        target: what ours should reach against every peer; None where nothing is promised.
        targets: by a peer's name, what ours should reach against that one instead.
        isa: run under this instruction set instead of the best one.
        versus: with `isa`: the case whose time under the best instruction set ours is compared with.
        compiled: its peers that compile first are worth their time in a full run, unasked.
        tokens: how many a call trains on, where that is what counts.
        parts: of `flops`, those of each group of `breakdown.GROUPS`, where the call's time is taken apart.
        vocabulary: entries of the head, by which `breakdown` knows its products.
    """

    op: str
    name: str
    build: Callable[[torch.device], Setup]
    flops: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    bytes: float = 0.0
    target: Target | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    isa: str | None = None
    versus: str | None = None
    compiled: bool = False
    tokens: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    vocabulary: int | None = None


def _warm_up(call: Callable[[int], Any], sync: Callable[[], None]) -> None:
    """Call once to allocate and pick kernels, and again to meet what the first left, unless it takes long."""
    start = time.perf_counter()
    call(0)
    sync()
    if time.perf_counter() - start < LONG_CALL:
        call(1)
        sync()


def _time_machine(machine: Callable[[], Any] | None, sync: Callable[[], None]) -> list[float]:
    """A few times of the call, the first one apart."""
    times = []
    for _ in range(0 if machine is None else MACHINE_ROUNDS + 1):
        start = time.perf_counter()
        machine()
        sync()
        times.append(time.perf_counter() - start)
    return times[1:]


def _timed(call: Callable[[int], Any], i: int, sync: Callable[[], None], halves: list | None) -> float:
    """Seconds of one call; those of its halves go to `halves`, where it has them."""
    start = time.perf_counter()
    if halves is None or not isinstance(call, Passes):
        call(i)
        sync()
        return time.perf_counter() - start
    made = call.forward(i)
    sync()
    middle = time.perf_counter()
    call.backward(i, made)
    del made
    sync()
    end = time.perf_counter()
    halves.append((middle - start, end - middle))
    return end - start


def interleave(
    calls: Mapping[str, Callable[[int], Any]],
    seconds: float,
    sync: Callable[[], None] = lambda: None,
    min_rounds: int = MIN_ROUNDS,
    machine: Callable[[], Any] | None = None,
    halves: dict[str, list[tuple[float, float]]] | None = None,
) -> dict[str, list[float]]:
    """Time the calls in turn.

    Args:
        calls: functions of the call's number; a result is dropped within the time measured, as memory costs too.
            No two calls of a round have the same number: the second one would find the first one's inputs in the cache.
        seconds: how long to go on, once there are `min_rounds` rounds.
        sync: waits for the device.
        min_rounds: least number of times that each is called.
        machine: timed before the first and after the last round, to see what the machine itself could do at that
            time; not between them, where it would empty the caches.
        halves: filled by name with seconds of the forward and of the backward pass, which are waited for in between.

    Returns:
        Seconds of each call, in order, by name; of `machine` under the name `MACHINE`.
    """
    names = list(calls)
    machine_times = _time_machine(machine, sync)
    for name in names:
        _warm_up(calls[name], sync)
    times: dict[str, list[float]] = {name: [] for name in names}
    numbers = itertools.count()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for i in range(MAX_ROUNDS):
            if i >= min_rounds and time.perf_counter() > end:
                break
            # Another one goes first each round: a place in the order is an advantage in itself.
            for name in names[i % len(names) :] + names[: i % len(names)]:
                split = None if halves is None else halves.setdefault(name, [])
                times[name].append(_timed(calls[name], next(numbers), sync, split))
    finally:
        if collecting:
            gc.enable()
    if machine is not None:
        times[MACHINE] = machine_times + _time_machine(machine, sync)
    return times


def saved_bytes(forward: Callable[[], Any], inputs: list[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass beside the inputs' own memory."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # alive until here: memory freed earlier could be handed out twice and counted once
    return sum(kept.values())


def floor_seconds(case: Case, ceilings: Mapping[str, float]) -> dict[str, float]:
    """The least time that each of the machine's own rates allows, by the rate's name."""
    gemm = GEMM_BF16 if case.dtype == torch.bfloat16 else GEMM_FP32
    return {gemm: case.flops / (ceilings[gemm] * 1e9), COPY: case.bytes / (ceilings[COPY] * 1e9)}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds, and of how many."""
    milliseconds = [s * 1e3 for s in seconds]
    low, middle, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return {"ms": middle, "ms_q1": low, "ms_q3": high, "rounds": len(milliseconds)}


def _judge(setup: Setup, names: list[str], device: torch.device, memory: bool) -> dict[str, dict[str, Any]]:
    """By name whether the result is right and, where it is, what the call keeps and takes of memory."""
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            verdict = setup.check[name]()
        except Exception as error:  # a peer that fails must not take the others' results along
            if name == OURS:
                raise
            message = (str(error).strip().splitlines() or ["no message"])[-1]
            verdict = Verdict(False, f"{type(error).__name__}: {message}")
        results[name] = {"ok": verdict.ok, "detail": verdict.detail}
        if not verdict.ok:
            continue
        if name in setup.forward:
            results[name]["saved_mb"] = saved_bytes(setup.forward[name], setup.inputs) / 2**20
        if name in setup.resident_mb:
            results[name]["resident_mb"] = setup.resident_mb[name]
        if not memory or not results[OURS]["ok"]:
            continue
        call = setup.calls[name]
        halves = (call.forward, call.backward) if isinstance(call, Passes) else (call, None)
        results[name]["peak_mb"] = peak_mb(*halves, device)
    return results


def _time(right: dict[str, Callable], seconds: float, device: torch.device, machine) -> tuple[dict[str, dict], float]:
    """By name `summary` of the whole and of its halves; and the machine's median seconds."""
    sync = synchronizer(device)
    halves: dict[str, list[tuple[float, float]]] = {}
    if device.type == "cpu":
        times = interleave(right, seconds, sync, machine=machine, halves=halves)
    else:  # to wait in the middle would cost what the whole call does not
        times = interleave(right, seconds, sync, machine=machine)
        interleave(right, seconds / 4, sync, halves=halves)
    typical = statistics.median(times.pop(MACHINE))
    found = {}
    for name, taken in times.items():
        found[name] = summary(taken)
        if halves.get(name):
            forward, backward = zip(*halves[name], strict=True)
            found[name] |= {"forward": summary(forward), "backward": summary(backward)}
    return found, typical


def measure(
    case: Case,
    device: torch.device,
    ceilings: Mapping[str, float],
    seconds: float,
    choice: Choice | None = None,
    once: bool = True,
) -> dict[str, Any]:
    """Check and time one case.

    Args:
        case: what to measure.
        device: where.
        ceilings: the machine's rates, from `ceilings.measure_ceilings`, which say what bounds the case; how long that
            takes is measured again beside the calls, as a machine that others share slows down and speeds up.
        seconds: time to spend on timing.
        choice: which peers; those that need no asking for without it.
        once: whether to measure also what another allocator setting would not change: memory, and where a step's time
            goes.

    Returns:
        Plain values, ready for JSON: the case with its flops and bytes, the floor, the missing peers, and by name under
        `results` the verdict and, where it is right, median and quartiles in milliseconds of the whole and of its
        `forward` and `backward` pass, the megabytes saved for the backward pass, and `peak_mb`.
    """
    choice = choice or Choice()
    with torch.no_grad():  # a call that needs gradients turns them on itself
        setup = case.build(device)
        # Under a forced instruction set only ours is of interest: it is compared with ours under the best one.
        others = [] if case.isa else [n for n in setup.calls if n != OURS and choice.includes(n, case.compiled)]
        results = _judge(setup, [OURS, *others], device, once)
        right = {name: setup.calls[name] for name, result in results.items() if result["ok"]}
        floors = floor_seconds(case, ceilings)
        bound = max(floors, key=floors.get)
        floor, parts = floors[bound], {}
        if OURS in right:
            machine, work = yardstick(bound, device)
            found, typical = _time(right, seconds, device, machine)
            floor *= ceilings[bound] * typical / work
            for name, taken in found.items():
                results[name] |= taken
            if case.parts and once:
                parts = _apart(case, right, results, floor, device)
    return {
        "op": case.op,
        "case": case.name,
        "bound": bound,
        "flops": case.flops,
        "bytes": case.bytes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_ms": floor * 1e3,
        "target": None if case.target is None else vars(case.target),
        "targets": {name: vars(target) for name, target in case.targets.items()},
        "isa": case.isa,
        "versus": case.versus,
        "missing": {name: why for name, why in setup.missing.items() if choice.includes(name, case.compiled)},
        "results": results,
        **({"tokens": case.tokens} if case.tokens else {}),
        **({"parts_floor_ms": parts} if parts else {}),
    }


def _apart(case: Case, right: dict, results: dict, floor: float, device: torch.device) -> dict[str, float]:
    """Enter where each call's time goes under `parts_ms`; returns what the machine's rate allows for each part."""
    for name, call in right.items():
        results[name]["parts_ms"] = time_by_group(call, device, case.vocabulary)
    return {part: 1e3 * floor * work / case.flops for part, work in case.parts.items()}

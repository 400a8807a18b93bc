"""How much memory one call takes at its peak, beside what was there before it."""

from __future__ import annotations

import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GRANULE = 4 << 20  # bytes that a process may grow by for huge pages and the like, without a call having asked for them

_LONG = 10.0  # seconds; a whole step of a model is not run once more for the scratch of its kernels


def _allocations(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What the function returned, and the bytes in use after each of torch's allocations, from 0."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    used, total = [0], 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        used.append(total)
    return result, used


def _resident(field: str) -> int:
    """A field of the process's status, in bytes."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"{_STATUS} has no {field}")


def _growth(function: Callable[[], Any]) -> tuple[Any, int]:
    """What the function returned, and by how many bytes the process grew at its peak; 0 where no one says."""
    before = None
    # Without these the peak would be that of the whole process, or freed memory be taken again unseen.
    with suppress(OSError, AttributeError, ValueError):
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
        before = _resident("VmRSS")
    result = function()
    return result, 0 if before is None else max(0, _resident("VmHWM") - before)


def _on_cpu(forward: Callable[[], Any], backward: Callable[[Any], Any] | None) -> list[int]:
    """Peak bytes of the forward pass and, where there is one, of the backward pass, both counted from the beginning."""
    start = time.perf_counter()
    made, used = _allocations(forward)
    peaks, kept = [max(used)], used[-1]
    if backward is not None:
        peaks.append(kept + max(_allocations(lambda: backward(made))[1]))
    del made
    if time.perf_counter() - start > _LONG:
        return peaks
    made, grown = _growth(forward)
    growths = [grown]
    if backward is not None:
        after = _growth(lambda: backward(made))[1]
        growths.append(kept + after)
    # The process's growth shows scratch that a kernel takes past torch, of ours or a peer's.
    return [growth if growth > peak + _GRANULE else peak for peak, growth in zip(peaks, growths, strict=True)]


def _on_gpu(forward: Callable[[], Any], backward: Callable[[Any], Any] | None) -> list[int]:
    torch.cuda.synchronize()
    start, peaks = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    made = forward()
    torch.cuda.synchronize()
    peaks.append(torch.cuda.max_memory_allocated() - start)
    if backward is not None:
        torch.cuda.reset_peak_memory_stats()
        backward(made)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - start)
    return peaks


def peak_mb(
    forward: Callable[[int], Any], backward: Callable[[int, Any], Any] | None, device: torch.device
) -> dict[str, float]:
    """Megabytes that a call takes at its peak, beside what was there before it.

    On a CPU that is what torch's allocator handed out, or the growth of the process where that is more by 4 MiB; on a
    GPU what torch's allocator says.

    Args:
        forward: the whole call, or its first half; called with 0, a few times.
        backward: its second half, called with 0 and what `forward` returned.
        device: where.

    Returns:
        `both`, and where there are two halves `forward` and `backward`: what is in use at the peak of each, which for
        the backward pass includes what was saved for it.

    Example:
        >>> peak_mb(lambda i: torch.zeros(1 << 20), None, torch.device("cpu"))["both"]
        4.0
    """
    forward(0)
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    peaks = measure(lambda: forward(0), None if backward is None else lambda made: backward(0, made))
    found = {"both": max(peaks) / 2**20}
    if len(peaks) == 2:
        found |= {"forward": peaks[0] / 2**20, "backward": peaks[1] / 2**20}
    return found

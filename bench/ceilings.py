"""What the machine itself can do, measured in the run that it is compared with: copy rate, GEMM rates, cache size."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

_COPY_BYTES = 256 << 20
_GEMM_SIZE = 2048
COPY, GEMM_BF16, GEMM_FP32 = RATES = ("copy_gbs", "gemm_bf16_gflops", "gemm_fp32_gflops")


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def yardstick(
    rate: str, device: torch.device, copy_bytes: int | None = None, gemm_size: int | None = None
) -> tuple[Callable[[], object], float]:
    """A call that shows one of the `RATES`, and its work: 1e9 bytes read and written, or 1e9 operations."""
    if rate == COPY:
        source = torch.ones(copy_bytes or _COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source), 2 * source.numel() / 1e9
    size = gemm_size or _GEMM_SIZE
    a = torch.randn(size, size, device=device).to(torch.bfloat16 if rate == GEMM_BF16 else torch.float32)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a.T, out=out), 2 * size**3 / 1e9


def _best(call, sync, rounds: int) -> float:
    """The shortest of a few calls: a ceiling is what is possible, not what is usual."""
    call()
    sync()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        sync()
        best = min(best, time.perf_counter() - start)
    return best


def measure_ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """The rates of torch's own copy and matrix product on large operands.

    Args:
        device: where to measure.
        quick: fewer repetitions.

    Returns:
        `copy_gbs`: bytes read and written a second, in GB/s; `gemm_bf16_gflops` and `gemm_fp32_gflops`.
    """
    sync, rounds = synchronizer(device), 3 if quick else 9
    rates = {}
    for rate in RATES:
        call, work = yardstick(rate, device)
        rates[rate] = work / _best(call, sync, rounds)
    return rates


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [int(size.read_text().strip().removesuffix("K")) << 10 for size in caches.glob("index*/size")]
    return max(sizes, default=32 << 20)


def sets_beyond_cache(bytes_each: int, device: torch.device, most: int = 16) -> int:
    """How many sets of inputs together are twice the cache, so that rotating over them reads memory each time."""
    return max(1, min(most, -(-2 * cache_bytes(device) // max(bytes_each, 1))))

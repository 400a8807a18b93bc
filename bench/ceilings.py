"""What the machine itself can do, measured in the run that it is compared with: copy rate, GEMM rates, cache size."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pyfinetune.bench.harness import synchronizer

_COPY_BYTES = 256 << 20
_GEMM_SIZE = 2048


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
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rates = {"copy_gbs": 2 * _COPY_BYTES / _best(lambda: target.copy_(source), sync, rounds) / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _best(lambda a=a, out=out: torch.mm(a, a.T, out=out), sync, rounds)
        rates[f"gemm_{name}_gflops"] = 2 * _GEMM_SIZE**3 / seconds / 1e9
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

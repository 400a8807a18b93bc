"""How the kernels of `linear_cross_entropy` are tiled: configurations by class of shapes, and what each would do."""

from __future__ import annotations

import functools

import triton

from pyfinetune.kernels.config import INTERPRETER, Config, Family, Work
from pyfinetune.kernels.gpus import gpu_of

_ROWS = 2048  # of a chunk, that a choice is made for: a loss's bits must not depend on how many tokens there are


def _only(kernel: str, capability: int, width: int = 0) -> list[Config]:
    """The one configuration of what moves tokens and sums columns, over rows of `width` elements.

    All are bound by memory: what counts is whole cache lines, about 16 elements a thread under way, and no spills.
    """
    if capability == INTERPRETER:
        cols = _power(width, 64, 512)
        blocks = {"rows": {"BLOCK": 64}, "bias": {"ROWS": 64, "BLOCK": 256}}
        return [Config(blocks.get(kernel, {"ROWS": 64, "BLOCK": cols}))]
    if kernel == "rows":
        return [Config({"BLOCK": 4096}, num_warps=8, shared_bytes=1024)]
    if kernel == "bias":
        return [Config({"ROWS": 32, "BLOCK": 128}, num_warps=8, shared_bytes=32 * 128 * 4)]
    block = _power(width, 64, 1024)
    return [Config({"ROWS": 4096 // block, "BLOCK": block}, num_warps=8, shared_bytes=1024)]


def _fwd_candidates(capability: int, itemsize: int, width: int, grad: int) -> list[Config]:
    """Of the walk over the logits: each row is read once, and with `grad` again on the way back, and written.

    With 16 warps to a long row few rows are under way at a time, and as much of the way back is in the second-level
    cache as that holds of them.
    """
    if capability == INTERPRETER:
        return [Config({"ROWS": 32, "BLOCK": _power(width, 64, 512)})]
    gpu, found = gpu_of(capability), []
    for most in (8192, 4096, 2048):
        if most == 8192 and capability >= 120:
            continue  # compiled for sm_120 it spills
        block = _power(width, 512, most)
        warps, row = max(4, block // 512), itemsize * width
        shared, registers = 4 * block + 1024, 5 * block // (32 * warps) + 32
        walked = gpu.multiprocessors * gpu.resident(warps, shared, registers) * row
        again = row * (2 - min(1.0, gpu.cache_bytes / max(walked, 1))) if grad else 0
        asked = _ROWS * row * (3 if grad else 1)
        steps = triton.cdiv(width, block) * (2 if grad else 1)
        work = Work(_ROWS, _ROWS * (row + again), 2 * itemsize * block, asked, steps=steps)
        found.append(Config({"ROWS": 1, "BLOCK": block}, warps, 2, shared, registers, work))
    return [config for i, config in enumerate(found) if config not in found[:i]]


def _power(size: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(size)))


_NAME = "linear_cross_entropy"
FWD = Family(f"{_NAME}_fwd", ("itemsize", "width", "grad"), _fwd_candidates)
ROWS = Family(f"{_NAME}_rows", (), functools.partial(_only, "rows"))
BIAS = Family(f"{_NAME}_bwd_bias", (), functools.partial(_only, "bias"))
MOVE = Family(f"{_NAME}_move", ("width",), functools.partial(_only, "move"))
SCALE = Family(f"{_NAME}_scale", ("width",), functools.partial(_only, "scale"))

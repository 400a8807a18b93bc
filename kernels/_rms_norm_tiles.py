"""How the kernels of `rms_norm` are tiled: configurations by class of shapes, and what each would do."""

from __future__ import annotations

import triton

from pyfinetune.kernels.config import Config, Family, Work
from pyfinetune.kernels.gpus import gpu_of

_ELEMENTS = (16, 8, 32)  # of a row tile that a thread holds: 16 are two or four loads of 16 bytes for each tensor
_WIDEST = 16384  # the most features of a row that is held in registers: 32 to a thread
_WIDEST_WITH_DWEIGHT = 8192  # with sums of dweight beside them: 16 to a thread
_WIDE_BLOCK = 4096  # tiles of wider rows
_ROWS = 8192  # that a choice is made for: a row's bits must not depend on how many others there are


def sums_dweight(cols: int) -> bool:
    """Whether rows are narrow enough for sums of dweight beside them."""
    return cols <= _WIDEST_WITH_DWEIGHT


def row_tiles(rows: int, block_m: int, at_least: int, at_most: int) -> tuple[int, int]:
    """(programs, tiles of block_m rows for each): about 16 rows a program where that keeps `at_least` programs."""
    tiles = triton.cdiv(rows, block_m)
    programs = min(tiles, max(at_least, min(at_most, triton.cdiv(rows, 16))))
    each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, each), each


def _tiles(cols: int, widest: int, each: tuple[int, ...] = _ELEMENTS) -> list[tuple[int, int, int]]:
    """(rows, columns, warps) of row tiles, best first.

    What moves memory fastest is many loads in flight, which is whole rows in registers. With 16 elements of each tensor
    to a thread (32 of the widest rows) four to eight programs share a multiprocessor, and narrow rows are joined until
    four warps have that much to do.
    """
    found = []
    for elements in each:
        block_n = triton.next_power_of_2(cols)
        if block_n > widest:
            block_n = _WIDE_BLOCK
        block_m = max(1, 4 * 32 * elements // block_n)
        warps = min(max(block_m * block_n // (32 * elements), 4), 16)
        if block_m * block_n <= 32 * 32 * warps:  # no more than 32 to a thread
            found.append((block_m, block_n, warps))
    return list(dict.fromkeys(found))


def _config(block_m: int, block_n: int, warps: int, tensors: float, work: Work, dweight: bool = False) -> Config:
    """`tensors`: of a tile's size that are in registers at a time; the shared memory is what sums across warps take."""
    shared = 8 * block_m * warps + 512 + (4 * block_n * min(block_m, warps) if dweight else 0)
    registers = int(tensors * block_m * block_n / (32 * warps)) + 32
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return Config(blocks, warps, 1, shared, registers, work)


def _fwd_candidates(capability: int, itemsize: int, cols: int, residual: int) -> list[Config]:
    moved = itemsize * _ROWS * cols * (4 if residual else 2)
    # Compiled for sm_120, 32 elements of x and of a residual spill.
    each = _ELEMENTS[:2] if residual and capability >= 120 else _ELEMENTS
    found = []
    for m, n, warps in _tiles(cols, _WIDEST, each):
        under_way = itemsize * m * n * (2 if residual else 1)
        work = Work(triton.cdiv(_ROWS, m), moved, under_way, steps=0 if n >= cols else 2 * (cols // n))
        found.append(_config(m, n, warps, 1.5, work))
    return found


def _bwd_candidates(capability: int, itemsize: int, cols: int, more: int, dweight: int) -> list[Config]:
    """`more`: a gradient to add; `dweight`: sums of dweight beside dx, in programs of many rows."""
    moved = itemsize * _ROWS * cols * (4 if more else 3)
    found = []
    for m, n, warps in _tiles(cols, _WIDEST_WITH_DWEIGHT if dweight else _WIDEST):
        programs, tiles = triton.cdiv(_ROWS, m), 1
        if dweight:
            most = gpu_of(capability).multiprocessors
            programs, tiles = row_tiles(_ROWS, m, most, 4 * most)
        steps = tiles - 1 if n >= cols else 2 * (cols // n)
        work = Work(programs, moved, itemsize * m * n * (3 if more else 2), steps=steps)
        found.append(_config(m, n, warps, 4 if dweight else 2.5, work, bool(dweight)))
    return found


FWD = Family("rms_norm_fwd", ("itemsize", "cols", "residual"), _fwd_candidates)
BWD = Family("rms_norm_bwd", ("itemsize", "cols", "more", "dweight"), _bwd_candidates)
# Columns of dweight, 128 bytes of them and more to a row, and sums of partials, which are few.
DWEIGHT = Family(
    "rms_norm_bwd_dweight", (), lambda capability: [Config({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 1, 8 * 4 * 128)]
)
SUM = Family("rms_norm_bwd_sum", (), lambda capability: [Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 1, 4 * 4 * 32)])

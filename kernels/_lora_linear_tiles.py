"""How the kernels of `lora_linear` are tiled: configurations by kind and class of shapes, and what each would do."""

from __future__ import annotations

import functools

import triton

from pyfinetune.kernels.config import INTERPRETER, Config, Family, Work, size_class
from pyfinetune.kernels.gpus import gpu_of

# (BLOCK_M, BLOCK_K) of 16-bit tiles that ptxas keeps under a limit of registers by spilling some, though it might have
# more: by kind, capability and BLOCK_R.
_SPILLING = {
    ("up", 80, 16): {(64, 128)},
    ("up", 100, 16): {(64, 64)},
    ("up", 100, 32): {(64, 64)},
    ("down", 100, 32): {(64, 128), (64, 64)},
}


def _tiles(kind: str, block_r: int, itemsize: int, busy: bool) -> list[tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_K, warps, stages) of "down", "outer", "both", "up" and "dora" for a tile of the rank, best first.

    All of them read one large matrix once and do 2 * r operations for each of its elements, far below what the tensor
    cores could: memory is the limit. So tiles are as wide as 16-byte loads of whole lines want, with the stages that
    keep some 32 KiB in flight on each multiprocessor, which is what the latency of memory asks for at 1 to 4 TB/s.
    float32 has no tensor cores in IEEE precision; its tiles are small, for the registers' sake. `busy` programs make
    a mask or sums of squares of their tile besides, and have a smaller one for it. The lowest tiles are for few rows.
    """
    if itemsize == 4:
        known = {"down": (32, 32, 4, 2), "outer": (32, 32, 4, 2), "both": (32, 32, 4, 1), "up": (32, 64, 4, 1)}
        return [known.get(kind, (32, 64, 8, 1))]
    if kind == "down" and busy:
        return [(32 if block_r == 32 else 64, 64, 4, 3)] if block_r <= 64 else [(64, 32, 4, 2)]
    if kind == "outer" and busy:
        return [(64, 64, 4, 3)] if block_r <= 32 else [(32, 64, 4, 3 if block_r <= 64 else 2)]
    if kind == "down":
        wide = [(64, 128, 4, 3), (64, 64, 4, 3)] if block_r <= 32 else [(64, 64, 4, 3), (64, 32, 4, 2)]
        return [*wide, (32, 128, 4, 3), (16, 128, 4, 3)] if block_r <= 64 else wide
    if kind == "outer":
        return [(64, 128, 4, 3), (64, 64, 4, 3)] if block_r <= 32 else [(64, 64, 4, 3), (32, 64, 4, 2)]
    if kind == "both":
        return [(64, 128, 4, 2), (32, 128, 4, 2)]
    if kind == "dora":
        return [(64, 128, 8, 2), (64, 64, 8, 2)]
    return [(64, 128, 4, 2), (64, 64, 4, 2), (16, 128, 4, 2)]


def _candidates(
    kind: str, capability: int, itemsize: int, block_r: int, busy: int, rows: int, width: int
) -> list[Config]:
    if capability == INTERPRETER:
        itemsize = 2  # in Python larger tiles are fewer programs, and nothing else counts
    found = []
    spilling = _SPILLING.get((kind, capability, block_r), ()) if itemsize == 2 and not busy else ()
    for m, k, warps, stages in _tiles(kind, block_r, itemsize, bool(busy)):
        if (m, k) in spilling:
            continue
        work = _work(kind, capability, itemsize, block_r, rows, width, (m, k, stages))
        # The stages of both operands, and what a copy of the matrix takes on its way to another layout.
        shared = stages * itemsize * (m * k + (m + k) * block_r) + 2048
        sums = {"down": m * block_r, "outer": k * block_r, "both": (k + m) * block_r}.get(kind, m * k)
        registers = (sums + m * k * itemsize // 4 + (m + k) * 4) // (32 * warps) + 48
        found.append(Config({"BLOCK_M": m, "BLOCK_K": k, "BLOCK_R": block_r}, warps, stages, shared, registers, work))
    return found


def _work(kind, capability: int, itemsize: int, block_r: int, rows: int, width: int, tile: tuple) -> Work:
    """What a launch does: the large matrix once, or as often as a kind reads and writes it, and the thin ones."""
    m, k, stages = tile
    strips_m, strips_k = triton.cdiv(rows, m), triton.cdiv(width, k)
    matrix, loaded = itemsize * rows * width, itemsize * m * k
    flops, on_tensor_cores = 2.0 * strips_m * m * strips_k * k * block_r, itemsize == 2
    thin = itemsize * (strips_m * width + strips_k * rows) * block_r
    if kind in ("up", "dora"):  # a program is a tile: Y in and out, or Z, the base and Y
        moved, under_way = matrix * (2 if kind == "up" else 4), loaded * (1 if kind == "up" else 2)
        return Work(strips_m * strips_k, moved, under_way, moved + thin, flops, 0, on_tensor_cores)
    programs, steps = (strips_m, strips_k) if kind == "down" else (strips_k, strips_m)
    parts, steps = parts_of(programs, steps, gpu_of(capability).multiprocessors, 4)
    # Partial sums are written and read again, in float32.
    partial = 8 * block_r * parts * (rows if kind == "down" else width)
    if kind == "both":
        partial, flops = partial + 8 * block_r * rows * strips_k, 2 * flops
    moved, under_way = matrix + partial, max(stages - 1, 1) * loaded
    return Work(programs * parts, moved, under_way, moved + thin, flops, steps, on_tensor_cores)


_KINDS = ("down", "outer", "both", "up", "dora")
_FIELDS = ("itemsize", "block_r", "busy", "rows", "width")
FAMILIES = {kind: Family(f"lora_linear_{kind}", _FIELDS, functools.partial(_candidates, kind)) for kind in _KINDS}


@functools.lru_cache(1024)  # each call asks
def class_of(kind: str, rank: int, itemsize: int, busy: bool, rows: int, width: int) -> tuple[int, ...]:
    """The class of shapes of a kernel, as its family's fields name it; a large rank is taken in chunks."""
    block_r = size_class(rank, 16, 32 if itemsize == 4 else 64 if kind in ("up", "dora") else 128)
    return itemsize, block_r, int(busy), size_class(rows, 16, 1 << 15), size_class(width, 64, 1 << 15)


def parts_of(programs: int, steps: int, multiprocessors: int, least: int) -> tuple[int, int]:
    """(parts, steps of each) of a sum, such that `programs` of them fill the GPU twice; `least` steps each."""
    wanted = triton.cdiv(2 * multiprocessors, max(programs, 1))
    parts = max(1, min(wanted, triton.cdiv(steps, least), 64))
    each = triton.cdiv(steps, parts)
    return (triton.cdiv(steps, each), each) if each else (1, 0)

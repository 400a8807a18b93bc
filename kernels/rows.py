"""Triton: rows of strided tensors, for the kernels that treat every row of their tensors alike.

    row -> (i0, i1, i2) -> i0 * stride_0 + i1 * stride_1 + i2 * stride_2      in elements, 64 bits wide

    [batch, heads, tokens, features] seen through a transpose     i0 = batch   i1 = head   i2 = token
    rows of a wider projection, [batch, tokens, :features]        i0 = batch and token, which merge into one index

All dimensions but the last are merged as far as the memory of every tensor of a call allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_DIMS = 3


@dataclass(frozen=True)
class Rows:
    """Tensors of one shape as rows of features.

    Args:
        tensors: those that were given, or contiguous copies where their rows took more than three indices.
        count: how many rows.
        dims: how many indices a row has, 1 to 3.
        sizes: what the second and third of them count; 1 where there is none.
        strides: for each tensor its three strides; 0 where there is no such index.
    """

    tensors: tuple[torch.Tensor, ...]
    count: int
    dims: int
    sizes: tuple[int, int]
    strides: tuple[tuple[int, int, int], ...]


def rows_of(*tensors: torch.Tensor) -> Rows:
    """Rows along the last dimension of tensors that have one shape, of one dimension at least."""
    first = tensors[0]
    cols = first.shape[-1]
    count = first.numel() // cols if cols else 0
    if all(tensor.is_contiguous() for tensor in tensors):
        return Rows(tensors, count, 1, (1, 1), ((cols, 0, 0),) * len(tensors))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for axis, size in enumerate(first.shape[:-1]):
        if size == 1:
            continue
        steps = [tensor.stride(axis) for tensor in tensors]
        if sizes and all(known[-1] == step * size for known, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for known, step in zip(strides, steps, strict=True):
                known[-1] = step
        else:
            sizes.append(size)
            for known, step in zip(strides, steps, strict=True):
                known.append(step)
    if len(sizes) > MOST_DIMS:
        return rows_of(*(tensor.contiguous() for tensor in tensors))
    missing = MOST_DIMS - len(sizes)
    padded = [*sizes, *[1] * missing]
    return Rows(
        tensors,
        count,
        max(len(sizes), 1),
        (padded[1], padded[2]),
        tuple((*known, *[0] * missing) for known in strides),
    )


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2, DIMS: tl.constexpr):
    """Where rows begin, in elements; `row` is int64."""
    if DIMS == 1:
        offset = row * stride_0
    elif DIMS == 2:
        offset = (row // size_1) * stride_0 + (row % size_1) * stride_1
    else:
        outer = row // size_2
        offset = (outer // size_1) * stride_0 + (outer % size_1) * stride_1 + (row % size_2) * stride_2
    return offset


def signature(kernel, constants: Iterable[str], pointers: dict[str, str], other: str) -> dict[str, str]:
    """Types of a kernel's arguments for a compilation: those that are neither constants nor scalars point to `other`
    unless `pointers` says what to."""
    types = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            types[name] = pointers.get(name, other)
        elif name not in constants:
            types[name] = "fp32" if name in ("eps", "offset") else "i32"
    return types

"""Triton: root-mean-square normalisation.

    forward    y = x r g,  r = 1 / sqrt(mean(x^2) + eps),  g = offset + weight;  x + residual in x's place, if any
    backward   dx = r (g dy - n mean(g dy n)) + dsum,  n = x r;   dweight = sum over rows of dy n

    rows fit:  a program holds BLOCK_M whole rows [BLOCK_M, BLOCK_N >= COLS] in registers: one pass over memory
    wide rows: a program walks one row in tiles of BLOCK_N twice, the second time through the cache

    dweight:   each program sums its rows -> partial [programs, COLS] float32 -> one sum over programs in a fixed order

Statistics and products are float32, rounded once. Reference: pyfinetune/ops/rms_norm.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pyfinetune.kernels.config import Compilation, Config, capability_of, first_fitting
from pyfinetune.kernels.rows import Rows, row_offset, rows_of, signature

_ELEMENTS = 16  # of a row tile that a thread holds: two or four loads of 16 bytes in flight for each tensor
_WIDEST = 16384  # the most features of a row that is held in registers: 32 to a thread
_WIDEST_WITH_DWEIGHT = 8192  # with sums of dweight beside them: 16 to a thread
_WIDE_BLOCK = 4096  # tiles of wider rows


@triton.jit
def _load_stream(x_row, residual_row, col, mask, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to its dtype: [BLOCK_M, BLOCK_N]."""
    x = tl.load(x_row[:, None] + col[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_row[:, None] + col[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _load_gain(weight_ptr, offset, col, COLS: tl.constexpr):
    """offset + weight in float32: [1, BLOCK_N]."""
    weight = tl.load(weight_ptr + col, mask=col < COLS, other=0.0)
    return (weight.to(tl.float32) + offset)[None, :]


@triton.jit
def _reciprocal_root(squares, eps, COLS: tl.constexpr):
    # Once a row, so exact roundings cost nothing; the fast ones flush small numbers to zero.
    mean = tl.div_rn(squares, tl.full(squares.shape, COLS, tl.float32))
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit(do_not_specialize=["rows", "size_1", "size_2"])
def _rms_norm_fwd_kernel(
    y_ptr,
    total_ptr,
    rstd_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    rows,
    size_1,
    size_2,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    residual_stride_0,
    residual_stride_1,
    residual_stride_2,
    eps,
    offset,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = row < rows
    x_row = x_ptr + row_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2, DIMS)
    residual_row = x_row
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row_offset(
            row, size_1, size_2, residual_stride_0, residual_stride_1, residual_stride_2, DIMS
        )
    y_row, total_row = y_ptr + row * COLS, total_ptr + row * COLS
    if BLOCK_N >= COLS:
        col = tl.arange(0, BLOCK_N)
        mask = live[:, None] & (col < COLS)[None, :]
        x = _load_stream(x_row, residual_row, col, mask, HAS_RESIDUAL)  # [BLOCK_M, BLOCK_N]
        gain = _load_gain(weight_ptr, offset, col, COLS)  # [1, BLOCK_N]
        if HAS_RESIDUAL:
            tl.store(total_row[:, None] + col[None, :], x, mask=mask)
        x = x.to(tl.float32)
        rstd = _reciprocal_root(tl.sum(x * x, axis=1), eps, COLS)  # [BLOCK_M]
        y = x * rstd[:, None] * gain
        tl.store(y_row[:, None] + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, COLS, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            mask = live[:, None] & (col < COLS)[None, :]
            x = _load_stream(x_row, residual_row, col, mask, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(total_row[:, None] + col[None, :], x, mask=mask)
            x = x.to(tl.float32)
            squares += x * x
        rstd = _reciprocal_root(tl.sum(squares, axis=1), eps, COLS)
        for start in range(0, COLS, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            mask = live[:, None] & (col < COLS)[None, :]
            # Added once more: what another thread of the program has stored may not be visible yet.
            x = _load_stream(x_row, residual_row, col, mask, HAS_RESIDUAL).to(tl.float32)
            y = x * rstd[:, None] * _load_gain(weight_ptr, offset, col, COLS)
            tl.store(y_row[:, None] + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=live)


@triton.jit
def _gradient(g, normal, rstd, gain, mean, dsum_row, col, mask, HAS_SUM: tl.constexpr):
    """dx in float32: [BLOCK_M, BLOCK_N]."""
    dx = rstd[:, None] * (g * gain - normal * mean[:, None])
    if HAS_SUM:
        dx += tl.load(dsum_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    return dx


@triton.jit(do_not_specialize=["rows", "tiles", "size_1", "size_2"])
def _rms_norm_bwd_kernel(
    dx_ptr,
    partial_ptr,
    dout_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    rows,
    tiles,
    size_1,
    size_2,
    dout_stride_0,
    dout_stride_1,
    dout_stride_2,
    dsum_stride_0,
    dsum_stride_1,
    dsum_stride_2,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    offset,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has `tiles` tiles of BLOCK_M rows; more than one only where it sums their parts of dweight."""
    program = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if NEED_DWEIGHT:
        gain = _load_gain(weight_ptr, offset, first, COLS)  # [1, BLOCK_N]
    for tile in range(tiles):
        row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        live = row < rows
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        x_row = x_ptr + row_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2, DIMS)
        dout_row = dout_ptr + row_offset(row, size_1, size_2, dout_stride_0, dout_stride_1, dout_stride_2, DIMS)
        dsum_row = dout_row
        if HAS_SUM:
            dsum_row = dsum_ptr + row_offset(row, size_1, size_2, dsum_stride_0, dsum_stride_1, dsum_stride_2, DIMS)
        dx_row = dx_ptr + row * COLS
        if BLOCK_N >= COLS:
            mask = live[:, None] & (first < COLS)[None, :]
            if not NEED_DWEIGHT:  # one tile: loaded beside x, where it holds no registers before
                gain = _load_gain(weight_ptr, offset, first, COLS)
            x = tl.load(x_row[:, None] + first[None, :], mask=mask, other=0.0)
            g = tl.load(dout_row[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)
            normal = x.to(tl.float32) * rstd[:, None]
            mean = tl.sum(g * gain * normal, axis=1) / COLS  # [BLOCK_M]
            dx = _gradient(g, normal, rstd, gain, mean, dsum_row, first, mask, HAS_SUM)
            tl.store(dx_row[:, None] + first[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEED_DWEIGHT:
                sums += g * normal
        else:
            products = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for start in range(0, COLS, BLOCK_N):
                col = start + first
                mask = live[:, None] & (col < COLS)[None, :]
                x = tl.load(x_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
                g = tl.load(dout_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
                products += g * _load_gain(weight_ptr, offset, col, COLS) * (x * rstd[:, None])
            mean = tl.sum(products, axis=1) / COLS
            for start in range(0, COLS, BLOCK_N):
                col = start + first
                mask = live[:, None] & (col < COLS)[None, :]
                x = tl.load(x_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
                g = tl.load(dout_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
                part = _load_gain(weight_ptr, offset, col, COLS)
                dx = _gradient(g, x * rstd[:, None], rstd, part, mean, dsum_row, col, mask, HAS_SUM)
                tl.store(dx_row[:, None] + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_DWEIGHT:
        tl.store(partial_ptr + program * COLS + first, tl.sum(sums, axis=0), mask=first < COLS)


@triton.jit(do_not_specialize=["rows", "tiles", "size_1", "size_2"])
def _rms_norm_bwd_dweight_kernel(
    partial_ptr,
    dout_ptr,
    x_ptr,
    rstd_ptr,
    rows,
    tiles,
    size_1,
    size_2,
    dout_stride_0,
    dout_stride_1,
    dout_stride_2,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Parts of dweight where dx is not wanted, or rows are wide: BLOCK_N columns of `tiles` tiles of rows a program."""
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < rows
        mask = live[:, None] & (col < COLS)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        x_row = x_ptr + row_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2, DIMS)
        dout_row = dout_ptr + row_offset(row, size_1, size_2, dout_stride_0, dout_stride_1, dout_stride_2, DIMS)
        x = tl.load(x_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dout_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += g * (x * rstd[:, None])
    tl.store(partial_ptr + program * COLS + col, tl.sum(sums, axis=0), mask=col < COLS)


@triton.jit(do_not_specialize=["programs"])
def _rms_norm_bwd_sum_kernel(
    dweight_ptr, partial_ptr, programs, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, programs, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (row < programs)[:, None] & (col < COLS)[None, :]
        sums += tl.load(partial_ptr + row[:, None] * COLS + col[None, :], mask=mask, other=0.0)
    tl.store(dweight_ptr + col, tl.sum(sums, axis=0).to(dweight_ptr.dtype.element_ty), mask=col < COLS)


def configs(cols: int, with_dweight: bool = False) -> list[Config]:
    """Row tiles, best first: what moves memory fastest is many loads in flight, which is whole rows in registers.

    A thread holds 16 elements of each tensor (32 of the widest rows), so four to eight programs share a
    multiprocessor, and narrow rows are joined until four warps have that much to do. The shared memory is what sums
    across warps take.
    """
    widest = _WIDEST_WITH_DWEIGHT if with_dweight else _WIDEST
    block_n = triton.next_power_of_2(cols)
    if block_n > widest:
        block_n = _WIDE_BLOCK
    block_m = max(1, 4 * 32 * _ELEMENTS // block_n)
    warps = min(max(block_m * block_n // (32 * _ELEMENTS), 4), 16)
    shared = 8 * block_m * warps + (4 * block_n * min(block_m, warps) if with_dweight else 0)
    return [Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=1, shared_bytes=shared)]


def dweight_configs() -> list[Config]:
    """Columns of dweight, 128 bytes of them and more to a row, and sums of partials, which are few."""
    return [Config({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=1, shared_bytes=8 * 4 * 128)]


def sum_configs() -> list[Config]:
    return [Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=1, shared_bytes=4 * 4 * 32)]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter's 4 make few rows take every path.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _row_tiles(rows: int, block_m: int, at_least: int, at_most: int) -> tuple[int, int]:
    """(programs, tiles of block_m rows for each): about 16 rows a program where that keeps `at_least` programs."""
    tiles = triton.cdiv(rows, block_m)
    programs = min(tiles, max(at_least, min(at_most, triton.cdiv(rows, 16))))
    each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, each), each


def rms_norm(
    y: torch.Tensor,
    total: torch.Tensor | None,
    rstd: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
) -> None:
    """Normalise the rows of x, or of x + residual, into y.

    Args:
        y, total: of x's shape and dtype, contiguous; total only with a residual.
        rstd: float32 [rows], contiguous.
        x, residual: [..., cols], the last dimension contiguous; any strides of the others.
        weight: [cols], contiguous, any float dtype.
        eps, offset: added to the mean square, to the weight.
    """
    if residual is None:
        rows = rows_of(x)
        (x,), (x_strides,) = rows.tensors, rows.strides
        residual, residual_strides, total, has_residual = x, x_strides, y, False
    else:
        rows = rows_of(x, residual)
        (x, residual), (x_strides, residual_strides), has_residual = rows.tensors, rows.strides, True
    if rows.count == 0:
        return
    config = first_fitting(configs(x.shape[-1]), capability_of(x))
    _rms_norm_fwd_kernel[(triton.cdiv(rows.count, config.blocks["BLOCK_M"]),)](
        y,
        total,
        rstd,
        x,
        residual,
        weight,
        rows.count,
        *rows.sizes,
        *x_strides,
        *residual_strides,
        float(eps),
        float(offset),
        COLS=x.shape[-1],
        DIMS=rows.dims,
        HAS_RESIDUAL=has_residual,
        **config.options(),
    )


def rms_norm_bwd(
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dout: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
) -> None:
    """The gradients that are given a place; sums of dweight depend on the GPU alone.

    Args:
        dx: of x's shape and dtype, contiguous, or None.
        dweight: of the weight's shape and dtype, contiguous, or None.
        dout, dsum, x: of one shape and dtype, the last dimension contiguous; dsum, added to dx, may be None.
        weight: [cols], contiguous, any float dtype.
        rstd: float32 [rows], contiguous, from the forward.
        offset: added to the weight.
    """
    rows = rows_of(dout, x) if dsum is None else rows_of(dout, x, dsum)
    dout, x = rows.tensors[:2]
    cols, capability = x.shape[-1], capability_of(x)
    if rows.count == 0:
        if dweight is not None:
            dweight.zero_()
        return
    config = first_fitting(configs(cols, dweight is not None), capability)
    together = dx is not None and dweight is not None and config.blocks["BLOCK_N"] >= cols
    partial = None
    if together:
        most = _multiprocessors(x.device)
        programs, tiles = _row_tiles(rows.count, config.blocks["BLOCK_M"], most, 4 * most)
        partial = x.new_empty((programs, cols), dtype=torch.float32)
    elif dweight is not None:
        partial = _dweight_alone(rows, rstd)
    if dx is not None:
        if not together:
            config = first_fitting(configs(cols), capability)
            programs, tiles = triton.cdiv(rows.count, config.blocks["BLOCK_M"]), 1
        _rms_norm_bwd_kernel[(programs,)](
            dx,
            partial if together else rstd,
            dout,
            dout if dsum is None else rows.tensors[2],
            x,
            weight,
            rstd,
            rows.count,
            tiles,
            *rows.sizes,
            *rows.strides[0],
            *rows.strides[0 if dsum is None else 2],
            *rows.strides[1],
            float(offset),
            COLS=cols,
            DIMS=rows.dims,
            HAS_SUM=dsum is not None,
            NEED_DWEIGHT=together,
            **config.options(),
        )
    if dweight is not None:
        config = first_fitting(sum_configs(), capability)
        _rms_norm_bwd_sum_kernel[(triton.cdiv(cols, config.blocks["BLOCK_N"]),)](
            dweight, partial, partial.shape[0], COLS=cols, **config.options()
        )


def _dweight_alone(rows: Rows, rstd: torch.Tensor) -> torch.Tensor:
    """Partial sums of dweight, made without dx: float32 [programs, cols]."""
    dout, x = rows.tensors[:2]
    cols = x.shape[-1]
    config = first_fitting(dweight_configs(), capability_of(x))
    columns = triton.cdiv(cols, config.blocks["BLOCK_N"])
    most = triton.cdiv(8 * _multiprocessors(x.device), columns)
    programs, tiles = _row_tiles(rows.count, config.blocks["BLOCK_M"], 1, most)
    partial = x.new_empty((programs, cols), dtype=torch.float32)
    _rms_norm_bwd_dweight_kernel[(columns, programs)](
        partial,
        dout,
        x,
        rstd,
        rows.count,
        tiles,
        *rows.sizes,
        *rows.strides[0],
        *rows.strides[1],
        COLS=cols,
        DIMS=rows.dims,
        **config.options(),
    )
    return partial


def compilations(capability: int) -> Iterator[Compilation]:
    """Hidden sizes of common models, the norms of their heads, and rows too wide for registers."""
    cases = [(128, "bf16", 3), (576, "bf16", 1), (4096, "bf16", 1), (4096, "fp32", 1), (5120, "bf16", 1)]
    for cols, dtype, dims in [*cases, (8192, "bf16", 1), (16384, "bf16", 1), (20480, "bf16", 1)]:
        pointers = dict.fromkeys(("rstd_ptr", "partial_ptr"), "*fp32")
        shape = {"COLS": cols, "DIMS": dims}

        def compilation(kernel, name, config, constants, pointers=pointers, dtype=dtype, cols=cols):
            fields = signature(kernel, {**constants, **config.blocks}, pointers, f"*{dtype}")
            return Compilation(f"{name} {cols} {dtype}", kernel, fields, constants, config)

        for extra in (False, True):
            label = " with residual" if extra else ""
            constants = {**shape, "HAS_RESIDUAL": extra}
            config = first_fitting(configs(cols), capability)
            yield compilation(_rms_norm_fwd_kernel, f"forward{label}", config, constants)
            constants = {**shape, "HAS_SUM": extra, "NEED_DWEIGHT": False}
            yield compilation(_rms_norm_bwd_kernel, f"backward{label}", config, constants)
            config = first_fitting(configs(cols, with_dweight=True), capability)
            if config.blocks["BLOCK_N"] >= cols:
                constants = {**shape, "HAS_SUM": extra, "NEED_DWEIGHT": True}
                yield compilation(_rms_norm_bwd_kernel, f"backward{label} with dweight", config, constants)
        config = first_fitting(dweight_configs(), capability)
        yield compilation(_rms_norm_bwd_dweight_kernel, "dweight", config, shape)
        config = first_fitting(sum_configs(), capability)
        yield compilation(_rms_norm_bwd_sum_kernel, "sum", config, {"COLS": cols})

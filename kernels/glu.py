"""Triton: gated linear units, h = f(gate) up and dgate = dout up f'(gate), dup = dout f(gate), one pass over memory.

    silu        f = x s,    f' = s + x s (1 - s),          s = sigmoid(x)
    gelu_tanh   f = x s,    f' = s + x s (1 - s) u',       s = sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    gelu        f = x P,    f' = P + x p,                  P and p the normal distribution and its density

    program p takes tile (p // column tiles, p % column tiles) of [rows, cols]; contiguous tensors are one long row

In float32, rounded once; 16-bit results from at least 13 right bits. Reference: pyfinetune/ops/glu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pyfinetune.kernels.config import Compilation, Config, Family, Work, capability_of, size_class
from pyfinetune.kernels.rows import row_offset, rows_of, signature

_LOG2E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that its product with a small whole number is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_TANH_LINEAR = tl.constexpr(1.59576912160573071)  # 2 sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.0713548162726)  # that times 0.044715
_DENSITY = tl.constexpr(0.39894228040143268)  # 1 / sqrt(2 pi)


@triton.jit
def _exp_of_minus(x, ROUGH: tl.constexpr):
    """e^-x for x >= 0; to 2 units in the last place, or (rough) to 1e-5. NaN stays NaN."""
    x = tl.where(x > 200.0, 200.0, x)  # beyond it the result is zero, and infinity would give NaN
    if ROUGH:
        result = tl.exp2(x * -_LOG2E)
    else:
        # The hardware's 2^y is as good as y, whose rounding errors grow with x: so y is cut to [-1/2, 1/2].
        whole = tl.floor(x * -_LOG2E + 0.5)
        rest = (-x - whole * _LN2_HIGH) - whole * _LN2_LOW
        result = tl.exp2(rest * _LOG2E) * tl.exp2(whole)
    return result


@triton.jit
def _sigmoid(x, ROUGH: tl.constexpr):
    """sigmoid(x) and 1 - sigmoid(x), neither of them by a subtraction that cancels."""
    e = _exp_of_minus(tl.abs(x), ROUGH)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def _normal(x, ROUGH: tl.constexpr):
    """The normal distribution function and its density.

    The tail beyond |x| is e^(-x^2 / 2) times half of erfcx(|x| / sqrt 2), which has no scale: a polynomial in
    t = 1 / (1 + c |x|) fits it to 2e-8 relatively (rough: 5e-6), so small tails are as good as large ones. Where
    |x| < 1.25 the distribution is 1/2 + x times a polynomial in x^2, fitted to 1e-8. (The fits: csrc/cpu/vec_math.h.)
    """
    size, square = tl.abs(x), x * x
    e = _exp_of_minus(0.5 * square, ROUGH)
    if ROUGH:
        t = 1.0 / (size * 0.311126984 + 1.0)
        p = ((((t * -0.146104473 + 0.350648221) * t + 0.0407369137) * t + 0.263582604) * t + 0.242570679) * t
        tail = (p + 0.248560888) * t * (0.5 * e)
        cumulative = tl.where(x < 0, tail, 1.0 - tail)
    else:
        t = 1.0 / (size * 0.268700577 + 1.0)
        p = (((t * 0.0589652750 - 0.262272041) * t + 0.363839524) * t - 0.161429847) * t + 0.230001442
        p = (((p * t + 0.138661632) * t + 0.203903253) * t + 0.213919850) * t + 0.214410932
        tail = p * t * (0.5 * e)
        q = (square * -6.80949044e-6 + 1.11041122e-4) * square - 1.18383715e-3
        q = ((q * square + 9.97228272e-3) * square - 6.64902079e-2) * square + 0.398942277
        cumulative = tl.where(size < 1.25, x * q + 0.5, tl.where(x < 0, tail, 1.0 - tail))
    return cumulative, e * _DENSITY


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, ROUGH: tl.constexpr):
    """f(x) and f'(x), whose instructions vanish where it is not used."""
    if ACTIVATION == "gelu":
        cumulative, density = _normal(x, ROUGH)
        value, slope = x * cumulative, cumulative + x * density
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        sigmoid, complement = _sigmoid(x * (square * _TANH_CUBIC + _TANH_LINEAR), ROUGH)
        value = x * sigmoid
        bend = value * complement
        # Far out the bend is zero, and the slope of u infinite.
        slope = sigmoid + tl.where(bend != 0.0, bend * (square * (3.0 * _TANH_CUBIC) + _TANH_LINEAR), 0.0)
    else:
        sigmoid, complement = _sigmoid(x, ROUGH)
        value = x * sigmoid
        slope = sigmoid + value * complement
    return value, slope


@triton.jit
def _tile(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows, columns and mask."""
    column_tiles = tl.cdiv(cols, BLOCK_N)
    tile = tl.program_id(0)
    row = (tile // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = (tile % column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    return row, col, (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit(do_not_specialize=["rows", "size_1", "size_2"])
def _glu_fwd_kernel(
    out_ptr,
    gate_ptr,
    up_ptr,
    rows,
    cols,
    size_1,
    size_2,
    gate_stride_0,
    gate_stride_1,
    gate_stride_2,
    up_stride_0,
    up_stride_1,
    up_stride_2,
    DIMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, col, mask = _tile(rows, cols, BLOCK_M, BLOCK_N)
    gate_row = gate_ptr + row_offset(row, size_1, size_2, gate_stride_0, gate_stride_1, gate_stride_2, DIMS)
    up_row = up_ptr + row_offset(row, size_1, size_2, up_stride_0, up_stride_1, up_stride_2, DIMS)
    gate = tl.load(gate_row[:, None] + col[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    up = tl.load(up_row[:, None] + col[None, :], mask=mask, other=0.0)
    value, _slope = _activate(gate.to(tl.float32), ACTIVATION, ROUGH)
    h = value * up.to(tl.float32)
    tl.store(out_ptr + row[:, None] * cols + col[None, :], h.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "size_1", "size_2"])
def _glu_bwd_kernel(
    dgate_ptr,
    dup_ptr,
    dout_ptr,
    gate_ptr,
    up_ptr,
    rows,
    cols,
    size_1,
    size_2,
    dout_stride_0,
    dout_stride_1,
    dout_stride_2,
    gate_stride_0,
    gate_stride_1,
    gate_stride_2,
    up_stride_0,
    up_stride_1,
    up_stride_2,
    DIMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, col, mask = _tile(rows, cols, BLOCK_M, BLOCK_N)
    dout_row = dout_ptr + row_offset(row, size_1, size_2, dout_stride_0, dout_stride_1, dout_stride_2, DIMS)
    gate_row = gate_ptr + row_offset(row, size_1, size_2, gate_stride_0, gate_stride_1, gate_stride_2, DIMS)
    up_row = up_ptr + row_offset(row, size_1, size_2, up_stride_0, up_stride_1, up_stride_2, DIMS)
    gate = tl.load(gate_row[:, None] + col[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    up = tl.load(up_row[:, None] + col[None, :], mask=mask, other=0.0)
    g = tl.load(dout_row[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    value, slope = _activate(gate.to(tl.float32), ACTIVATION, ROUGH)
    dgate, dup = g * up.to(tl.float32) * slope, g * value
    out = row[:, None] * cols + col[None, :]
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=mask)


# (Elements of a tile, warps), best first.
_TILES = {
    # A thread has 16 of each tensor on the way forward: four loads of 16 bytes in flight.
    "forward": ((2048, 4), (1024, 4), (4096, 8), (1024, 2)),
    # And 8 on the way back, where there are three tensors and two results.
    "backward": ((2048, 8), (1024, 4), (2048, 4), (4096, 8)),
}


def _candidates(way: str, capability: int, itemsize: int, cols: int, numel: int) -> list[Config]:
    """Of rows of `cols` elements, a power of two that is a tile at most; no shared memory."""
    tensors, results = (2, 1) if way == "forward" else (3, 2)
    found = []
    for elements, warps in _TILES[way]:
        block_n = min(cols, elements)
        work = Work(triton.cdiv(numel, elements), (tensors + results) * itemsize * numel, tensors * itemsize * elements)
        registers = (tensors + results) * elements // (64 * warps) + 32
        blocks = {"BLOCK_M": elements // block_n, "BLOCK_N": block_n}
        found.append(Config(blocks, warps, 1, registers=registers, work=work))
    return found


_FIELDS = ("itemsize", "cols", "numel")
FWD = Family("glu_fwd", _FIELDS, functools.partial(_candidates, "forward"))
BWD = Family("glu_bwd", _FIELDS, functools.partial(_candidates, "backward"))


@functools.lru_cache(1024)  # each call asks
def _class(itemsize: int, cols: int, numel: int) -> tuple[int, int, int]:
    # Elements are independent, so that bits depend on neither.
    return itemsize, size_class(cols, 1, 4096), size_class(numel, 1 << 16, 1 << 28)


def _launch(family: Family, kernel, results, tensors, activation: str) -> None:
    gate = tensors[0]
    if gate.numel() == 0:
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    rows = rows_of(*tensors)
    cols = tensors[0].shape[-1]

    def launch(config: Config) -> None:
        grid = (triton.cdiv(rows.count, config.blocks["BLOCK_M"]) * triton.cdiv(cols, config.blocks["BLOCK_N"]),)
        kernel[grid](
            *results,
            *rows.tensors,
            rows.count,
            cols,
            *rows.sizes,
            *(stride for strides in rows.strides for stride in strides),
            DIMS=rows.dims,
            ACTIVATION=activation,
            ROUGH=gate.element_size() == 2,
            **config.options(),
        )

    of_class = _class(gate.element_size(), cols, gate.numel())
    launch(family.choose(capability_of(gate), *of_class, launch=launch))


def describe(capability: int, gate: torch.Tensor, up: torch.Tensor) -> list[str]:
    """How both directions would be launched, for `pf.explain`."""
    cols = gate.numel() if gate.is_contiguous() and up.is_contiguous() else gate.shape[-1]
    of_class = _class(gate.element_size(), cols, gate.numel())
    return [FWD.describe(capability, *of_class), BWD.describe(capability, *of_class)] if gate.numel() else []


def glu(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """h = f(gate) * up into out.

    Args:
        out: of gate's shape and dtype, contiguous.
        gate, up: of one shape and dtype, the last dimension contiguous; any strides of the others.
        activation: "silu", "gelu_tanh" or "gelu".
    """
    _launch(FWD, _glu_fwd_kernel, (out,), (gate, up), activation)


def glu_bwd(
    dgate: torch.Tensor,
    dup: torch.Tensor,
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
) -> None:
    """Both gradients.

    Args:
        dgate, dup: of gate's shape and dtype, contiguous.
        dout, gate, up, activation: as in `glu`; dout of gate's shape and dtype.
    """
    _launch(BWD, _glu_bwd_kernel, (dgate, dup), (dout, gate, up), activation)


def compilations(capability: int) -> Iterator[Compilation]:
    """Every activation in 16 bits and in float32: long rows, and short ones of strided tensors."""
    for activation in ("silu", "gelu_tanh", "gelu"):
        for dtype, cols, dims in (("bf16", 14336, 1), ("fp16", 1536, 1), ("fp32", 14336, 1), ("bf16", 96, 3)):
            constants = {"DIMS": dims, "ACTIVATION": activation, "ROUGH": dtype != "fp32"}
            of_class = _class(4 if dtype == "fp32" else 2, cols, 8192 * cols)
            for name, family, kernel in (("forward", FWD, _glu_fwd_kernel), ("backward", BWD, _glu_bwd_kernel)):
                for config, label, alternative in family.instances(capability, *of_class):
                    fields = signature(kernel, {**constants, **config.blocks}, {}, f"*{dtype}")
                    title = f"{name} {activation} {cols} {dtype}{label}"
                    yield Compilation(title, kernel, fields, constants, config, alternative=alternative)

"""Triton: what the kernels of packed attention have in common: rows in and out, and exponentials."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(x_ptr, rows, row_stride, there, DIM: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED]; zeros in rows that are not there and from column DIM on."""
    columns = tl.arange(0, PADDED)
    inside = there[:, None]
    if DIM != PADDED:
        inside = inside & (columns[None, :] < DIM)
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(x_ptr, values, rows, row_stride, there, DIM: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    inside = there[:, None]
    if DIM != PADDED:
        inside = inside & (columns[None, :] < DIM)
    x_ptr += rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(x_ptr, values.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x, ACCURATE: tl.constexpr):
    """(tanh, its slope) by one exponential; ACCURATE to the last bits for either sign, and relatively near 0 and 1."""
    if ACCURATE:
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        y = (1.0 - e) / (1.0 + e)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - y * y would cancel
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2  # Cephes' tanhf
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        y = tl.where(z < 0.390625, series * z * x + x, tl.where(x < 0, -y, y))
    else:
        y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2E)))
        slope = 1.0 - y * y
    return y, slope


@triton.jit
def _exp(x, ACCURATE: tl.constexpr):
    """Of scores in the kernel's own unit: natural, or times log2(e)."""
    if ACCURATE:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def _row_products(x, y, ACCURATE: tl.constexpr):
    """The sum of x * y in each row; ACCURATE rounded as a product of matrices is: dp, less it, is 0 with one key."""
    if ACCURATE:
        rows = tl.arange(0, x.shape[0])
        products = tl.dot(x, tl.trans(y), input_precision="ieee")
        return tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)
    else:
        return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)

"""The CPU backend of `lora_linear`: 4-bit weights decoded into a cache-sized scratch, torch's GEMM around it.

        W [out, in] in 4 bits                 forward: a band of rows of W at a time
        ┌────────────────────┐                y[:, band] = x @ decode(band)^T
        │ band               │
        ├────────────────────┤                backward: a slab of columns at a time, so that no sum over
        │                    │                `out` is split and rounded in between
        └────────────────────┘                dx[:, slab] = dout @ decode(slab)

A GEMM over a band runs at the full GEMM's rate, and the whole decoded weight never exists. For a few rows of x a
GEMM's packing costs more than the product; those go to a decode-and-dot kernel (csrc/cpu/lora_linear.kernel.h).
"""

from __future__ import annotations

import threading

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops.nf4 import decode_into, packed_fields

SCRATCH_BYTES = 4 << 20  # measured: bands of 2 to 8 MiB are within 2 % of one full GEMM
SMALL_ROWS = 32  # kSmallMatmulRows in csrc/cpu/dispatch.h
_BASE_ARGS = 9
_scratch = threading.local()


def _scratch_like(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """[rows, cols] of x's dtype, memory reused from call to call."""
    need = rows * cols * x.element_size()
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < need:
        buffer = torch.empty(max(need, SCRATCH_BYTES), dtype=torch.uint8)
        # A buffer far above the usual size (one very long row) is not worth keeping.
        _scratch.buffer = buffer if need <= 4 * SCRATCH_BYTES else None
    return buffer[:need].view(x.dtype).view(rows, cols)


class Base:
    """The base weight [out, in]: dense, or in 4 bits and decoded tile by tile."""

    def __init__(self, x: torch.Tensor, args: tuple):
        weight, absmax, *_ = args
        self.out_features, self.in_features = int(args[-1]), x.shape[1]
        self.weight = weight if absmax is None else None
        self.fields = None if absmax is None else packed_fields(args[:6], args[6], args[7])

    def tile(self, x: torch.Tensor, rows: range, cols: range) -> torch.Tensor:
        """W[rows, cols] in x's dtype; valid until the next call."""
        if self.weight is not None:
            return self.weight[rows.start : rows.stop, cols.start : cols.stop]
        out = _scratch_like(x, len(rows), len(cols))
        decode_into(out, self.fields, self.out_features, self.in_features, rows.start, cols.start, stream=True)
        return out

    def _steps(self, x: torch.Tensor, total: int, other: int) -> list[range]:
        if self.weight is not None:
            return [range(total)] if total else []
        step = max(64, SCRATCH_BYTES // max(other * x.element_size(), 1) // 64 * 64)
        return [range(i, min(i + step, total)) for i in range(0, total, step)]

    def bands(self, x: torch.Tensor):
        """(rows, W[rows]) for consecutive bands of rows."""
        for rows in self._steps(x, self.out_features, self.in_features):
            yield rows, self.tile(x, rows, range(self.in_features))

    def slabs(self, x: torch.Tensor):
        """(cols, W[:, cols]) for consecutive slabs of columns."""
        for cols in self._steps(x, self.in_features, self.out_features):
            yield cols, self.tile(x, range(self.out_features), cols)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias, [rows of x, out]."""
        y = _empty(x, x.shape[0], self.out_features)
        if self.fields is not None and x.shape[0] <= SMALL_ROWS:
            bias_capsule = None if bias is None else capsule(bias.contiguous())
            native.small_matmul_4bit(capsule(x), self.fields, self.out_features, bias_capsule, capsule(y), threads())
            return y
        for rows, band in self.bands(x):
            _mm(x, band.T, y[:, rows.start : rows.stop], None if bias is None else bias[rows.start : rows.stop])
        return y

    def matmul_dx(self, dout: torch.Tensor) -> torch.Tensor:
        """dout W, [rows of dout, in]."""
        dx = _empty(dout, dout.shape[0], self.in_features)
        for cols, slab in self.slabs(dout):
            _mm(dout, slab, dx[:, cols.start : cols.stop])
        return dx


def _empty(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """An output; large ones on huge pages, whose first touch costs a fraction of small pages'."""
    out = x.new_empty((rows, cols))
    if out.numel() * out.element_size() >= 4 << 20:
        native.advise_huge_pages(capsule(out))
    return out


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _thin(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x a^T for a of few rows.

    With the short side as its rows torch's 16-bit GEMM is a quarter faster; its float32 one sums in longer chains
    there, at twice the rounding error.
    """
    return x @ a.T if x.dtype == torch.float32 else (a @ x.T).T.contiguous()


def _dropout(x: torch.Tensor, p: float, seed: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    native.dropout(capsule(x), capsule(out), p, int(seed), threads())
    return out


def _row_norms(x: torch.Tensor, base: Base, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """float32 [out]: ||W + s B A|| by row, without forming B A.

    ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T: W is read once, and the rest is rank-sized.
    """
    gram = (a.double() @ a.double().T) * scaling**2
    squares = torch.empty(base.out_features, dtype=torch.float32)
    update = torch.empty(base.out_features, dtype=torch.float64)
    for rows, band in base.bands(x):
        band = band if band.stride(1) == 1 else band.contiguous()
        native.row_squares(capsule(band), capsule(squares[rows.start : rows.stop]), threads())
        part = b[rows.start : rows.stop].double()
        cross = (band @ a.T).double()
        update[rows.start : rows.stop] = ((2 * scaling * cross + part @ gram) * part).sum(dim=1)
    # The rank-sized terms are summed in float64: they cancel when an adapter points against its weight.
    return (squares + update).clamp_(min=0).sqrt_().float()


def forward(x, *args):
    """Schema: see `lora_linear`. Returns y, s = dropout(x) A^T, z (what DoRA's magnitude multiplies) and the norms."""
    base = Base(x, args[:_BASE_ARGS])
    lora_a, lora_b, scaling, dropout_p, seed, magnitude, bias = args[_BASE_ARGS:]
    bias = None if bias is None else bias.to(x.dtype)
    s, z, norm = x.new_empty(0), x.new_empty(0), torch.empty(0, dtype=torch.float32)
    if lora_a is None:
        return base.matmul(x, bias), s, z, norm
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    dropped = _dropout(x, dropout_p, seed) if dropout_p else x
    s = _thin(dropped, a)
    if magnitude is None:
        y = base.matmul(x, bias)
        y.addmm_(s, b.T, alpha=scaling)
        return y, s, z, norm
    norm = _row_norms(x, base, a, b, scaling)
    factor = (magnitude.float() / norm).to(x.dtype)
    z = base.matmul(dropped)
    inner = z.clone() if dropout_p else None
    z.addmm_(s, b.T, alpha=scaling)
    y = z * factor
    if inner is not None:
        y += base.matmul(x) - inner
    if bias is not None:
        y += bias
    return y, s, z, norm


def backward(dout, x, *args):
    """Schema: see `lora_linear_bwd`."""
    base = Base(x, args[:_BASE_ARGS])
    lora_a, lora_b, scaling, dropout_p, seed, magnitude, s, z, norm, *needs = args[_BASE_ARGS:]
    need_dx, need_dweight, need_da, need_db, need_dbias, need_dmagnitude = needs
    dout = dout.contiguous()
    g = dout if magnitude is None else dout * (magnitude.float() / norm).to(dout.dtype)
    dropped = _dropout(x, dropout_p, seed) if dropout_p and (need_da or need_dweight) else x
    split = magnitude is not None and dropout_p > 0  # DoRA recomputes its base term on the dropped input
    empty = [x.new_empty(0, dtype=t.dtype) for t in (x, x, *(x if p is None else p for p in (lora_a, lora_b)), x)]
    dx, dweight, d_lora_a, d_lora_b, dbias = empty
    dmagnitude = x.new_empty(0, dtype=x.dtype if magnitude is None else magnitude.dtype)
    if lora_a is not None:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        t = _thin(g, b.T.contiguous()).mul_(scaling) if need_da or need_dx else None
        if need_da:
            d_lora_a = (t.T @ dropped).to(lora_a.dtype)
        if need_db:
            d_lora_b = _thin(g.T, s.T).mul_(scaling).to(lora_b.dtype)
    if need_dx:
        dx = base.matmul_dx(dout if split else g)
        if lora_a is not None and not dropout_p:
            dx.addmm_(t, a)
        elif lora_a is not None:
            inner = base.matmul_dx(g - dout).addmm_(t, a) if split else t @ a
            dx += _dropout(inner, dropout_p, seed, out=inner)
    if need_dweight:
        dweight = g.T @ x if not split else (dout.T @ x).addmm_((g - dout).T, dropped)
    if need_dbias:
        dbias = dout.sum(dim=0, dtype=torch.float32).to(x.dtype)
    if need_dmagnitude:
        dmagnitude = ((dout.float() * z).sum(dim=0) / norm).to(magnitude.dtype)
    return dx, dweight, d_lora_a, d_lora_b, dbias, dmagnitude

"""The CPU backend of `lora_linear` and `lora_linear_group`: torch's GEMM for the base, kernels of our own for the rank.

        W [out, in] in 4 bits                 forward: a band of rows of W at a time
        ┌────────────────────┐                y[:, band] = x @ decode(band)^T
        │ band               │
        ├────────────────────┤                backward: a slab of columns at a time, so that no sum over
        │                    │                `out` is split and rounded in between
        └────────────────────┘                dx[:, slab] = dout @ decode(slab)

A GEMM over a band runs at the full GEMM's rate, and the whole decoded weight never exists. For a few rows of x a
GEMM's packing costs more than the product; those go to a decode-and-dot kernel (csrc/cpu/lora_linear.kernel.h). The
products whose one side is the rank are in csrc/cpu/lora_thin.kernel.h, with casts, scales and dropout's mask inside.

Projections of one input share what depends on the input: one product S = x [A_q; A_k; A_v]^T, one for all dA, and one
dx that every projection adds to. `lora_linear` is a group of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops._checks import FLOATS
from pyfinetune.ops.nf4 import decode_into, packed_fields

SCRATCH_BYTES = 4 << 20  # measured: bands of 2 to 8 MiB are within 2 % of one full GEMM
SMALL_ROWS = native.small_matmul_rows
BASE_ARGS = 9  # of the schema, from `weight` to `out_features`
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

    def __init__(self, x: torch.Tensor, args: Sequence):
        weight, absmax, *_ = args
        self.out_features, self.in_features = int(args[8]), x.shape[1]
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

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        visit: Callable[[range, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """x W^T + bias, [rows of x, out]. `visit` is shown each band of W that is at hand."""
        y = _empty(x, x.shape[0], self.out_features)
        if self.fields is not None and x.shape[0] <= SMALL_ROWS:
            bias_capsule = None if bias is None else capsule(bias.contiguous())
            native.small_matmul_4bit(capsule(x), self.fields, self.out_features, bias_capsule, capsule(y), threads())
            for rows, band in self.bands(x) if visit else ():
                visit(rows, band)
            return y
        if self.weight is not None and self.out_features:
            _mm(x, self.weight.T, y, bias)
            if visit:
                visit(range(self.out_features), self.weight)
            return y
        for rows, band in self.bands(x):
            _mm(x, band.T, y[:, rows.start : rows.stop], None if bias is None else bias[rows.start : rows.stop])
            if visit:
                visit(rows, band)
        return y

    def matmul_dx(self, dout: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """dout W, [rows of dout, in]; added to `onto` where that is given."""
        dx = _empty(dout, dout.shape[0], self.in_features) if onto is None else onto
        if self.weight is not None and self.in_features:
            _mm(dout, self.weight, dx, onto)
            return dx
        for cols, slab in self.slabs(dout):
            part = dx[:, cols.start : cols.stop]
            _mm(dout, slab, part, None if onto is None else part)
        return dx


def _empty(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """An output; large ones on huge pages, whose first touch costs a fraction of small pages'."""
    out = x.new_empty((rows, cols))
    if rows * cols * x.element_size() >= 4 << 20:
        native.advise_huge_pages(capsule(out))
    return out


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, plus: torch.Tensor | None = None) -> None:
    if plus is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(plus, a, b, out=out)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows that do not overlap, which is what the kernels read; a copy only where it has others."""
    fits = x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or x.shape[0] <= 1)
    return x if fits else x.contiguous()


def _small(p: torch.Tensor) -> torch.Tensor:
    """An adapter's parameter as the kernels read it: they round it to the compute dtype themselves."""
    return (p if p.dtype in FLOATS else p.float()).contiguous()


def _down(x, a, out, scale: float, mask=None) -> None:
    """out[m, r] = scale * keep(x) a^T."""
    native.thin_down(capsule(x), capsule(a), capsule(out), scale, capsule(mask), threads())


def _up(y, s, b, scale: float, mask=None) -> None:
    """y += scale * keep(s b^T)."""
    into = capsule(y)
    native.thin_up(capsule(s), capsule(b), into, into, scale, capsule(mask), None, threads())


def _outer(t, x, scale: float, dtype: torch.dtype, mask=None, transposed: bool = False) -> torch.Tensor:
    """scale * t^T keep(x), [r, n], or [n, r] when `transposed`."""
    shape = (x.shape[1], t.shape[1]) if transposed else (t.shape[1], x.shape[1])
    out = torch.empty(shape, dtype=dtype if dtype in FLOATS else torch.float32)
    target = capsule(out.T if transposed else out)
    native.thin_outer(capsule(t), capsule(x), target, scale, capsule(mask), threads())
    return out.to(dtype)


def _mask(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """One bit for each element of x: whether dropout keeps it."""
    mask = torch.empty((x.numel() + 7) // 8 + 4, dtype=torch.uint8)
    native.dropout_mask(capsule(mask), x.numel(), p, int(seed), threads())
    return mask


def _dropout(x: torch.Tensor, p: float, seed: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    native.dropout(capsule(x), capsule(out), p, int(seed), threads())
    return out


class Projection(NamedTuple):
    """One linear layer of a group: its base, and its adapter (all None or neutral without one)."""

    base: Base
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float
    dropout_p: float
    seed: torch.Tensor | None
    magnitude: torch.Tensor | None

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    @property
    def shares_input(self) -> bool:
        """Whether its adapter reads x as it is."""
        return self.lora_a is not None and not self.dropout_p


def columns_of(adapters: Sequence[tuple[int, float]]) -> list[slice]:
    """The columns of each (rank, dropout_p) in S and T: first come those that share the input."""
    columns, start = [slice(0)] * len(adapters), 0
    for drops in (False, True):
        for i, (rank, dropout_p) in enumerate(adapters):
            if (dropout_p > 0) == drops:
                columns[i] = slice(start, start + rank)
                start += rank
    return columns


def _columns(projections: Sequence[Projection]) -> list[slice]:
    return columns_of([(p.rank, p.dropout_p) for p in projections])


def _shared(projections: Sequence[Projection], dtype: torch.dtype) -> tuple[int, torch.Tensor | None]:
    """The sum of the ranks that share the input, and their A below each other."""
    parts = [p.lora_a for p in projections if p.shares_input]
    if len(parts) < 2:
        return (parts[0].shape[0], _small(parts[0])) if parts else (0, None)
    stacked = torch.cat([part.to(dtype) for part in parts])
    return stacked.shape[0], stacked


def _norms(x: torch.Tensor, p: Projection) -> tuple[torch.Tensor, Callable[[range, torch.Tensor], None]]:
    """float32 [out] for ||W + s B A|| by row, and what fills it in, band by band of W."""
    norm = torch.empty(p.base.out_features, dtype=torch.float32)
    a, b = _small(p.lora_a.to(x.dtype)), p.lora_b.float().contiguous()
    gram = torch.empty((p.rank, p.rank), dtype=torch.float32)
    _down(a, a, gram, 1.0)

    def visit(rows: range, band: torch.Tensor) -> None:
        part = b[rows.start : rows.stop]
        into = norm[rows.start : rows.stop]
        native.dora_norms(
            capsule(_rows(band)), capsule(a), capsule(part), capsule(gram), p.scaling, capsule(into), threads()
        )

    return norm, visit


def _dora(x, p: Projection, bias, s) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, z (what the magnitude multiplies) and the norms."""
    dropped = _dropout(x, p.dropout_p, p.seed) if p.dropout_p else x
    if p.dropout_p:
        _down(dropped, _small(p.lora_a), s, 1.0)
    norm, visit = _norms(x, p)
    z = p.base.matmul(dropped, None, visit)
    factor = p.magnitude.float() / norm
    y = p.base.matmul(x) if p.dropout_p else torch.empty_like(z)
    inner = capsule(z)
    rest = (capsule(factor), capsule(y) if p.dropout_p else None, None if bias is None else capsule(bias), inner)
    native.thin_up(capsule(s), capsule(_small(p.lora_b)), inner, capsule(y), p.scaling, None, rest, threads())
    return y, z, norm


def group_forward(x, projections: Sequence[Projection], biases: Sequence[torch.Tensor | None]) -> tuple:
    """Outputs, S = [dropout(x) A^T of each], and of each projection z and the norms (empty without a magnitude)."""
    x = _rows(x)
    columns = _columns(projections)
    s = x.new_empty((x.shape[0], sum(p.rank for p in projections)))
    shared, a = _shared(projections, x.dtype)
    if a is not None:
        _down(x, a, s[:, :shared], 1.0)
    ys, zs, norms = [], [], []
    for p, bias, span in zip(projections, biases, columns, strict=True):
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        mine = s[:, span]
        z, norm = x.new_empty(0), torch.empty(0, dtype=torch.float32)
        if p.magnitude is not None:
            y, z, norm = _dora(x, p, bias, mine)
        else:
            if p.dropout_p:
                _down(x, _small(p.lora_a), mine, 1.0 / (1.0 - p.dropout_p), _mask(x, p.dropout_p, p.seed))
            y = p.base.matmul(x, bias)
            if p.lora_a is not None:
                _up(y, mine, _small(p.lora_b), p.scaling)
        ys.append(y)
        zs.append(z)
        norms.append(norm)
    return ys, s, zs, norms


class Needs(NamedTuple):
    """Which gradients of one projection are wanted."""

    weight: bool
    lora_a: bool
    lora_b: bool
    magnitude: bool
    bias: bool


class Backward:
    """The backward pass of a group. `run` gives dx, and of each projection what `Needs` lists, None for what is not."""

    def __init__(self, x, projections, s, zs, norms, need_dx: bool, needs: Sequence[Needs]):
        self.x, self.projections, self.columns = _rows(x), projections, _columns(projections)
        self.s, self.zs, self.norms = _rows(s), zs, norms
        self.need_dx, self.needs = need_dx, needs
        self.dx = None

    def run(self, douts: Sequence[torch.Tensor]) -> tuple:
        """See the class."""
        t = torch.empty_like(self.s)
        grads = [self._projection(i, _rows(dout), t) for i, dout in enumerate(douts)]
        shared, a = _shared(self.projections, self.x.dtype)
        if a is None:
            return self.dx, grads
        t = t[:, :shared]
        if self.need_dx:
            _up(self.dx, t, a.T, 1.0)
        wanted = [i for i, p in enumerate(self.projections) if p.shares_input and self.needs[i].lora_a]
        if len(wanted) == 1:
            i = wanted[0]
            grads[i][1] = _outer(t[:, self.columns[i]], self.x, 1.0, self.projections[i].lora_a.dtype)
        elif wanted:
            stacked = _outer(t, self.x, 1.0, torch.float32)
            for i in wanted:
                dtype = self.projections[i].lora_a.dtype
                grads[i][1] = stacked[self.columns[i]].to(dtype, copy=True)  # results may not share memory
        return self.dx, grads

    def _projection(self, i: int, dout: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor | None]:
        p, need = self.projections[i], self.needs[i]
        g, dmagnitude = dout, None
        if p.magnitude is not None:
            g, dmagnitude = self._through_magnitude(i, dout)
        d_lora_a = d_lora_b = mask = None
        t = t[:, self.columns[i]]
        if p.lora_a is not None:
            keep = 1.0 / (1.0 - p.dropout_p)
            if p.dropout_p and (need.lora_a or self.need_dx):
                mask = _mask(self.x, p.dropout_p, p.seed)
            b = _small(p.lora_b)
            if need.lora_a or self.need_dx:
                _down(g, b.T, t, p.scaling)
            if need.lora_a and p.dropout_p:
                d_lora_a = _outer(t, self.x, keep, p.lora_a.dtype, mask)
            if need.lora_b:
                d_lora_b = _outer(self.s[:, self.columns[i]], g, p.scaling, p.lora_b.dtype, transposed=True)
        if self.need_dx:
            self._add_dx(p, dout, g, t, mask)
        dweight = self._dweight(p, dout, g) if need.weight else None
        dbias = dout.sum(dim=0, dtype=torch.float32).to(dout.dtype) if need.bias else None
        return [dweight, d_lora_a, d_lora_b, dmagnitude, dbias]

    def _through_magnitude(self, i: int, dout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dout * factor, and the magnitude's gradient."""
        p, norm, need = self.projections[i], self.norms[i], self.needs[i]
        factor = p.magnitude.float() / norm
        g, dz = torch.empty(dout.shape, dtype=dout.dtype), torch.empty_like(norm) if need.magnitude else None
        z = capsule(self.zs[i].contiguous()) if need.magnitude else None
        native.dora_grad(capsule(dout), z, capsule(factor), capsule(g), capsule(dz), threads())
        return g, (dz / norm).to(p.magnitude.dtype) if need.magnitude else None

    def _add_dx(self, p: Projection, dout, g, t, mask) -> None:
        split = p.magnitude is not None and p.dropout_p > 0  # DoRA recomputes its base term on the dropped input
        self.dx = p.base.matmul_dx(dout if split else g, self.dx)
        if split:
            inner = p.base.matmul_dx(g - dout)
            _up(inner, t, _small(p.lora_a).T, 1.0)
            self.dx += _dropout(inner, p.dropout_p, p.seed, out=inner)
        elif p.dropout_p:
            _up(self.dx, t, _small(p.lora_a).T, 1.0 / (1.0 - p.dropout_p), mask)

    def _dweight(self, p: Projection, dout, g) -> torch.Tensor:
        if p.magnitude is None or not p.dropout_p:
            return g.T @ self.x
        return (dout.T @ self.x).addmm_((g - dout).T, _dropout(self.x, p.dropout_p, p.seed))


def forward(x, *args):
    """Schema: see `lora_linear`. Returns y, s = dropout(x) A^T, z (what DoRA's magnitude multiplies) and the norms."""
    adapter, bias = args[BASE_ARGS : BASE_ARGS + 6], args[-1]
    ys, s, zs, norms = group_forward(x, [Projection(Base(x, args), *adapter)], [bias])
    return ys[0], s if adapter[0] is not None else x.new_empty(0), zs[0], norms[0]


def backward(dout, x, *args):
    """Schema: see `lora_linear_bwd`."""
    adapter, (s, z, norm, *flags) = args[BASE_ARGS : BASE_ARGS + 6], args[BASE_ARGS + 6 :]
    need_dx, need_dweight, need_da, need_db, need_dbias, need_dmagnitude = flags
    needs = Needs(need_dweight, need_da, need_db, need_dmagnitude, need_dbias)
    s = x.new_empty((x.shape[0], 0)) if adapter[0] is None else s
    group = Backward(x, [Projection(Base(x, args), *adapter)], s, [z], [norm], need_dx, [needs])
    dx, ((dweight, d_lora_a, d_lora_b, dmagnitude, dbias),) = group.run([dout])
    lora_a, lora_b, *_, magnitude = adapter
    like = (x, x, lora_a, lora_b, x, magnitude)
    grads = (dx, dweight, d_lora_a, d_lora_b, dbias, dmagnitude)
    return tuple(
        x.new_empty(0, dtype=x.dtype if p is None else p.dtype) if grad is None else grad
        for grad, p in zip(grads, like, strict=True)
    )

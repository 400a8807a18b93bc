"""The Triton backend of `lora_linear` and `lora_linear_group`: the library's GEMM for the base, kernels for the rank.

    forward, 4-bit     [ X | S ] @ [ W | s B ]^T      S = keep(X) A^T; one GEMM, and the output is written once
    backward, 4-bit    [ dY | T ] @ [ W ; A ]         T = s dY B

The decoded weight is made with room for the adapter, and where CUDA C++ kernels are built in, one of them writes both;
X and dY are copied beside S and T by the kernel that reads them anyway. A dense weight has no such room: there, and
where dropout's mask stands between T A and dX, a kernel adds the low-rank product to the GEMM's output. Projections of
one input share its copy, the product with every A, and in the backward pass, where all are in 4 bits, one GEMM for dX.
`lora_linear` is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfinetune._native import packed_fields
from pyfinetune.ops import _nf4_cuda
from pyfinetune.ops._layout import rows_apart, unit_rows
from pyfinetune.ops._lora_linear_cpu import BASE_ARGS, Needs, Projection, columns_of
from pyfinetune.ops._nf4_triton import decode_into
from pyfinetune.ops._op import is_forced
from pyfinetune.ops._triton import configuration, kernels, on_device_of

# Bytes that dY and the decoded weights of a group may take side by side; beyond, its projections take turns.
CONCATENATED_BYTES = 512 << 20
_ALIGNED = 8  # columns of a 16-bit type in 16 bytes, which the library's fast kernels want of a row


class Base:
    """The base weight [out, in], dense or in 4 bits."""

    def __init__(self, x: torch.Tensor, args: Sequence):
        self.out_features, self.in_features, self.dtype = int(args[8]), x.shape[1], x.dtype
        self.weight = args[0] if args[1] is None else None
        self.packed = None if args[1] is None else tuple(args[:8])

    def decode(self, out: torch.Tensor) -> None:
        """The weight into [out, in] with contiguous rows."""
        decode_into(out, *self.packed, (self.out_features, self.in_features), self.dtype)

    def decode_with(self, out: torch.Tensor, adapter: torch.Tensor, first: int = 0, scaling: float = 1.0) -> None:
        """[W | scaling B] with zeros around B, which begins at column in + first; or [W ; A], by out's shape."""
        rows, cols, adapter = self.out_features, self.in_features, adapter.detach()
        adapter = adapter if adapter.dtype == out.dtype else adapter.float()
        if not is_forced() and _nf4_cuda.decode_why_not(*self.packed[:6]) is None:
            fields = packed_fields(self.packed[:6], *self.packed[6:])
            _nf4_cuda.decode_with_adapter(out, fields, rows, cols, rows_apart(adapter), first, scaling)
            return
        self.decode(out[:rows, :cols])
        room = out[:, cols:] if out.shape[0] == rows else out[rows:]
        if room.numel() > adapter.numel():
            room.zero_()
        torch.mul(adapter, scaling, out=room[:, first : first + adapter.shape[1]])

    def dense(self) -> torch.Tensor:
        """The whole weight; a new tensor where it is in 4 bits."""
        if self.weight is not None:
            return self.weight
        out = torch.empty((self.out_features, self.in_features), dtype=self.dtype, device=self.packed[0].device)
        self.decode(out)
        return out


def projections_of(x: torch.Tensor, each: Sequence[tuple]) -> list[Projection]:
    """From the schema's arguments behind x, of each projection."""
    found = []
    for args in each:
        lora_a, lora_b, scaling, dropout_p, seed, magnitude = args[BASE_ARGS : BASE_ARGS + 6]
        if seed is not None and seed.device != x.device:
            seed = seed.to(x.device, non_blocking=True)
        found.append(Projection(Base(x, args), lora_a, lora_b, scaling, dropout_p, seed, magnitude))
    return found


def _mask(p: Projection):
    return kernels("lora_linear").Dropout(p.seed, p.dropout_p) if p.dropout_p else None


def _keep_scale(p: Projection) -> float:
    return 1.0 / (1.0 - p.dropout_p)


def _stacked(projections: Sequence[Projection], dtype: torch.dtype) -> torch.Tensor | None:
    """The A of those that read x as it is, below each other."""
    parts = [p.lora_a for p in projections if p.shares_input and p.rank]
    return torch.cat([part.to(dtype) for part in parts]) if len(parts) > 1 else parts[0] if parts else None


def _room(rank: int) -> int:
    return -(-rank // _ALIGNED) * _ALIGNED


class Forward:
    """The forward pass of a group."""

    def __init__(self, x: torch.Tensor, projections: Sequence[Projection]):
        self.x, self.projections = unit_rows(x), projections
        self.columns = columns_of([(p.rank, p.dropout_p) for p in projections])
        self.rank = sum(p.rank for p in projections)
        self.s = x.new_empty((x.shape[0], self.rank))
        self.wide = None
        if any(self._is_wide(p) for p in projections):
            self.wide = x.new_empty((x.shape[0], x.shape[1] + _room(self.rank)))
            self.wide[:, x.shape[1] + self.rank :].zero_()

    @staticmethod
    def _is_wide(p: Projection) -> bool:
        return p.base.packed is not None and p.rank > 0 and p.magnitude is None

    def run(self, biases: Sequence[torch.Tensor | None]) -> tuple:
        """Outputs, S, and of each projection z and the norms (empty without a magnitude)."""
        self._products()
        ys, zs, norms = [], [], []
        for p, bias, span in zip(self.projections, biases, self.columns, strict=True):
            bias = None if bias is None else bias.to(self.x.dtype).contiguous()
            z, norm = self.x.new_empty(0), self.x.new_empty(0, dtype=torch.float32)
            if p.magnitude is not None:
                y, z, norm = self._dora(p, bias, span)
            elif self._is_wide(p):
                y = _linear(self.wide, self._widened(p, span), bias)
            else:
                y = _linear(self.x, p.base.dense(), bias)
                if p.rank:
                    kernels("lora_linear").up(y, self.s[:, span], p.lora_b, p.scaling, onto=y)
            ys.append(y)
            zs.append(z)
            norms.append(norm)
        return ys, self.s, zs, norms

    def _products(self) -> None:
        """S, and x beside it."""
        ops, width = kernels("lora_linear"), self.x.shape[1]
        jobs = []
        stacked = _stacked(self.projections, self.x.dtype)
        if stacked is not None:
            jobs.append((stacked, slice(0, stacked.shape[0]), None))
        for p, span in zip(self.projections, self.columns, strict=True):
            if p.dropout_p and p.rank and p.magnitude is None:
                jobs.append((p.lora_a, span, p))
        copy = None if self.wide is None else self.wide[:, :width]
        for a, span, p in jobs:
            second = None if self.wide is None else self.wide[:, width + span.start : width + span.stop]
            mask, scale = (None, 1.0) if p is None else (_mask(p), _keep_scale(p))
            ops.down(self.x, a, self.s[:, span], scale, mask, second, copy)
            copy = None
        for p, span in zip(self.projections, self.columns, strict=True):
            if p.dropout_p and p.magnitude is not None and self.wide is not None:
                # S of this one comes with its dropped input; no other projection's weight has anything there.
                self.wide[:, width + span.start : width + span.stop].zero_()

    def _widened(self, p: Projection, span: slice) -> torch.Tensor:
        """[W | s B], with B at the projection's own columns of S and zeros at the others'."""
        base, rank = p.base, self.wide.shape[1] - self.x.shape[1]
        weight = self.x.new_empty((base.out_features, base.in_features + rank))
        base.decode_with(weight, p.lora_b, span.start, p.scaling)
        return weight

    def _dora(self, p: Projection, bias, span: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ops, x, s = kernels("lora_linear"), self.x, self.s[:, span]
        dropped = x
        if p.dropout_p:
            dropped = _dropped(x, p) if not p.rank else torch.empty_like(x, memory_format=torch.contiguous_format)
            if p.rank:
                ops.down_dropped(x, p.lora_a, s, _mask(p), dropped)
        weight = p.base.dense()
        norm = _norms(p, weight)
        factor = p.magnitude.detach().float() / norm
        z = _linear(dropped, weight, None)
        base = _linear(x, weight, None) if p.dropout_p else None
        y = torch.empty_like(z)
        ops.dora(y, z, s, p.lora_b, p.scaling, factor, base, bias)
        return y, z, norm


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def _dropped(x: torch.Tensor, p: Projection) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels("lora_linear").up(out, None, None, _keep_scale(p), inner=x, dropout=_mask(p))
    return out


def _norms(p: Projection, weight: torch.Tensor) -> torch.Tensor:
    """float32 [out]: ||W + s B A|| by row, from ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T; B A is never made."""
    ops, weight = kernels("lora_linear"), unit_rows(weight)
    if not p.rank:
        return weight.float().norm(dim=1)
    a = unit_rows(p.lora_a.detach().to(weight.dtype))
    b = p.lora_b.detach().to(weight.dtype).float()
    cross, gram = torch.empty_like(b, memory_format=torch.contiguous_format), b.new_empty((p.rank, p.rank))
    square = ops.down(weight, a, cross, squares=True)
    ops.down(a, a, gram)
    low_rank = (b * (2.0 * p.scaling * cross + p.scaling**2 * (b @ gram))).sum(dim=1)
    return (square + low_rank).clamp_min(0.0).sqrt()


class Backward:
    """The backward pass of a group. `run` gives dx, and of each projection what `Needs` lists, None for what is not."""

    def __init__(self, x, projections, s, zs, norms, need_dx: bool, needs: Sequence[Needs]):
        self.x, self.projections, self.need_dx, self.needs = unit_rows(x), projections, need_dx, needs
        self.columns = columns_of([(p.rank, p.dropout_p) for p in projections])
        self.s, self.zs, self.norms = unit_rows(s), zs, norms
        self.rank = sum(p.rank for p in projections)
        self.t = x.new_zeros((x.shape[0], self.rank))
        self.dx = self.wide = None
        self.rows = sum(p.base.out_features for p in projections)
        if need_dx and all(p.base.packed is not None and not p.dropout_p for p in projections):
            width = self.rows + _room(self.rank)
            if len(projections) == 1 or x.element_size() * width * sum(x.shape) <= CONCATENATED_BYTES:
                self.wide = x.new_empty((x.shape[0], width))
                self.wide[:, self.rows + self.rank :].zero_()

    def run(self, douts: Sequence[torch.Tensor]) -> tuple:
        """See the class."""
        grads, start = [], 0
        for i, dout in enumerate(douts):
            grads.append(self._projection(i, unit_rows(dout), start))
            start += self.projections[i].base.out_features
        stacked = _stacked(self.projections, self.x.dtype)
        if self.wide is not None:
            self.dx = torch.mm(self.wide, self._below(stacked))
        elif self.need_dx and stacked is not None:
            shared = self.t[:, : stacked.shape[0]]
            kernels("lora_linear").up(self.dx, shared, stacked.T, 1.0, onto=self.dx)
        wanted = [i for i, p in enumerate(self.projections) if p.shares_input and p.rank and self.needs[i].lora_a]
        if len(wanted) == 1:
            (i,) = wanted
            grads[i][1] = self._outer(self.t[:, self.columns[i]], self.projections[i])
        elif wanted:
            shared = self.x.new_empty((stacked.shape[0], self.x.shape[1]), dtype=torch.float32)
            kernels("lora_linear").outer(self.t[:, : stacked.shape[0]], self.x, shared)
            for i in wanted:
                grads[i][1] = shared[self.columns[i]].to(self.projections[i].lora_a.dtype, copy=True)
        return self.dx, grads

    def _below(self, stacked: torch.Tensor | None) -> torch.Tensor:
        """[W of each; A of each; zeros]."""
        weight = self.x.new_empty((self.wide.shape[1], self.x.shape[1]))
        start, alone = 0, stacked is not None and len(self.projections) == 1
        for p in self.projections:
            end = start + p.base.out_features
            if alone:
                p.base.decode_with(weight[: end + self.rank], stacked)
            else:
                p.base.decode(weight[start:end])
            start = end
        if stacked is not None and not alone:
            weight[start : start + self.rank].copy_(stacked.detach())
        weight[start + self.rank :].zero_()
        return weight

    def _outer(self, t: torch.Tensor, p: Projection) -> torch.Tensor:
        out = torch.empty(p.lora_a.shape, dtype=p.lora_a.dtype, device=self.x.device)
        kernels("lora_linear").outer(t, self.x, out, _keep_scale(p), _mask(p))
        return out

    def _projection(self, i: int, dout: torch.Tensor, start: int) -> list[torch.Tensor | None]:
        p, need = self.projections[i], self.needs[i]
        copy = None if self.wide is None else self.wide[:, start : start + p.base.out_features]
        g, dmagnitude = dout, None
        if p.magnitude is not None:
            factor = p.magnitude.detach().float() / self.norms[i]
            g = torch.empty_like(dout, memory_format=torch.contiguous_format) if copy is None else copy
            z = unit_rows(self.zs[i]) if need.magnitude else None
            dz = kernels("lora_linear").dora_bwd(g, dout, z, factor)
            dmagnitude = None if dz is None else (dz / self.norms[i]).to(p.magnitude.dtype)
            copy = None
        d_lora_b = self._thin(i, g, copy)
        d_lora_a = None
        if need.lora_a and p.lora_a is not None and (p.dropout_p or not p.rank):
            d_lora_a = self._outer(self.t[:, self.columns[i]], p)
        if self.need_dx and self.wide is None:
            self._add_dx(p, dout, g, self.t[:, self.columns[i]])
        dweight = self._dweight(p, dout, g) if need.weight else None
        dbias = dout.sum(dim=0, dtype=torch.float32).to(dout.dtype) if need.bias else None
        return [dweight, d_lora_a, d_lora_b, dmagnitude, dbias]

    def _thin(self, i: int, g: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor | None:
        """T = s g B and d_lora_b = s g^T S, and g beside T."""
        ops, p, need, span = kernels("lora_linear"), self.projections[i], self.needs[i], self.columns[i]
        need_t = need.lora_a or self.need_dx
        d_lora_b = None
        if p.lora_b is not None and need.lora_b:
            d_lora_b = torch.empty(p.lora_b.shape, dtype=p.lora_b.dtype, device=g.device)
        second = None
        if self.wide is not None:
            second = self.wide[:, self.rows + span.start : self.rows + span.stop]
        if not p.rank or not g.numel():
            for empty in (d_lora_b, second):
                if empty is not None:
                    empty.zero_()
            if copy is not None:
                copy.copy_(g)
            return d_lora_b
        s, t = self.s[:, span], self.t[:, span]
        if need_t and d_lora_b is not None and p.rank <= ops.SHARED_PASS_RANK:
            ops.both(g, s, p.lora_b, t, d_lora_b, p.scaling, second, copy)
            return d_lora_b
        if need_t:
            ops.down(g, p.lora_b.T, t, p.scaling, None, second, copy)
        if d_lora_b is not None:
            ops.outer(s, g, d_lora_b.T, p.scaling)
        return d_lora_b

    def _add_dx(self, p: Projection, dout, g, t) -> None:
        ops, weight = kernels("lora_linear"), p.base.dense()
        split = p.magnitude is not None and p.dropout_p > 0  # DoRA recomputes its base term on the dropped input
        through = dout if split else g
        self.dx = torch.mm(through, weight) if self.dx is None else self.dx.addmm_(through, weight)
        adapter = (t, p.lora_a.T) if p.rank else (None, None)
        if split:
            inner = torch.mm(g - dout, weight)
            ops.up(self.dx, *adapter, _keep_scale(p), onto=self.dx, inner=inner, dropout=_mask(p))
        elif p.dropout_p and p.rank:
            ops.up(self.dx, *adapter, _keep_scale(p), onto=self.dx, dropout=_mask(p))

    def _dweight(self, p: Projection, dout, g) -> torch.Tensor:
        if p.magnitude is None or not p.dropout_p:
            return g.T @ self.x
        return (dout.T @ self.x).addmm_((g - dout).T, _dropped(self.x, p))


def forward(x, *args):
    """Schema: see `lora_linear`. Returns y, s = dropout(x) A^T, z (what DoRA's magnitude multiplies) and the norms."""
    with on_device_of(x):
        ys, s, zs, norms = Forward(x, projections_of(x, [args])).run([args[-1]])
    return ys[0], s if args[BASE_ARGS] is not None else x.new_empty(0), zs[0], norms[0]


def backward(dout, x, *args):
    """Schema: see `lora_linear_bwd`."""
    adapter, (s, z, norm, *flags) = args[BASE_ARGS : BASE_ARGS + 6], args[BASE_ARGS + 6 :]
    need_dx, need_dweight, need_da, need_db, need_dbias, need_dmagnitude = flags
    needs = Needs(need_dweight, need_da, need_db, need_dmagnitude, need_dbias)
    s = x.new_empty((x.shape[0], 0)) if adapter[0] is None else s
    with on_device_of(x):
        group = Backward(x, projections_of(x, [args]), s, [z], [norm], need_dx, [needs])
        dx, ((dweight, d_lora_a, d_lora_b, dmagnitude, dbias),) = group.run([dout])
    lora_a, lora_b, *_, magnitude = adapter
    grads = (dx, dweight, d_lora_a, d_lora_b, dbias, dmagnitude)
    like = (x, x, lora_a, lora_b, x, magnitude)
    return tuple(
        x.new_empty(0, dtype=x.dtype if p is None else p.dtype) if grad is None else grad
        for grad, p in zip(grads, like, strict=True)
    )


def describe(capability: int, x: torch.Tensor, projections: Sequence[Projection]) -> list[str]:
    """What a group launches beside the library's GEMM, forward and backward, a line for each class of shapes."""
    lines = []
    if not x.shape[0]:
        return lines
    shared = sum(p.rank for p in projections if p.shares_input)
    for p in projections:
        if p.base.packed is not None:
            *_nested, block_size, _nested_block_size = p.base.packed
            sizes = x.element_size(), block_size, p.base.out_features * p.base.in_features
            lines += kernels("nf4").describe_decode(capability, *sizes)
        rank = (p.rank, shared if p.shares_input else p.rank)
        kind = p.base.packed is not None, p.dropout_p > 0, p.magnitude is not None
        lines += kernels("lora_linear").describe(capability, x, rank, p.base.out_features, *kind)
    return list(dict.fromkeys(lines))


def configuration_of(capability: int | None, x: torch.Tensor, *args):
    """A `Backend.configuration` of `lora_linear`."""
    return configuration(x, capability, lambda on: describe(on, x, projections_of(x, [args])))

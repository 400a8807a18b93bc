"""The CPU backend of `linear_cross_entropy`: torch's GEMM over tiles of the vocabulary, one native pass over each tile.

        W [V, H]                  for each chunk of tokens, for each tile of W:
       ┌────────┐                 z    = h @ tile^T                 [tokens, tile]
       │  tile  │                 e    = softmax of z within the tile, in its place; peak and total of each token
       ├────────┤                 part = e @ tile                   [tokens, H], added to what earlier tiles gave with
       │        │                                                   the factors of online softmax, in float32

A tile of logits fits the last-level cache, so that it never reaches memory, and one exponential is taken of each logit.
Where the weight or the bias trains, a chunk's tiles are kept until the totals are known: e^T @ h then gives the tile's
rows of d_weight, each token weighted by the share that the tile's total has in the whole. The label's own term is added
apart, in float32; see csrc/cpu/linear_cross_entropy.kernel.h.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch

from pyfinetune._native import capsule, native, threads
from pyfinetune.ops._checks import cpu_why_not

TILE_BYTES = 4 << 20
KEPT_BYTES = 128 << 20
MAX_ROWS = 2048
MAX_COLS = 4096  # kCrossEntropyCols in csrc/cpu/dispatch.h
_MIN_COLS = 64
REUSED_BYTES = 256 << 20  # a larger scratch is not held between calls
_scratch = threading.local()


@dataclass(frozen=True)
class Plan:
    """How many tokens, and how many entries of the vocabulary, are computed at a time."""

    rows: int
    cols: int

    @staticmethod
    def of(tokens: int, vocab: int, item: int, workspace_bytes: int, keep: bool) -> Plan:
        """The largest chunk whose logits (of a tile, or with `keep` of the whole vocabulary) fit the workspace."""
        budget = workspace_bytes or (KEPT_BYTES if keep else TILE_BYTES)
        width = vocab if keep else min(vocab, _MIN_COLS)
        most = min(MAX_ROWS, max(1, budget // max(1, width * item)))
        rows = _even(tokens, most)
        cols = (min(budget, TILE_BYTES) if keep else budget) // (rows * item) // _MIN_COLS * _MIN_COLS
        return Plan(rows, min(MAX_COLS, max(_MIN_COLS, cols)))

    def chunks(self, tokens: int) -> list[range]:
        return [range(i, min(i + self.rows, tokens)) for i in range(0, tokens, self.rows)]

    def tiles(self, vocab: int) -> list[range]:
        return [range(i, min(i + self.cols, vocab)) for i in range(0, vocab, self.cols)]


def _even(total: int, most: int) -> int:
    """The size of equal pieces, none above `most`: a short last one would be multiplied at a lower rate."""
    return max(1, -(-total // max(1, -(-total // most))))


def scratch_shapes(plan: Plan, vocab: int, width: int, dtype: torch.dtype, needs: tuple) -> list[tuple]:
    """Rows, columns and dtype of the scratch matrices: logits, part, sum, gathered, weighted."""
    need_dhidden, need_dweight, need_dbias = needs
    columns = min(vocab, plan.cols)
    part_rows = max(plan.rows, columns) if need_dweight else plan.rows
    return [
        (plan.rows, vocab if need_dweight or need_dbias else columns, dtype),
        (part_rows if need_dhidden or need_dweight else 0, width, dtype),
        (plan.rows if need_dhidden else 0, width, torch.float32),
        (plan.rows, width, dtype),
        (plan.rows if need_dweight else 0, width, dtype),
    ]


def scratch_sizes(shapes: list[tuple]) -> list[int]:
    """Bytes of each matrix, with what aligns the next."""
    return [(rows * cols * dtype.itemsize + 63) // 64 * 64 for rows, cols, dtype in shapes]


def _matrices(*shapes: tuple[int, int, torch.dtype]) -> list[torch.Tensor]:
    """Scratch matrices in memory that is reused from call to call."""
    sizes = scratch_sizes(shapes)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < sum(sizes):
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        native.advise_huge_pages(capsule(buffer))
        _scratch.buffer = buffer if buffer.numel() <= REUSED_BYTES else None
    pieces = buffer[: sum(sizes)].split(sizes)
    return [
        piece[: rows * cols * dtype.itemsize].view(dtype).view(rows, cols)
        for piece, (rows, cols, dtype) in zip(pieces, shapes, strict=True)
    ]


def _large(like: torch.Tensor, shape, dtype: torch.dtype) -> torch.Tensor:
    """An output that nothing has touched, on huge pages: filling fresh small ones costs more than making its values."""
    out = like.new_empty(shape, dtype=dtype)
    native.advise_huge_pages(capsule(out))
    return out


class _Pass:
    """One walk over the tokens that count: their losses, and the gradients of the losses' sum.

    With `scale` [N], each token's share in the gradients has that factor.
    """

    def __init__(self, head: tuple, needs: tuple, scale: torch.Tensor | None):
        hidden, self.weight, labels, bias, ignore_index, self.softcap, workspace_bytes = head
        tokens, (vocab, width), dtype = labels.shape[0], self.weight.shape, hidden.dtype
        rows, targets = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens, dtype=torch.int64)
        kept = native.cross_entropy_rows(
            capsule(labels.contiguous()), ignore_index, vocab, capsule(rows), capsule(targets)
        )
        self.rows, self.targets, self.all, self.hidden = rows[:kept], targets[:kept], kept == tokens, hidden
        self.need_dhidden, self.need_dweight, self.need_dbias = needs
        self.keep = self.need_dweight or self.need_dbias
        self.bias = None if bias is None else bias.float().contiguous()
        self.scale = scale
        plan = Plan.of(kept, vocab, dtype.itemsize, workspace_bytes, self.keep)
        self.chunks, self.tiles = plan.chunks(kept), plan.tiles(vocab)
        shapes = scratch_shapes(plan, vocab, width, dtype, needs)
        self.logits, self.part, self.sum, self.gathered, self.weighted = _matrices(*shapes)
        self.losses = torch.zeros(tokens)
        make = hidden.new_empty if self.all else hidden.new_zeros
        self.d_hidden = make((tokens, width) if self.need_dhidden else (0,))
        self.d_weight = _large(hidden, (vocab, width) if self.need_dweight else (0,), torch.float32)
        self.d_bias = torch.zeros(vocab if self.need_dbias else 0)
        if not kept:
            self.d_weight.zero_()

    def run(self) -> tuple[torch.Tensor, ...]:
        for span in self.chunks:
            self._chunk(span)
        return self.losses, self.d_hidden, self.d_weight, self.d_bias

    def _hidden_rows(self, span: range, rows: torch.Tensor) -> torch.Tensor:
        h = self.hidden[span.start : span.stop]
        if self.all and (h.stride(1) == 1 and h.stride(0) >= h.shape[1]):
            return h
        return torch.index_select(self.hidden, 0, rows, out=self.gathered[: len(span)])

    def _tile(self, tokens: int, cols: range) -> torch.Tensor:
        """Where this tile's logits stand."""
        begin = tokens * cols.start if self.keep else 0
        return self.logits.view(-1)[begin : begin + tokens * len(cols)].view(tokens, len(cols))

    def _chunk(self, span: range) -> None:
        rows, targets = self.rows[span.start : span.stop], self.targets[span.start : span.stop]
        h = self._hidden_rows(span, rows)
        tokens = len(span)
        state = torch.zeros(5, tokens)  # largest logit, label's logit, label's slope, keep, add
        state[0] = -math.inf
        state[2] = 1.0
        total = torch.zeros(tokens, dtype=torch.float64)
        stats = torch.empty(len(self.tiles), 2, tokens) if self.keep else None
        self._walk(h, targets, state, total, stats)
        peak, picked, slope = state[:3].double()
        everything = total + (picked - peak).exp()
        self.losses.index_copy_(0, rows, (peak + everything.log() - picked).float())
        weight = torch.ones(1) if self.scale is None else self.scale[rows]
        share, on_label = (weight / everything).float(), (-slope * weight * total / everything).float()
        if self.need_dhidden:
            label_rows = torch.index_select(self.weight, 0, targets, out=self.part[:tokens])
            native.combine_rows(
                *(capsule(t) for t in (self.d_hidden, rows, self.sum[:tokens], share, label_rows, on_label)), threads()
            )
        if self.keep:
            # What a tile's e is multiplied with to be each token's probabilities, times its weight.
            shares = stats[:, 1] * (stats[:, 0] - state[0]).exp() * share
            self._sum_over_tokens(span, h, targets, shares, on_label)

    def _walk(self, h, targets, state, total, stats) -> None:
        """All tiles of the vocabulary for one chunk of tokens."""
        tokens, count, write = h.shape[0], threads(), self.need_dhidden or self.keep
        known = [capsule(t) for t in (state, total)]
        targets, keep, add = capsule(targets), capsule(state[3]), capsule(state[4])
        part, sums = self.part[:tokens] if self.need_dhidden else None, capsule(self.sum[:tokens])
        part_capsule = capsule(part)
        for j, cols in enumerate(self.tiles):
            tile = self.weight[cols.start : cols.stop]
            z = self._tile(tokens, cols)
            torch.mm(h, tile.T, out=z)
            bias = None if self.bias is None else capsule(self.bias[cols.start : cols.stop])
            tile_stats = None if stats is None else capsule(stats[j])
            native.cross_entropy_tile(
                capsule(z), bias, targets, cols.start, self.softcap, *known, tile_stats, write, count
            )
            if part is not None:
                torch.mm(z, tile, out=part)
                native.combine_rows(sums, None, sums, keep, part_capsule, add, count)

    def _sum_over_tokens(self, span: range, h, targets, shares, on_label) -> None:
        """d_weight and d_bias of one chunk, from the tiles that were kept."""
        tokens, count = len(span), threads()
        lift = _lift(h, self.scale) if self.need_dweight else 1.0
        lower, before = shares / lift, torch.zeros(1) if span.start == 0 else torch.ones(1)
        raised = torch.full((1,), lift)
        for j, cols in enumerate(self.tiles):
            e = self._tile(tokens, cols)
            if self.need_dweight:
                weighted, part = self.weighted[:tokens], self.part[: len(cols)]
                native.combine_rows(
                    capsule(weighted), None, capsule(h), capsule(lower[j].contiguous()), None, None, count
                )
                torch.mm(e.T, weighted, out=part)
                d_tile = capsule(self.d_weight[cols.start : cols.stop])
                native.combine_rows(d_tile, None, d_tile, capsule(before), capsule(part), capsule(raised), count)
            if self.need_dbias:
                d_tile = capsule(self.d_bias[cols.start : cols.stop])
                native.weighted_column_sums(capsule(e), capsule(shares[j].contiguous()), d_tile, count)
        if self.need_dweight:
            native.add_rows_at(*(capsule(t) for t in (self.d_weight, targets, h, on_label)), count)
        if self.need_dbias:
            self.d_bias.index_add_(0, targets, on_label)


def _lift(h: torch.Tensor, scale: torch.Tensor | None) -> float:
    """A power of two that brings sums of weighted rows of h into float16's range, from above or below; else 1."""
    if h.dtype != torch.float16:
        return 1.0
    largest = float(h.abs().amax()) * h.shape[0] if h.numel() else 0.0
    largest *= 1.0 if scale is None else float(scale.abs().amax())
    return 2.0 ** (math.frexp(largest)[1] - 15) if 0.0 < largest < math.inf else 1.0


def forward(*args):
    """Schema: see `linear_cross_entropy`."""
    head, per_token, needs = args[:7], args[7], args[8:]
    losses, *grads = _Pass(head, needs, None).run()
    return losses if per_token else losses.sum(dtype=torch.float64).float(), *grads


def backward(dout, *args):
    """Schema: see `linear_cross_entropy_bwd`."""
    hidden, weight, _labels, bias = args[:4]
    _losses, d_hidden, d_weight, d_bias = _Pass(args[:7], args[7:], dout).run()
    if d_weight.numel():
        d_weight = scale(d_weight, torch.ones(1), weight.dtype)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(hidden.dtype if bias is None else bias.dtype)


def scale(grad, factors, dtype):
    """Schema: see `linear_cross_entropy_scale`."""
    out = _large(grad, grad.shape, dtype)
    native.combine_rows(capsule(out), None, capsule(grad.contiguous()), capsule(factors), None, None, threads())
    return out


def scale_why_not(grad, factors, dtype) -> str | None:
    """Why the native kernel cannot scale this gradient, or None."""
    reason = cpu_why_not(grad, factors)
    if reason is None and dtype != grad.dtype and grad.dtype != torch.float32:
        reason = f"no kernel from {grad.dtype} to {dtype}"
    return reason

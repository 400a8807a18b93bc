"""Triton: linear cross-entropy, forward and backward.

    z = h W^T + bias, capped;   loss = log sum_v exp(z_v) - z_label;   g = (softmax(z) - onehot(label)) * slope * scale
    d_hidden = g W;   d_weight = g^T h;   d_bias = the sums of g's columns

    rows     the tokens that count moved to the front, by a running sum on the device: no count reaches the host
    chunk    of tokens, until the workspace is full:      z [chunk, vocabulary]
             h    = the next tokens, gathered           ┌──────────────────────────┐
             z    = h W^T             a product         │ ───> peak and total      │ a program takes a token's row
             z   := g, in place       one kernel        │ <─── g in place of z     │ there and back: the way back
             d_hidden[token] = g W    a product         └──────────────────────────┘ finds its first parts in cache
             d_weight += g^T h        a product, float32
             d_bias   += sums of g's columns

The products are the library's on GPUs for data centres, which no Triton kernel matches there; those run over ignored
tokens too. On all other GPUs, where `mma.sync` is what the library has as well, they are Triton's, which stop at the
number of tokens that count: see `own_products`.

Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867;
pyfinetune/ops/linear_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pyfinetune.kernels._linear_cross_entropy_tiles import BIAS, FWD, MOVE, ROWS, SCALE
from pyfinetune.kernels.config import Compilation, Config, Family, capability_of
from pyfinetune.kernels.linear_cross_entropy_products import Chunk, own_products, products_for
from pyfinetune.kernels.linear_cross_entropy_products import compilations as product_compilations
from pyfinetune.kernels.linear_cross_entropy_products import describe as describe_products

_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Elements that a row of logits is padded to: 128 bytes of a 16-bit type, so that every row is read in whole vectors
# (a vocabulary of 50257 would leave all but one row misaligned).
_PADDING = 64
_MAX_STRIDE = 1 << 22  # of a weight's rows: within a tile of a product places are counted in int32


@triton.jit(do_not_specialize=["num_tokens", "ignore_index"])
def _linear_cross_entropy_rows_kernel(
    labels_ptr, rows_ptr, targets_ptr, count_ptr, labels_stride, num_tokens, ignore_index, BLOCK: tl.constexpr
):
    """Indices and labels of the tokens that count, in order, then those of the others; and how many count."""
    kept = tl.full((), 0, tl.int64)
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        inside = token < num_tokens
        label = tl.load(labels_ptr + token * labels_stride, mask=inside, other=0)
        keep = inside & (label != ignore_index)
        upto = kept + tl.cumsum(keep.to(tl.int32), 0)  # how many count up to this one, itself included
        place = tl.where(keep, upto - 1, num_tokens - 1 - token + upto)  # the others fill the end, from behind
        tl.store(rows_ptr + place, token, mask=inside)
        tl.store(targets_ptr + place, label, mask=inside)
        kept += tl.sum(keep.to(tl.int32), 0)
    tl.store(count_ptr, kept)


@triton.jit(do_not_specialize=["start", "num_rows"])
def _linear_cross_entropy_move_kernel(
    out_ptr,
    in_ptr,
    rows_ptr,
    count_ptr,
    factor_ptr,
    out_row_stride,
    in_row_stride,
    start,
    num_rows,
    width,
    SCATTER: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the hidden states of a chunk's tokens, zero past those that count; or scatter their gradients."""
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = local < num_rows
    keep = inside & (start + local < tl.load(count_ptr))
    row = tl.load(rows_ptr + start + local, mask=inside, other=0)
    taken = keep[:, None] & (cols < width)[None, :]
    if SCATTER:
        value = tl.load(in_ptr + local[:, None] * in_row_stride + cols[None, :], mask=taken, other=0.0)
        if FACTOR:
            value = (value.to(tl.float32) * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * out_row_stride + cols[None, :], value, mask=taken)
    else:
        value = tl.load(in_ptr + row[:, None] * in_row_stride + cols[None, :], mask=taken, other=0.0)
        given = inside[:, None] & (cols < width)[None, :]
        tl.store(out_ptr + local[:, None] * out_row_stride + cols[None, :], value, mask=given)


@triton.jit
def _bounded(z, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap), and its slope; with no cap z itself."""
    if SOFTCAP:
        x = z / softcap
        size = tl.abs(x)
        e = tl.exp(-2.0 * size)
        # Near 0 the quotient would lose x in its 1 - e; far from it, 1 - tanh^2 would lose the slope in its 1.
        square = tl.minimum(size * size, 1.0)
        series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
        small = size < 0.25
        t = tl.where(small, size * series, (1.0 - e) / (1.0 + e))
        slope = tl.where(small, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))
        return softcap * tl.where(x < 0.0, -t, t), slope
    else:
        return z, 1.0


@triton.jit
def _load_logits(
    rows, bias_ptr, cols, keep, width, vocab, bias_stride, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):
    """[ROWS, BLOCK] capped logits in float32, and their slopes; anything past the vocabulary."""
    # Whole vectors: up to the padded width.
    z = tl.load(rows + cols[None, :], mask=keep[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + cols.to(tl.int64) * bias_stride, mask=cols < vocab, other=0.0).to(tl.float32)[None, :]
    return _bounded(z, softcap, SOFTCAP)


@triton.jit(do_not_specialize=["start", "num_rows"])
def _linear_cross_entropy_fwd_kernel(
    logits_ptr,
    bias_ptr,
    rows_ptr,
    targets_ptr,
    count_ptr,
    scale_ptr,
    losses_ptr,
    logits_row_stride,
    bias_stride,
    start,
    num_rows,
    vocab,
    width,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
    GRAD: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk's losses; with GRAD their gradients in place of the logits, with ZEROS also where no token counts."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    kept = tl.minimum(tl.load(count_ptr) - start, num_rows)
    local = first + tl.arange(0, ROWS)
    inside, keep = local < num_rows, local < kept
    rows = logits_ptr + local[:, None] * logits_row_stride
    if first >= kept:
        if ZEROS:
            nothing = tl.zeros([ROWS, BLOCK], logits_ptr.dtype.element_ty)
            for begin in range(0, width, BLOCK):
                cols = begin + tl.arange(0, BLOCK)
                tl.store(rows + cols[None, :], nothing, mask=inside[:, None] & (cols < width)[None, :])
        return
    # The label's logit is read before any is overwritten; what is no entry of the vocabulary is never read, and NaN.
    target = tl.load(targets_ptr + start + local, mask=keep, other=0)
    known = keep & (target >= 0) & (target < vocab)
    picked = tl.load(logits_ptr + local * logits_row_stride + target, mask=known, other=0.0).to(tl.float32)
    if BIAS:
        picked += tl.load(bias_ptr + target * bias_stride, mask=known, other=0.0).to(tl.float32)
    picked, _slope = _bounded(picked, softcap, SOFTCAP)
    picked = tl.where(keep & ~known, float("nan"), picked)

    # Each lane keeps its own peak, so that a walk takes one exponential an element and no exchange between lanes. The
    # label stands apart: its gradient is minus the sum of the others, exact where the token is certain of its label.
    peak = tl.full([ROWS, BLOCK], _LOWEST, tl.float32)
    others = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        z, _slopes = _load_logits(rows, bias_ptr, cols, keep, width, vocab, bias_stride, softcap, BIAS, SOFTCAP)
        z = tl.where((cols < vocab)[None, :] & (cols[None, :] != target[:, None]), z, float("-inf"))
        rise = z - peak
        shrunk = tl.exp(-tl.abs(rise))
        others = tl.where(rise > 0.0, others * shrunk + 1.0, others + shrunk)
        peak = tl.where(rise > 0.0, z, peak)
    top = tl.maximum(tl.max(peak, 1), picked)
    other = tl.sum(others * tl.exp(peak - top[:, None]), 1)
    total = other + tl.exp(picked - top)
    row = tl.load(rows_ptr + start + local, mask=keep, other=0)
    tl.store(losses_ptr + row, tl.log(total) + (top - picked), mask=keep)
    if GRAD:
        share = 1.0 / total
        if SCALE:
            share *= tl.load(scale_ptr + row, mask=keep, other=0.0)
        last = (width - 1) // BLOCK * BLOCK
        for back in range(0, width, BLOCK):
            cols = last - back + tl.arange(0, BLOCK)
            z, slope = _load_logits(rows, bias_ptr, cols, keep, width, vocab, bias_stride, softcap, BIAS, SOFTCAP)
            e = tl.where(cols[None, :] == target[:, None], -other[:, None], tl.exp(z - top[:, None]))
            g = tl.where(keep[:, None] & (cols < vocab)[None, :], e * slope * share[:, None], 0.0)
            given = inside[:, None] & (cols < width)[None, :]
            tl.store(rows + cols[None, :], g.to(logits_ptr.dtype.element_ty), mask=given)


@triton.jit(do_not_specialize=["start", "num_rows"])
def _linear_cross_entropy_bwd_bias_kernel(
    out_ptr,
    g_ptr,
    count_ptr,
    g_row_stride,
    start,
    num_rows,
    vocab,
    width,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of BLOCK columns of g, over the rows in order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.minimum(tl.load(count_ptr) - start, num_rows)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, kept, ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < kept)[:, None] & (cols < width)[None, :]
        sums += tl.load(g_ptr + row[:, None] * g_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(sums, 0)
    if ACCUMULATE:
        total += tl.load(out_ptr + cols, mask=cols < vocab, other=0.0)
    tl.store(out_ptr + cols, total, mask=cols < vocab)


@triton.jit
def _linear_cross_entropy_scale_kernel(
    out_ptr, in_ptr, scale_ptr, in_row_stride, scale_stride, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + row * scale_stride, mask=row < num_rows, other=0.0)[:, None]
    mask = (row < num_rows)[:, None] & (cols < width)[None, :]
    # A row of scale 0 is an ignored one: zero, whatever stands there, which is not even read.
    value = tl.load(in_ptr + row[:, None] * in_row_stride + cols[None, :], mask=mask & (scale != 0.0), other=0.0)
    value = value.to(tl.float32) * scale
    tl.store(out_ptr + row[:, None] * width + cols[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


def padded_vocabulary(vocab: int) -> int:
    """Elements from one row of logits to the next."""
    return triton.cdiv(vocab, _PADDING) * _PADDING


def _tokens_first(labels: torch.Tensor, ignore_index: int, capability: int) -> Chunk:
    """All tokens as one chunk, those that count first."""
    tokens = labels.shape[0]
    rows, targets, count = labels.new_empty(tokens), labels.new_empty(tokens), labels.new_empty(1)
    options = ROWS.choose(capability).options()
    _linear_cross_entropy_rows_kernel[(1,)](
        labels, rows, targets, count, labels.stride(0), tokens, ignore_index, **options
    )
    return Chunk(rows, targets, count, 0, tokens, capability)


def _move(chunk: Chunk, out, source, factor=None, scatter=False) -> None:
    """Gather the chunk's rows of `source` into `out`, or scatter `source`, times a factor, to those rows of `out`."""
    width = out.shape[1]
    config = MOVE.choose(chunk.capability, width)
    grid = (triton.cdiv(chunk.size, config.blocks["ROWS"]), triton.cdiv(width, config.blocks["BLOCK"]))
    if not width:
        return
    _linear_cross_entropy_move_kernel[grid](
        out,
        source,
        chunk.rows,
        chunk.count,
        chunk.count if factor is None else factor,
        out.stride(0),
        source.stride(0),
        chunk.start,
        chunk.size,
        width,
        SCATTER=scatter,
        FACTOR=factor is not None,
        **config.options(),
    )


def _losses(chunk: Chunk, z, vocab: int, losses, bias, softcap: float, scale, grad: bool, zeros: bool) -> None:
    """The losses of the chunk's tokens, and with `grad` the gradient in place of the logits z."""

    def launch(config: Config, z=z) -> None:
        _linear_cross_entropy_fwd_kernel[(triton.cdiv(chunk.size, config.blocks["ROWS"]),)](
            z,
            chunk.count if bias is None else bias,
            chunk.rows,
            chunk.targets,
            chunk.count,
            chunk.count if scale is None else scale,
            losses,
            z.stride(0),
            0 if bias is None else bias.stride(0),
            chunk.start,
            chunk.size,
            vocab,
            z.shape[1],
            softcap,
            BIAS=bias is not None,
            SOFTCAP=softcap != 0.0,
            SCALE=scale is not None,
            GRAD=grad,
            ZEROS=grad and zeros,
            **config.options(),
        )

    # A measurement must not overwrite the logits.
    of_class = z.element_size(), z.shape[1], int(grad)
    launch(FWD.choose(chunk.capability, *of_class, launch=launch, aside=z.clone))


def _column_sums(chunk: Chunk, out, g) -> None:
    """Add the sums of g's columns; the first chunk writes them."""
    config, vocab = BIAS.choose(chunk.capability), out.shape[0]
    if not vocab:
        return
    _linear_cross_entropy_bwd_bias_kernel[(triton.cdiv(vocab, config.blocks["BLOCK"]),)](
        out,
        g,
        chunk.count,
        g.stride(0),
        chunk.start,
        chunk.size,
        vocab,
        g.shape[1],
        ACCUMULATE=chunk.start > 0,
        **config.options(),
    )


def linear_cross_entropy(
    hidden, weight, labels, bias, ignore_index: int, softcap: float, chunk_rows: int, needs, scale=None, factor=None
) -> tuple[torch.Tensor, ...]:
    """Losses of the tokens, and the gradients of their sum, each token's share times its `scale`.

    A label outside the vocabulary gives a loss and gradients of NaN: a kernel cannot raise, and must not hide it.

    Args:
        hidden: [N, H], weight: [V, H], float32, float16 or bfloat16.
        labels: int64 [N].
        bias: [V], or None.
        ignore_index, softcap: see the op.
        chunk_rows: tokens whose logits are held at a time.
        needs: whether d_hidden, d_weight, d_bias are wanted.
        scale: float32 [N], contiguous, or None.
        factor: float32 [1] that d_hidden is multiplied by, or None.

    Returns:
        float32 [N] losses, zero where ignored; d_hidden in hidden's dtype, d_weight and d_bias in float32, each [0]
        where it is not wanted.
    """
    (tokens, width), vocab, capability = hidden.shape, weight.shape[0], capability_of(hidden)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    if weight.stride(1) != 1 or weight.stride(0) > _MAX_STRIDE:
        weight = weight.contiguous()
    losses = hidden.new_zeros(tokens, dtype=torch.float32)
    d_hidden = hidden.new_zeros((tokens, width) if needs[0] else (0,))
    make = hidden.new_empty if tokens else hidden.new_zeros  # the first chunk writes them
    d_weight = make((vocab, width) if needs[1] else (0,), dtype=torch.float32)
    d_bias = make((vocab,) if needs[2] else (0,), dtype=torch.float32)
    if not tokens:
        return losses, d_hidden, d_weight, d_bias

    whole = _tokens_first(labels, ignore_index, capability)
    products = products_for(weight, capability)
    most = min(chunk_rows, tokens)
    logits, gathered = hidden.new_empty((most, padded_vocabulary(vocab))), hidden.new_empty((most, width))
    part = hidden.new_empty((most, width) if needs[0] else (0,))
    for start in range(0, tokens, most):
        chunk = whole.piece(start, min(most, tokens - start))
        z, h = logits[: chunk.size], gathered[: chunk.size]
        _move(chunk, h, hidden)
        products.logits(chunk, h, z)
        _losses(chunk, z, vocab, losses, bias, softcap, scale, any(needs), products.zeros)
        if needs[0]:
            products.d_hidden(chunk, z, part[: chunk.size])
            _move(chunk, d_hidden, part[: chunk.size], factor, scatter=True)
        if needs[1]:
            products.d_weight(chunk, z, h, d_weight)
        if needs[2]:
            _column_sums(chunk, d_bias, z)
    return losses, d_hidden, d_weight, d_bias


def linear_cross_entropy_bwd(dout, hidden, weight, *head) -> tuple[torch.Tensor, ...]:
    """The gradients for one of each token: d_hidden and d_weight in the dtype of their tensor, d_bias in float32.

    Args:
        dout: float32 [N].
        hidden, weight, head: as `linear_cross_entropy`'s, up to `needs`.
    """
    # A power of two near the largest factor stays out of the 16-bit gradient over the logits: a loss scaler's 65536
    # would overflow float16 there, and a mean over many tokens vanish.
    largest = dout.abs().amax(dim=0, keepdim=True) if dout.shape[0] else dout.new_zeros(1)
    _mantissa, exponent = torch.frexp(largest)
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1)
    _losses, d_hidden, d_weight, d_bias = linear_cross_entropy(hidden, weight, *head, dout / factor, factor)
    if head[-1][1]:
        d_weight = linear_cross_entropy_scale(d_weight, factor, weight.dtype)
    return d_hidden, d_weight.to(weight.dtype), d_bias * factor


def linear_cross_entropy_scale(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad [M, N] times scale [M] or [1], zero where that is, in another dtype."""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    (rows, width), out = grad.shape, grad.new_empty(grad.shape, dtype=dtype)
    config = SCALE.choose(capability_of(grad), width)
    grid = (triton.cdiv(rows, config.blocks["ROWS"]), triton.cdiv(width, config.blocks["BLOCK"]))
    if out.numel():
        stride = scale.stride(0) if scale.shape[0] == rows else 0
        _linear_cross_entropy_scale_kernel[grid](
            out, grad, scale, grad.stride(0), stride, rows, width, **config.options()
        )
    return out


def describe(capability: int, hidden: torch.Tensor, weight: torch.Tensor, tokens: int, grad: bool) -> list[str]:
    """How a chunk of so many tokens would be launched, for `pf.explain`."""
    vocab, width = weight.shape
    if not tokens or not vocab:
        return []
    lines = [FWD.describe(capability, hidden.element_size(), padded_vocabulary(vocab), int(grad))]
    if own_products(capability, hidden.dtype):
        return lines + describe_products(capability, tokens, vocab, width, grad)
    return [*lines, "linear_cross_entropy products: the library's"]


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel for a head of 128256 x 4096 in bfloat16, and the walk over the logits in float32 too."""
    vocab, width = 128256, 4096
    for dtype, itemsize in (("*bf16", 2), ("*fp32", 4)):
        for options in ({}, {"GRAD": True}, {"GRAD": True, "BIAS": True, "SOFTCAP": True, "SCALE": True}):
            flags = {"BIAS": False, "SOFTCAP": False, "SCALE": False, "GRAD": False, **options}
            flags["ZEROS"] = flags["GRAD"] and not own_products(capability, torch.bfloat16)
            types = {"logits_ptr": dtype, "bias_ptr": dtype, "losses_ptr": "*fp32", "scale_ptr": "*fp32"}
            name, of_class = f"fwd {dtype} " + " ".join(options), (itemsize, vocab, int(flags["GRAD"]))
            yield from _instances(name, _linear_cross_entropy_fwd_kernel, capability, types, flags, FWD, *of_class)
    yield from _instances("rows", _linear_cross_entropy_rows_kernel, capability, {}, {}, ROWS)
    kernel, types = _linear_cross_entropy_move_kernel, {"out_ptr": "*bf16", "in_ptr": "*bf16", "factor_ptr": "*fp32"}
    for flags in ({"SCATTER": False, "FACTOR": False}, {"SCATTER": True, "FACTOR": False}):
        yield from _instances(f"move {flags}", kernel, capability, types, flags, MOVE, width)
    types, flags = {"out_ptr": "*fp32", "g_ptr": "*bf16"}, {"ACCUMULATE": True}
    yield from _instances("bias", _linear_cross_entropy_bwd_bias_kernel, capability, types, flags, BIAS)
    types = {"out_ptr": "*bf16", "in_ptr": "*fp32", "scale_ptr": "*fp32"}
    yield from _instances("scale", _linear_cross_entropy_scale_kernel, capability, types, {}, SCALE, width)
    yield from product_compilations(capability)


def _instances(name, kernel, capability: int, types: dict, flags: dict, family: Family, *of_class: int):
    known = dict.fromkeys(("labels_ptr", "rows_ptr", "targets_ptr", "count_ptr"), "*i64") | {"softcap": "fp32"} | types
    for config, label, alternative in family.instances(capability, *of_class):
        fixed = {*flags, *config.blocks}
        signature = {arg: "constexpr" if arg in fixed else known.get(arg, "i32") for arg in kernel.arg_names}
        yield Compilation(name + label, kernel, signature, flags, config, alternative=alternative)

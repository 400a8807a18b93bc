"""Triton: rotary position embedding of all heads of q and k in one launch.

    forward    y1 = x1 c1 - x2 s1,   y2 = x2 c2 + x1 s2       c1, c2 (s1, s2) the halves of the token's cos (sin)
    backward   dx1 = dy1 c1 + dy2 s2,  dx2 = dy2 c2 - dy1 s1  the transpose

    program: BLOCK_T tokens of one batch entry x some heads of q or of k
        tables [1, BLOCK_T, BLOCK_R] of each of c1, c2, s1, s2, read once
        tiles  [BLOCK_H, BLOCK_T, BLOCK_R] of each half, head after head; then the features that pass through

Products are float32, rounded once. Reference: pyfinetune/ops/rope.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pyfinetune.kernels.config import Compilation, Config, Family, Work, capability_of
from pyfinetune.kernels.rows import signature

_HEADS = 8  # of a program: the tables are read again for as many heads
_ENOUGH = 1024  # programs, below which each takes fewer heads
_PAIRS = ((1024, 4), (512, 4), (2048, 8))  # pairs of a tile of one head, and warps
_TYPICAL = (8192, 40)  # tokens and heads of q and k together that a choice is made for


@triton.jit
def _load_table(row, pair, mask):
    """A part of cos or sin in float32: [1, BLOCK_T, BLOCK_R]."""
    return tl.load(row[None, :, None] + pair[None, None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rotate(
    y_ptr,
    x_ptr,
    cos_row,
    sin_row,
    y_stride_head,
    y_stride_token,
    x_stride_head,
    x_stride_token,
    first_head,
    last_head,
    token,
    tokens,
    HALF: tl.constexpr,
    PASSED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Heads [first_head, last_head) of one tensor; the pointers are to a batch entry, `token` is int64 [BLOCK_T]."""
    live = (token < tokens)[None, :, None]
    x_token = x_ptr + token[None, :, None] * x_stride_token  # [1, BLOCK_T, 1]
    y_token = y_ptr + token[None, :, None] * y_stride_token
    for start in tl.static_range(0, HALF, BLOCK_R):
        pair = start + tl.arange(0, BLOCK_R)
        inside = live & (pair < HALF)[None, None, :]
        c1, c2 = _load_table(cos_row, pair, inside), _load_table(cos_row, pair + HALF, inside)
        s1, s2 = _load_table(sin_row, pair, inside), _load_table(sin_row, pair + HALF, inside)
        for block in range(first_head, last_head, BLOCK_H):
            head = (block + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None, None]
            mask = inside & (head < last_head)
            x = x_token + head * x_stride_head + pair[None, None, :]  # [BLOCK_H, BLOCK_T, BLOCK_R]
            y = y_token + head * y_stride_head + pair[None, None, :]
            x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
            if BACKWARD:
                y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
            else:
                y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
            tl.store(y, y1.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(y + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)
    for start in tl.static_range(0, PASSED, BLOCK_P):
        feature = start + tl.arange(0, BLOCK_P)
        inside = live & (feature < PASSED)[None, None, :]
        for block in range(first_head, last_head, BLOCK_H):
            head = (block + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None, None]
            mask = inside & (head < last_head)
            column = 2 * HALF + feature[None, None, :]
            x = tl.load(x_token + head * x_stride_head + column, mask=mask, other=0.0)
            tl.store(y_token + head * y_stride_head + column, x, mask=mask)


@triton.jit(do_not_specialize=["tokens", "q_heads", "k_heads", "heads_each"])
def _rope_kernel(
    q_out_ptr,
    k_out_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    q_heads,
    k_heads,
    heads_each,
    q_out_stride_batch,
    q_out_stride_head,
    q_out_stride_token,
    k_out_stride_batch,
    k_out_stride_head,
    k_out_stride_token,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    k_stride_batch,
    k_stride_head,
    k_stride_token,
    cos_stride_batch,
    cos_stride_token,
    sin_stride_batch,
    sin_stride_token,
    HALF: tl.constexpr,
    PASSED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    q_parts = tl.cdiv(q_heads, heads_each)
    parts = q_parts + tl.cdiv(k_heads, heads_each)
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    # Neighbouring programs share their tokens: the tables stay in cache.
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    batch = (tile // token_tiles).to(tl.int64)
    token = (tile % token_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    cos_row = cos_ptr + batch * cos_stride_batch + token * cos_stride_token
    sin_row = sin_ptr + batch * sin_stride_batch + token * sin_stride_token
    if part < q_parts:
        first = part * heads_each
        _rotate(
            q_out_ptr + batch * q_out_stride_batch,
            q_ptr + batch * q_stride_batch,
            cos_row,
            sin_row,
            q_out_stride_head,
            q_out_stride_token,
            q_stride_head,
            q_stride_token,
            first,
            tl.minimum(first + heads_each, q_heads),
            token,
            tokens,
            HALF,
            PASSED,
            BACKWARD,
            BLOCK_H,
            BLOCK_T,
            BLOCK_R,
            BLOCK_P,
        )
    else:
        first = (part - q_parts) * heads_each
        _rotate(
            k_out_ptr + batch * k_out_stride_batch,
            k_ptr + batch * k_stride_batch,
            cos_row,
            sin_row,
            k_out_stride_head,
            k_out_stride_token,
            k_stride_head,
            k_stride_token,
            first,
            tl.minimum(first + heads_each, k_heads),
            token,
            tokens,
            HALF,
            PASSED,
            BACKWARD,
            BLOCK_H,
            BLOCK_T,
            BLOCK_R,
            BLOCK_P,
        )


def _candidates(capability: int, itemsize: int, table_itemsize: int, half: int) -> list[Config]:
    """Tiles, best first: of two heads and so many pairs that a thread has 8 of each (loads of 16 bytes in 16-bit
    dtypes), whose tables fill 32 registers. Where tables are wider than x their threads have other pairs: they pass
    through shared memory, four at the most."""
    tokens, heads = _TYPICAL
    block_r = min(triton.next_power_of_2(half), 128)
    found = []
    for pairs, warps in _PAIRS:
        block_t = min(max(pairs // block_r, 1), 64)
        each = block_t * block_r
        programs = triton.cdiv(tokens, block_t) * triton.cdiv(heads, _HEADS)
        moved = 2 * half * tokens * (2 * heads * itemsize + 2 * table_itemsize)
        asked = moved + 2 * half * tokens * 2 * table_itemsize * (triton.cdiv(heads, _HEADS) - 1)
        work = Work(programs, moved, 2 * 2 * each * itemsize, asked, steps=_HEADS // 2)
        blocks = {"BLOCK_H": 2, "BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_P": 64}
        registers = 7 * each // (32 * warps) + 32
        found.append(Config(blocks, warps, 1, 4 * 4 * each, registers, work))
    return found


FAMILY = Family("rope", ("itemsize", "table_itemsize", "half"), _candidates)


def describe(capability: int, q: torch.Tensor, cos: torch.Tensor) -> list[str]:
    """How it would be launched, for `pf.explain`."""
    return [FAMILY.describe(capability, q.element_size(), cos.element_size(), cos.shape[-1] // 2)]


def rope(
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    backward: bool = False,
) -> None:
    """Rotate q and k into q_out and k_out, or (backward) gradients back.

    Args:
        q_out, k_out: of q's and k's shapes and dtype; any strides, as of all the others, but that of the last
            dimension, which is 1.
        q: [batch, heads, tokens, head_dim] or [tokens, heads, head_dim].
        k: the same, of q's dtype, with heads of its own number.
        cos, sin: [batch or 1, tokens, rotary_dim] or [tokens, rotary_dim], of any float dtype.
        backward: the transposed rotation.
    """
    if q.dim() == 3:  # packed: one batch entry, its tokens first
        q_out, k_out, q, k = (x.transpose(0, 1)[None] for x in (q_out, k_out, q, k))
        cos, sin = cos[None], sin[None]
    batch, q_heads, tokens, head_dim = q.shape
    k_heads, half = k.shape[1], cos.shape[-1] // 2

    def launch(config: Config) -> None:
        tiles = batch * triton.cdiv(tokens, config.blocks["BLOCK_T"])
        heads_each = _HEADS
        while heads_each > config.blocks["BLOCK_H"] and tiles * triton.cdiv(q_heads + k_heads, heads_each) < _ENOUGH:
            heads_each //= 2
        programs = tiles * (triton.cdiv(q_heads, heads_each) + triton.cdiv(k_heads, heads_each))
        _rope_kernel[(programs,)](
            q_out,
            k_out,
            q,
            k,
            cos,
            sin,
            tokens,
            q_heads,
            k_heads,
            heads_each,
            *(stride for x in (q_out, k_out, q, k) for stride in x.stride()[:3]),
            *(stride for x in (cos, sin) for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))),
            HALF=half,
            PASSED=head_dim - 2 * half,
            BACKWARD=backward,
            **config.options(),
        )

    if batch * tokens * (q_heads + k_heads):
        launch(FAMILY.choose(capability_of(q), q.element_size(), cos.element_size(), half, launch=launch))


def compilations(capability: int) -> Iterator[Compilation]:
    """Heads of 64 to 256 features, all or a quarter of them rotated, both directions."""
    cases = [(128, 128, "bf16", "bf16"), (64, 64, "bf16", "bf16"), (256, 64, "bf16", "fp32")]
    for head_dim, rotary_dim, dtype, table in [*cases, (256, 256, "bf16", "fp32"), (128, 128, "fp32", "fp32")]:
        half, tables = rotary_dim // 2, dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{table}")
        sizes = (4 if dtype == "fp32" else 2), (4 if table == "fp32" else 2)
        for backward in (False, True):
            for config, label, alternative in FAMILY.instances(capability, *sizes, half):
                constants = {"HALF": half, "PASSED": head_dim - rotary_dim, "BACKWARD": backward}
                fields = signature(_rope_kernel, {**constants, **config.blocks}, tables, f"*{dtype}")
                name = f"{'backward' if backward else 'forward'} {head_dim}/{rotary_dim} {dtype} {table}{label}"
                yield Compilation(name, _rope_kernel, fields, constants, config, alternative=alternative)

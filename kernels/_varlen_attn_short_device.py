"""Triton: attention in tiles that several short documents share, the same maths as kernels/_varlen_attn_device.py.

             places of the tile as keys
           +------+------+----+--+--+     Queries and keys of a document have the same places in the tile, and with the
           |  a   |      |    |  |  |     tile comes, for each query, the first and the last place that it sees: one
           +------+------+----+--+--+     interval says which document, how long, the causal limit and the window.
    places |      |  b   |    |  |  |
    as     +------+------+----+--+--+     What is outside of it counts as 0 times a row of another document, and 0 times
    queries|      |      | c  |  |  |     NaN is NaN. So probabilities and their gradients are taken as 0 there, not
           +------+------+----+--+--+     multiplied by it, and a row enters a product without its infinities and NaNs;
           |      |      |    |d |  |     those are added afterwards, row by row, to the sums that they belong to. A
           +------+------+----+--+--+     program that meets none pays one comparison of each element for it.

Adding 0 changes no bit, and a document's places begin at a multiple of their power of two: what the tile holds besides
and where in it the document lies leave its bits alone.
"""

import triton
import triton.language as tl

from pyfinetune.kernels._varlen_attn_parts import LN2, LOG2E, _exp, _load_rows, _row_products, _store_rows, _tanh
from pyfinetune.kernels._varlen_attn_tiles import _members, _other_rows, _own_rows, _places_seen


@triton.jit
def _product_apart(p, x, acc, seen, x_ptr, rows, row_stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """acc + p x, p being 0 where not seen, and x another document's: what is not finite reaches only who sees it.

    x is what `_load_rows` has loaded from these rows.
    """
    finite = tl.abs(x) < float("inf")
    acc = tl.dot(p, tl.where(finite, x, 0.0), acc, input_precision="ieee")
    places, columns = tl.arange(0, x.shape[0]), tl.arange(0, PADDED)
    spoilt = tl.max(tl.where(finite, 0, 1), 1) > 0
    place = tl.max(tl.where(spoilt, places, -1), 0)
    while place >= 0:
        here = places == place
        row = tl.max(tl.where(here, rows, 0), 0).to(tl.int64)
        values = tl.load(x_ptr + row * row_stride + columns, mask=columns < DIM, other=0.0)  # again: x has no registers
        left_out = ~(tl.abs(values) < float("inf"))
        weight = tl.sum(tl.where(here[None, :], p.to(tl.float32), 0.0), 1)
        sees = tl.max(tl.where(here[None, :] & seen, 1, 0), 1) > 0
        added = weight[:, None] * values.to(tl.float32)[None, :]
        acc += tl.where(sees[:, None] & left_out[None, :], added, 0.0)
        place = tl.max(tl.where(spoilt & (places < place), places, -1), 0)
    return acc


@triton.jit
def _weights(s, lse, seen, ACCURATE: tl.constexpr):
    """exp(s - lse) where seen and 0 elsewhere, also where lse is NaN."""
    return tl.where(seen, _exp(tl.where(seen, s, float("-inf")) - lse, ACCURATE), 0.0)


@triton.jit(do_not_specialize=["total_q"])
def _varlen_attn_fwd_shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    members_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    total_q,
    score_scale,
    cap,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    members_ptr = _members(members_ptr, tl.program_id(0), TILE)
    if tl.load(members_ptr) < 0:
        return
    q_ptr += head * q_head_stride
    k_ptr += (head // GROUP) * k_head_stride
    v_ptr += (head // GROUP) * v_head_stride
    out_ptr += head * DIM_V
    lse_ptr += head * total_q
    ACCURATE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    places = tl.arange(0, TILE)
    rows = _own_rows(members_ptr, places, TILE)
    first, last = _places_seen(members_ptr, places, TILE)
    q = _load_rows(q_ptr, rows, q_row_stride, rows >= 0, DIM, PADDED)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    acc = tl.zeros([TILE, PADDED_V], dtype=tl.float32)
    for start in tl.range(0, tl.max(last, 0) + 1, STEP, num_stages=1):
        keys = start + tl.arange(0, STEP)
        key_rows = _other_rows(members_ptr, keys, TILE)
        k = _load_rows(k_ptr, key_rows, k_row_stride, key_rows >= 0, DIM, PADDED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale  # [TILE, STEP]
        if HAS_CAP:
            s, _ = _tanh(s, ACCURATE)
            s *= cap
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = _exp(s - base[:, None], ACCURATE)
        shrink = _exp(top - base, ACCURATE)
        total = total * shrink + tl.sum(p, 1)
        v = _load_rows(v_ptr, key_rows, v_row_stride, key_rows >= 0, DIM_V, PADDED_V)
        acc = _product_apart(
            p.to(v.dtype), v, acc * shrink[:, None], seen, v_ptr, key_rows, v_row_stride, DIM_V, PADDED_V
        )
        top = new_top
    sees = first <= last
    total = tl.where(sees, total, 1.0)
    if ACCURATE:
        out = acc / total[:, None]
        lse = top + tl.log(total)
    else:
        out = acc * (1.0 / total)[:, None]
        lse = (top + tl.log2(total)) * LN2
    _store_rows(out_ptr, tl.where(sees[:, None], out, 0.0), rows, out_row_stride, rows >= 0, DIM_V, PADDED_V)
    tl.store(lse_ptr + rows, tl.where(sees, lse, float("-inf")), mask=rows >= 0)


@triton.jit(do_not_specialize=["total_q"])
def _varlen_attn_bwd_dq_shared_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    members_ptr,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    dq_row_stride,
    total_q,
    scale,
    score_scale,
    cap,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    members_ptr = _members(members_ptr, tl.program_id(0), TILE)
    if tl.load(members_ptr) < 0:
        return
    dout_ptr += head * dout_head_stride
    q_ptr += head * q_head_stride
    k_ptr += (head // GROUP) * k_head_stride
    v_ptr += (head // GROUP) * v_head_stride
    out_ptr += head * DIM_V
    lse_ptr += head * total_q
    delta_ptr += head * total_q
    dq_ptr += head * DIM
    ACCURATE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    places = tl.arange(0, TILE)
    rows = _own_rows(members_ptr, places, TILE)
    first, last = _places_seen(members_ptr, places, TILE)
    there = rows >= 0
    dout = _load_rows(dout_ptr, rows, dout_row_stride, there, DIM_V, PADDED_V)
    delta = _row_products(dout, _load_rows(out_ptr, rows, out_row_stride, there, DIM_V, PADDED_V), ACCURATE)
    tl.store(delta_ptr + rows, delta, mask=there)
    q = _load_rows(q_ptr, rows, q_row_stride, there, DIM, PADDED)
    lse = tl.load(lse_ptr + rows, mask=first <= last, other=float("inf"))
    if not ACCURATE:
        lse *= LOG2E
    dq = tl.zeros([TILE, PADDED], dtype=tl.float32)
    for start in tl.range(0, tl.max(last, 0) + 1, STEP, num_stages=1):
        keys = start + tl.arange(0, STEP)
        key_rows = _other_rows(members_ptr, keys, TILE)
        k = _load_rows(k_ptr, key_rows, k_row_stride, key_rows >= 0, DIM, PADDED)
        v = _load_rows(v_ptr, key_rows, v_row_stride, key_rows >= 0, DIM_V, PADDED_V)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale  # [TILE, STEP]
        if HAS_CAP:
            s, slope = _tanh(s, ACCURATE)
            s *= cap
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        ds = _weights(s, lse[:, None], seen, ACCURATE) * (dp - delta[:, None])
        if HAS_CAP:
            ds *= slope
        ds = tl.where(seen, ds, 0.0).to(k.dtype)
        dq = _product_apart(ds, k, dq, seen, k_ptr, key_rows, k_row_stride, DIM, PADDED)
    _store_rows(dq_ptr, dq * scale, rows, dq_row_stride, there, DIM, PADDED)


@triton.jit(do_not_specialize=["total_q"])
def _varlen_attn_bwd_dkv_shared_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    members_ptr,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    dk_row_stride,
    dv_row_stride,
    total_q,
    scale,
    score_scale,
    cap,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    members_ptr = _members(members_ptr, tl.program_id(0), TILE)
    if tl.load(members_ptr) < 0:
        return
    dout_ptr += (kv_head * GROUP) * dout_head_stride
    q_ptr += (kv_head * GROUP) * q_head_stride
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    lse_ptr += (kv_head * GROUP) * total_q
    delta_ptr += (kv_head * GROUP) * total_q
    dk_ptr += kv_head * DIM
    dv_ptr += kv_head * DIM_V
    ACCURATE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    keys = tl.arange(0, TILE)
    key_rows = _own_rows(members_ptr, keys, TILE)
    there = key_rows >= 0
    k = _load_rows(k_ptr, key_rows, k_row_stride, there, DIM, PADDED)
    if NEED_DK:
        v = _load_rows(v_ptr, key_rows, v_row_stride, there, DIM_V, PADDED_V)
    dk = tl.zeros([TILE, PADDED], dtype=tl.float32)
    dv = tl.zeros([TILE, PADDED_V], dtype=tl.float32)
    taken = tl.max(tl.where(_other_rows(members_ptr, keys, TILE) >= 0, keys, -1), 0) + 1
    for step in tl.range(0, tl.cdiv(taken, STEP) * GROUP, num_stages=1):
        places = (step // GROUP) * STEP + tl.arange(0, STEP)
        member = tl.cast(step % GROUP, tl.int64)
        rows = _other_rows(members_ptr, places, TILE)
        first, last = _places_seen(members_ptr, places, TILE)
        seen = (keys[:, None] >= first[None, :]) & (keys[:, None] <= last[None, :])  # [TILE, STEP]
        q = _load_rows(q_ptr + member * q_head_stride, rows, q_row_stride, rows >= 0, DIM, PADDED)
        st = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale
        if HAS_CAP:
            st, slope = _tanh(st, ACCURATE)
            st *= cap
        lse = tl.load(lse_ptr + member * total_q + rows, mask=first <= last, other=float("inf"))
        if not ACCURATE:
            lse *= LOG2E
        pt = _weights(st, lse[None, :], seen, ACCURATE)
        head_ptr = dout_ptr + member * dout_head_stride
        dout = _load_rows(head_ptr, rows, dout_row_stride, rows >= 0, DIM_V, PADDED_V)
        if NEED_DV:
            dv = _product_apart(pt.to(dout.dtype), dout, dv, seen, head_ptr, rows, dout_row_stride, DIM_V, PADDED_V)
        if NEED_DK:
            dpt = tl.dot(v, tl.trans(dout), input_precision="ieee")
            delta = tl.load(delta_ptr + member * total_q + rows, mask=rows >= 0, other=0.0)
            dst = pt * (dpt - delta[None, :])
            if HAS_CAP:
                dst *= slope
            dst = tl.where(seen, dst, 0.0).to(q.dtype)
            head_ptr = q_ptr + member * q_head_stride
            dk = _product_apart(dst, q, dk, seen, head_ptr, rows, q_row_stride, DIM, PADDED)
    if NEED_DK:
        _store_rows(dk_ptr, dk * scale, key_rows, dk_row_stride, there, DIM, PADDED)
    if NEED_DV:
        _store_rows(dv_ptr, dv, key_rows, dv_row_stride, there, DIM_V, PADDED_V)

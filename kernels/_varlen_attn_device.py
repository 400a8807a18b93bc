"""Triton: attention over packed documents, the device code of kernels/varlen_attn.py.

    s = scale * q k^T, softcap * tanh(s / softcap) where there is a cap;  p = exp(s - lse);  out = p v
    delta = rowsum(dout * out);  dp = dout v^T;  ds = p * (dp - delta) [* (1 - tanh^2)]
    dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T dout, the last two summed over the heads that share k and v

Query i of a document stands at key i + lk - lq; causal is a window that reaches 0 keys to the right.

             keys of the document            A program of the forward and of dq has one tile (a block of queries of one
           +----+----+----+----+             document, one head) and walks along the keys that any query sees;
    tile   | f  | f  | b  |    |   ->        only blocks on a boundary (b) are masked, full ones (f) are not, others
           +----+----+----+----+             are never read. One of dk and dv has a block of keys of one head
    queries|    |    | f  | b  |             and walks down the queries of all heads of its group: no sum leaves its
           +----+----+----+----+             program, so there are no atomics and the bits are always the same.

Documents too short to fill half a tile share others, with kernels of their own in _varlen_attn_short_device.py;
_varlen_attn_tiles.py lists both kinds.

16-bit inputs have log2(e) in the scale and exponentials to base 2; float32 keeps e, for the difference of a score and
lse is exact where it counts, and that of their products with log2(e) would not be. Rows past the last document are the
queries of one more document without keys, so that their zeros are written like any other. Reference: FlashAttention-2,
https://arxiv.org/abs/2307.08691; pyfinetune/ops/_varlen_attn_reference.py.
"""

import triton
import triton.language as tl

from pyfinetune.kernels._varlen_attn_parts import LN2, LOG2E, _exp, _load_rows, _row_products, _store_rows, _tanh
from pyfinetune.kernels._varlen_attn_tiles import _tile


@triton.jit
def _keys_seen(first, last, lk, ahead, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The keys [begin, end) that any of queries first..last sees, and [full_begin, full_end) that all of them see."""
    begin, full_begin = 0, 0
    end, full_end = lk, lk
    if HAS_LEFT:
        begin = tl.maximum(first + ahead - left, 0)
        full_begin = last + ahead - left
    if HAS_RIGHT:
        end = tl.minimum(last + ahead + right + 1, lk)
        full_end = tl.minimum(first + ahead + right + 1, lk)
    return begin, end, full_begin, full_end


@triton.jit
def _hide_unseen(
    s, boundary, place, keys, lk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BRANCH: tl.constexpr
):
    """Scores, -inf where the query at a place does not see a key; the two broadcast. Nothing to do off a boundary."""
    if BRANCH:
        if boundary:
            s = tl.where(_seen(place, keys, lk, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
    else:
        s = tl.where(_seen(place, keys, lk, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
    return s


@triton.jit
def _seen(place, keys, lk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    farthest = lk - 1
    if HAS_RIGHT:
        farthest = tl.minimum(place + right, farthest)
    seen = keys <= farthest
    if HAS_LEFT:
        seen = seen & (keys >= place - left)
    return seen


@triton.jit(do_not_specialize=["total_q", "window_left", "window_right"])
def _varlen_attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
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
    window_left,
    window_right,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
):
    # The last tiles of a document have the most keys under a causal mask; they go first.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    q_begin, lq, first, k_begin, lk = _tile(tiles_ptr, slot)
    if first >= lq:
        return
    ACCURATE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    place = rows + (lk - lq)
    q = _load_rows(q_ptr + q_begin * q_row_stride + head * q_head_stride, rows, q_row_stride, rows < lq, DIM, PADDED)
    k_ptr += k_begin * k_row_stride + (head // GROUP) * k_head_stride
    v_ptr += k_begin * v_row_stride + (head // GROUP) * v_head_stride
    last = tl.minimum(first + BLOCK_M, lq) - 1
    begin, end, full_begin, full_end = _keys_seen(
        first, last, lk, lk - lq, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_V], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k = _load_rows(k_ptr, keys, k_row_stride, keys < lk, DIM, PADDED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale  # [BLOCK_M, BLOCK_N]
        if HAS_CAP:
            s, _ = _tanh(s, ACCURATE)
            s *= cap
        boundary = (start < full_begin) | (start + BLOCK_N > full_end)
        s = _hide_unseen(
            s, boundary, place[:, None], keys[None, :], lk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BRANCH
        )
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that has seen nothing yet
        p = _exp(s - base[:, None], ACCURATE)
        shrink = _exp(top - base, ACCURATE)
        total = total * shrink + tl.sum(p, 1)
        v = _load_rows(v_ptr, keys, v_row_stride, keys < lk, DIM_V, PADDED_V)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    # From the geometry, not from the sums: a row of NaNs must stay one.
    nearest, farthest = 0, lk - 1
    if HAS_LEFT:
        nearest = tl.maximum(place - window_left, 0)
    if HAS_RIGHT:
        farthest = tl.minimum(place + window_right, lk - 1)
    sees = (nearest <= farthest) & (rows >= 0)
    total = tl.where(sees, total, 1.0)
    if ACCURATE:
        out = acc / total[:, None]
        lse = top + tl.log(total)
    else:
        out = acc * (1.0 / total)[:, None]
        lse = (top + tl.log2(total)) * LN2
    out = tl.where(sees[:, None], out, 0.0)
    lse = tl.where(sees, lse, float("-inf"))
    out_ptr += q_begin * out_row_stride + head * DIM_V
    _store_rows(out_ptr, out, rows, out_row_stride, rows < lq, DIM_V, PADDED_V)
    tl.store(lse_ptr + q_begin + head * total_q + rows, lse, mask=rows < lq)


@triton.jit(do_not_specialize=["total_q", "window_left", "window_right"])
def _varlen_attn_bwd_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
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
    window_left,
    window_right,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
):
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    q_begin, lq, first, k_begin, lk = _tile(tiles_ptr, slot)
    if first >= lq:
        return
    ACCURATE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    place = rows + (lk - lq)
    stat_ptr = lse_ptr + q_begin + head * total_q + rows
    lse = tl.load(stat_ptr, mask=rows < lq, other=float("inf"))
    dout_ptr += q_begin * dout_row_stride + head * dout_head_stride
    dout = _load_rows(dout_ptr, rows, dout_row_stride, rows < lq, DIM_V, PADDED_V)
    # delta costs this program one more tile, and the launch that would make it alone two.
    out_ptr += q_begin * out_row_stride + head * DIM_V
    out = _load_rows(out_ptr, rows, out_row_stride, rows < lq, DIM_V, PADDED_V)
    delta = _row_products(dout, out, ACCURATE)
    tl.store(delta_ptr + q_begin + head * total_q + rows, delta, mask=rows < lq)
    q = _load_rows(q_ptr + q_begin * q_row_stride + head * q_head_stride, rows, q_row_stride, rows < lq, DIM, PADDED)
    k_ptr += k_begin * k_row_stride + (head // GROUP) * k_head_stride
    v_ptr += k_begin * v_row_stride + (head // GROUP) * v_head_stride
    last = tl.minimum(first + BLOCK_M, lq) - 1
    begin, end, full_begin, full_end = _keys_seen(
        first, last, lk, lk - lq, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    sees = lse != float("-inf")
    lse = tl.where(sees, lse, float("inf"))
    if not ACCURATE:
        lse *= LOG2E
    dq = tl.zeros([BLOCK_M, PADDED], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k = _load_rows(k_ptr, keys, k_row_stride, keys < lk, DIM, PADDED)
        v = _load_rows(v_ptr, keys, v_row_stride, keys < lk, DIM_V, PADDED_V)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale  # [BLOCK_M, BLOCK_N]
        if HAS_CAP:
            s, slope = _tanh(s, ACCURATE)
            s *= cap
        boundary = (start < full_begin) | (start + BLOCK_N > full_end)
        s = _hide_unseen(
            s, boundary, place[:, None], keys[None, :], lk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BRANCH
        )
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        p = _exp(s - lse[:, None], ACCURATE)
        ds = p * (dp - delta[:, None])
        if HAS_CAP:
            ds *= slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq = tl.where(sees[:, None], dq * scale, 0.0)  # also where k is not finite
    dq_ptr += q_begin * dq_row_stride + head * DIM
    _store_rows(dq_ptr, dq, rows, dq_row_stride, rows < lq, DIM, PADDED)


@triton.jit(do_not_specialize=["total_q", "window_left", "window_right"])
def _varlen_attn_bwd_dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
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
    window_left,
    window_right,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
):
    # The first keys of a document have the most queries under a causal mask; they go first as they are.
    kv_head = tl.program_id(1).to(tl.int64)
    k_begin, lk, first, q_begin, lq = _tile(tiles_ptr, tl.program_id(0))
    if first >= lk:
        return
    ACCURATE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    keys = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = _load_rows(k_ptr + k_begin * k_row_stride + kv_head * k_head_stride, keys, k_row_stride, keys < lk, DIM, PADDED)
    dk = tl.zeros([BLOCK_N, PADDED], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED_V], dtype=tl.float32)
    if NEED_DK:
        v_ptr += k_begin * v_row_stride + kv_head * v_head_stride
        v = _load_rows(v_ptr, keys, v_row_stride, keys < lk, DIM_V, PADDED_V)
    ahead = lk - lq
    last = tl.minimum(first + BLOCK_N, lk) - 1
    begin, end = 0, lq
    if HAS_RIGHT:
        begin = tl.maximum(first - window_right - ahead, 0)
    if HAS_LEFT:
        end = tl.minimum(last + window_left - ahead + 1, lq)
    q_ptr += q_begin * q_row_stride + (kv_head * GROUP) * q_head_stride
    dout_ptr += q_begin * dout_row_stride + (kv_head * GROUP) * dout_head_stride
    lse_ptr += q_begin + (kv_head * GROUP) * total_q
    delta_ptr += q_begin + (kv_head * GROUP) * total_q
    # One loop over the heads of the group and their blocks: its pipeline fills once, which counts in short documents.
    for step in range(0, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M) * GROUP):
        start = begin + (step // GROUP) * BLOCK_M
        member = tl.cast(step % GROUP, tl.int64)
        rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        q = _load_rows(q_ptr + member * q_head_stride, rows, q_row_stride, rows < lq, DIM, PADDED)
        # Infinity makes the probabilities 0 of rows that are not there, and of those that see no key.
        lse = tl.load(lse_ptr + member * total_q + rows, mask=rows < lq, other=float("inf"))
        st = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale  # [BLOCK_N, BLOCK_M]
        if HAS_CAP:
            st, slope = _tanh(st, ACCURATE)
            st *= cap
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        place = rows + ahead
        newest = tl.minimum(start + BLOCK_M, lq) - 1 + ahead
        boundary = first + BLOCK_N > lk
        if HAS_LEFT:
            boundary |= first < newest - window_left
        if HAS_RIGHT:
            boundary |= last > start + ahead + window_right
        st = _hide_unseen(
            st, boundary, place[None, :], keys[:, None], lk, window_left, window_right, HAS_LEFT, HAS_RIGHT, BRANCH
        )
        if not ACCURATE:
            lse *= LOG2E  # as late as this, or its registers spill
        pt = _exp(st - lse[None, :], ACCURATE)
        dout = _load_rows(dout_ptr + member * dout_head_stride, rows, dout_row_stride, rows < lq, DIM_V, PADDED_V)
        if NEED_DV:
            dv = tl.dot(pt.to(dout.dtype), dout, dv, input_precision="ieee")
        if NEED_DK:
            # In this order: delta, which all threads of a column hold, has no registers to spare during the product.
            dpt = tl.dot(v, tl.trans(dout), input_precision="ieee")
            delta = tl.load(delta_ptr + member * total_q + rows, mask=rows < lq, other=0.0)
            dst = pt * (dpt - delta[None, :])
            if HAS_CAP:
                dst *= slope
            dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
    if NEED_DK:
        dk_ptr += k_begin * dk_row_stride + kv_head * DIM
        _store_rows(dk_ptr, dk * scale, keys, dk_row_stride, keys < lk, DIM, PADDED)
    if NEED_DV:
        dv_ptr += k_begin * dv_row_stride + kv_head * DIM_V
        _store_rows(dv_ptr, dv, keys, dv_row_stride, keys < lk, DIM_V, PADDED_V)

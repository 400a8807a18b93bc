"""Triton: products whose one side is a rank, which a library GEMM runs at a fraction of memory's rate.

    down    S = scale * keep(X) A^T                 [M, K] x [K, r]     split over K
    outer   D = scale * keep(X)^T T                 [K, M] x [M, r]     split over M
    both    T = scale * G B and D = scale * G^T S   one pass over G
    up      Y = onto + scale * keep(inner + S B)    [M, r] x [r, N]     one pass over Y
    dora    Z = inner + scale * S B,  Y = factor * Z + (base - inner) + bias;  G = factor * dY,  sum of dY * Z by column

               K, in `splits` parts                 a program sums its part in float32 and writes it to
         ┌─────────┬─────────┬─────────┐            partial[split]; a second kernel adds the parts up in the
    M    │ program │         │         │  x A^T     order of their numbers, so that bits never depend on
         ├─────────┼─────────┼─────────┤            which program came first
         └─────────┴─────────┴─────────┘

`keep` is dropout's mask, made from (seed, index) where it is needed and never stored; pyfinetune/ops/_philox.py says
which bits. What a kernel reads anyway it can copy on the way, into the left part of a wider matrix. Reference:
pyfinetune/ops/lora_linear.py.
"""

import triton
import triton.language as tl


@triton.jit
def _keep(seed_ptr, row, col_begin, width, threshold, ROWS: tl.constexpr, COLS: tl.constexpr, QUADS: tl.constexpr):
    """Whether dropout keeps the elements of a tile of x: element i has word i % 4 of the block at counter i // 4."""
    seed = tl.load(seed_ptr)
    if QUADS:  # rows and tiles start at whole counters: one block of words for four neighbours
        counter = ((row * width + col_begin) >> 2)[:, None] + tl.arange(0, COLS // 4)[None, :]
    else:
        element = (row * width + col_begin)[:, None] + tl.arange(0, COLS)[None, :]
        counter = element >> 2
    low = counter.to(tl.uint32)
    zero = low ^ low
    w0, w1, w2, w3 = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    if QUADS:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLS))
    else:
        which = element & 3
        words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return words >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["threshold"])
def _lora_linear_down_kernel(
    part_ptr,
    x_ptr,
    a_ptr,
    copy_ptr,
    square_ptr,
    seed_ptr,
    rows,
    width,
    rank,
    x_row_stride,
    a_row_stride,
    a_col_stride,
    copy_row_stride,
    steps,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    COPY: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    split = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(steps):
        begin = (split * steps + step) * BLOCK_K
        k = begin + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask = (row[:, None] < rows) & (k[None, :] < width)
        x = tl.load(x_ptr + row[:, None] * x_row_stride + k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        place = copy_ptr + row[:, None] * copy_row_stride + k[None, :]
        if COPY == 1:
            tl.store(place, x, mask=mask)
        if SQUARES:
            square += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        if DROPOUT:
            keep = _keep(seed_ptr, row, begin, width, threshold, BLOCK_M, BLOCK_K, QUADS)
            if COPY == 2:  # the dropped input itself, scaled in float32 and rounded once
                x = (x.to(tl.float32) * keep_scale).to(x.dtype)
            x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
            if COPY == 2:
                tl.store(place, x, mask=mask)
        a_place = a_ptr + k[:, None] * a_col_stride + column[None, :] * a_row_stride
        a = tl.load(a_place, mask=(k[:, None] < width) & (column[None, :] < rank), other=0.0)  # [BLOCK_K, BLOCK_R]
        total = tl.dot(x, a.to(x.dtype), total, input_precision="ieee")
    inside = row < rows
    part = part_ptr + (split * rows + row)[:, None] * BLOCK_R + column[None, :]
    tl.store(part, total, mask=inside[:, None])
    if SQUARES:
        tl.store(square_ptr + split * rows + row, square, mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _lora_linear_outer_kernel(
    part_ptr,
    x_ptr,
    t_ptr,
    seed_ptr,
    rows,
    width,
    rank,
    x_row_stride,
    t_row_stride,
    steps,
    threshold,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    k = begin + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    column = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for step in range(steps):
        row = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (row[:, None] < rows) & (k[None, :] < width)
        x = tl.load(x_ptr + row[:, None] * x_row_stride + k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if DROPOUT:
            keep = _keep(seed_ptr, row, begin, width, threshold, BLOCK_M, BLOCK_K, QUADS)
            x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
        mask = (row[:, None] < rows) & (column[None, :] < rank)
        t = tl.load(t_ptr + row[:, None] * t_row_stride + column[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]
        total = tl.dot(tl.trans(t), x, total, input_precision="ieee")
    part = part_ptr + (split * BLOCK_R + column)[:, None] * width + k[None, :]
    tl.store(part, total, mask=k[None, :] < width)


@triton.jit
def _lora_linear_both_kernel(
    t_part_ptr,
    d_part_ptr,
    g_ptr,
    s_ptr,
    b_ptr,
    copy_ptr,
    rows,
    width,
    rank,
    g_row_stride,
    s_row_stride,
    b_row_stride,
    b_col_stride,
    copy_row_stride,
    steps,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    k = strip * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    column = tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R]
    b_place = b_ptr + k[:, None] * b_row_stride + column[None, :] * b_col_stride
    b = tl.load(b_place, mask=(k[:, None] < width) & (column[None, :] < rank), other=0.0)
    b = b.to(g_ptr.dtype.element_ty)  # [BLOCK_K, BLOCK_R]
    total = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for step in range(steps):
        row = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        inside = row[:, None] < rows
        mask = inside & (k[None, :] < width)
        g = tl.load(g_ptr + row[:, None] * g_row_stride + k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if COPY:
            tl.store(copy_ptr + row[:, None] * copy_row_stride + k[None, :], g, mask=mask)
        s_place = s_ptr + row[:, None] * s_row_stride + column[None, :]
        s = tl.load(s_place, mask=inside & (column[None, :] < rank), other=0.0)  # [BLOCK_M, BLOCK_R]
        # The rank last in both: rows are dealt among the warps where two dots meet, and 16 would not go round.
        total = tl.dot(tl.trans(g), s, total, input_precision="ieee")
        t = tl.dot(g, b, input_precision="ieee")
        tl.store(t_part_ptr + (strip * rows + row)[:, None] * BLOCK_R + column[None, :], t, mask=inside)
    part = d_part_ptr + (split * width + k)[:, None] * BLOCK_R + column[None, :]
    tl.store(part, total, mask=k[:, None] < width)


@triton.jit
def _lora_linear_sum_kernel(
    out_ptr,
    second_ptr,
    part_ptr,
    rows,
    rank,
    splits,
    part_split_stride,
    part_row_stride,
    part_col_stride,
    out_row_stride,
    out_col_stride,
    second_row_stride,
    scale,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R]
    mask = (row[:, None] < rows) & (column[None, :] < rank)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    part = part_ptr + row[:, None] * part_row_stride + column[None, :] * part_col_stride
    for _ in range(splits):
        total += tl.load(part, mask=mask, other=0.0)
        part += part_split_stride
    total *= scale
    place = out_ptr + row[:, None] * out_row_stride + column[None, :] * out_col_stride
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)
    if SECOND:
        place = second_ptr + row[:, None] * second_row_stride + column[None, :]
        tl.store(place, total.to(second_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _lora_linear_up_kernel(
    out_ptr,
    onto_ptr,
    inner_ptr,
    s_ptr,
    b_ptr,
    seed_ptr,
    rows,
    width,
    rank,
    out_row_stride,
    onto_row_stride,
    inner_row_stride,
    s_row_stride,
    b_row_stride,
    b_col_stride,
    scale,
    threshold,
    ONTO: tl.constexpr,
    INNER: tl.constexpr,
    ADAPTER: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    begin = tl.program_id(1).to(tl.int64) * BLOCK_K
    k = begin + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask = (row[:, None] < rows) & (k[None, :] < width)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if ADAPTER:
        for start in range(0, rank, BLOCK_R):
            column = start + tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R]
            inside = column < rank
            s_place = s_ptr + row[:, None] * s_row_stride + column[None, :]
            s = tl.load(s_place, mask=(row[:, None] < rows) & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            b_place = b_ptr + k[None, :] * b_row_stride + column[:, None] * b_col_stride
            b = tl.load(b_place, mask=(k[None, :] < width) & inside[:, None], other=0.0)  # [BLOCK_R, BLOCK_K]
            total = tl.dot(s, b.to(s.dtype), total, input_precision="ieee")
    if INNER:
        total += tl.load(inner_ptr + row[:, None] * inner_row_stride + k[None, :], mask=mask, other=0.0)
    total *= scale
    if DROPOUT:
        total = tl.where(_keep(seed_ptr, row, begin, width, threshold, BLOCK_M, BLOCK_K, QUADS), total, 0.0)
    if ONTO:
        total += tl.load(onto_ptr + row[:, None] * onto_row_stride + k[None, :], mask=mask, other=0.0)
    place = out_ptr + row[:, None] * out_row_stride + k[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lora_linear_dora_fwd_kernel(
    y_ptr,
    z_ptr,
    base_ptr,
    factor_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    rows,
    width,
    rank,
    s_row_stride,
    b_row_stride,
    b_col_stride,
    scale,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    mask = (row[:, None] < rows) & (k[None, :] < width)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, rank, BLOCK_R):
        column = start + tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R]
        inside = column < rank
        s_place = s_ptr + row[:, None] * s_row_stride + column[None, :]
        s = tl.load(s_place, mask=(row[:, None] < rows) & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b_place = b_ptr + k[None, :] * b_row_stride + column[:, None] * b_col_stride
        b = tl.load(b_place, mask=(k[None, :] < width) & inside[:, None], other=0.0)  # [BLOCK_R, BLOCK_K]
        total = tl.dot(s, b.to(s.dtype), total, input_precision="ieee")
    place = row[:, None] * width + k[None, :]
    inner = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
    z = inner + total * scale
    tl.store(z_ptr + place, z.to(z_ptr.dtype.element_ty), mask=mask)
    y = z * tl.load(factor_ptr + k, mask=k < width, other=0.0)[None, :]
    if BASE:  # the base term sees x, the adapted term the dropped x
        y += tl.load(base_ptr + place, mask=mask, other=0.0).to(tl.float32) - inner
    if BIAS:
        y += tl.load(bias_ptr + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lora_linear_dora_bwd_kernel(
    g_ptr,
    part_ptr,
    dout_ptr,
    z_ptr,
    factor_ptr,
    rows,
    width,
    g_row_stride,
    dout_row_stride,
    z_row_stride,
    steps,
    MAGNITUDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    split = tl.program_id(1).to(tl.int64)
    factor = tl.load(factor_ptr + k, mask=k < width, other=0.0)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(steps):
        row = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (row[:, None] < rows) & (k[None, :] < width)
        dout = tl.load(dout_ptr + row[:, None] * dout_row_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        g = (dout * factor[None, :]).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + row[:, None] * g_row_stride + k[None, :], g, mask=mask)
        if MAGNITUDE:
            z = tl.load(z_ptr + row[:, None] * z_row_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(dout * z, axis=0)
    if MAGNITUDE:
        tl.store(part_ptr + split * width + k, total, mask=k < width)

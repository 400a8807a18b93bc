"""The reference of `varlen_attn`: plain torch, one softmax a document, the scores written out.

Documents of equal lengths are stacked, so that thousands of short ones cost a few calls and not thousands; a stack
holds at most `STACK` scores, or one document. Scores and probabilities are float32 whatever the inputs are, float64
for float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

from pyfinetune.ops._checks import fail

STACK = 1 << 22  # scores, of 4 bytes


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, probabilities and lse are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _boundaries(name: str, cu_seqlens: torch.Tensor, total: int) -> list[int]:
    """The values of cu_seqlens, once they are known to be boundaries of documents in `total` rows."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        fail("varlen_attn", f"{name} starts at {values[0]}, needs 0")
    for i, (start, end) in enumerate(itertools.pairwise(values), 1):
        if end < start:
            fail("varlen_attn", f"{name} decreases at element {i}")
    if values[-1] > total:
        fail("varlen_attn", f"{name} ends at {values[-1]}, beyond the {total} tokens")
    return values


def _stacks(q, k, cu_seqlens_q, cu_seqlens_k) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows of q [n, lq], rows of k [n, lk]) for stacks of documents that are equally long; none are empty."""
    starts_q = _boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = _boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    by_length: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in range(len(starts_q) - 1):
        lengths = (starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i])
        if all(lengths):
            by_length.setdefault(lengths, []).append((starts_q[i], starts_k[i]))
    for (lq, lk), starts in by_length.items():
        step = max(1, STACK // (q.shape[1] * lq * lk))
        for first in range(0, len(starts), step):
            start_q, start_k = torch.tensor(starts[first : first + step], device=q.device).unbind(1)
            rows_q = start_q[:, None] + torch.arange(lq, device=q.device)
            rows_k = start_k[:, None] + torch.arange(lk, device=q.device)
            yield rows_q, rows_k


def _visible(lq: int, lk: int, causal: bool, left: int, right: int, device: torch.device) -> torch.Tensor:
    """bool [lq, lk]: the keys that each query sees."""
    at = torch.arange(lq, device=device)[:, None] + (lk - lq)
    key = torch.arange(lk, device=device)
    seen = torch.ones(lq, lk, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= at
    if left >= 0:
        seen &= key >= at - min(left, lq + lk)
    if right >= 0:
        seen &= key <= at + min(right, lq + lk)
    return seen


def _scores(q, k, seen, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [n, num_kv_heads, group, lq, lk] after scale and softcap: as they are, and -inf where not seen."""
    scores = torch.einsum("nqhgd,nkhd->nhgqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores, scores.masked_fill(~seen, float("-inf"))


def _weights(masked: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys; zero in a row that sees none."""
    return torch.softmax(masked, dim=-1).masked_fill(~seen.any(dim=1)[:, None], 0.0)


def _grouped(x: torch.Tensor, rows: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """x [total, num_heads, d] at these rows: [n, lq, num_kv_heads, group, d] in the dtype of scores."""
    return x[rows].to(stat_dtype(x.dtype)).unflatten(2, (num_kv_heads, -1))


def _as_written(function):
    """The function with autocast off: inside an op it would still cast what goes into each product."""

    @functools.wraps(function)
    def call(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return call


@_as_written
def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, left, right, softcap):
    """Schema: see `varlen_attn`."""
    (total_q, num_heads, _), num_kv_heads, dtype = q.shape, k.shape[1], stat_dtype(q.dtype)
    out = q.new_zeros((total_q, num_heads, v.shape[2]))
    lse = q.new_full((num_heads, total_q), float("-inf"), dtype=dtype)
    for rows_q, rows_k in _stacks(q, k, cu_seqlens_q, cu_seqlens_k):
        seen = _visible(rows_q.shape[1], rows_k.shape[1], causal, left, right, q.device)
        q_, k_, v_ = _grouped(q, rows_q, num_kv_heads), k[rows_k].to(dtype), v[rows_k].to(dtype)
        _, masked = _scores(q_, k_, seen, scale, softcap)
        o = torch.einsum("nhgqk,nkhd->nqhgd", _weights(masked, seen), v_)
        o = o.masked_fill(~seen.any(1)[:, None, None, None], 0.0)  # also where v is not finite
        out[rows_q] = o.flatten(2, 3).to(q.dtype)
        lse[:, rows_q] = masked.logsumexp(-1).flatten(1, 2).transpose(0, 1)
    return out, lse


@_as_written
def backward(dout, q, k, v, _out, _lse, cu_seqlens_q, cu_seqlens_k, causal, scale, left, right, softcap, *needs):
    """Schema: see `varlen_attn_bwd`.

    `out` and `lse` are there for kernels, which cannot hold a row of probabilities: exp(score - lse) carries lse's
    rounding, and dout . out in place of sum(p * dp) the rounding of both; eager code has neither.
    """
    need_dq, need_dk, need_dv = needs
    num_kv_heads, dtype = k.shape[1], stat_dtype(q.dtype)
    grads = [x.new_zeros(x.shape if need else (0,)) for x, need in zip((q, k, v), needs, strict=True)]
    for rows_q, rows_k in _stacks(q, k, cu_seqlens_q, cu_seqlens_k):
        seen = _visible(rows_q.shape[1], rows_k.shape[1], causal, left, right, q.device)
        q_, dout_ = (_grouped(x, rows_q, num_kv_heads) for x in (q, dout))
        k_, v_ = k[rows_k].to(dtype), v[rows_k].to(dtype)
        scores, masked = _scores(q_, k_, seen, scale, softcap)
        p = _weights(masked, seen)
        if need_dv:
            grads[2][rows_k] = torch.einsum("nhgqk,nqhgd->nkhd", p, dout_).to(v.dtype)
        if not (need_dq or need_dk):
            continue
        dp = torch.einsum("nqhgd,nkhd->nhgqk", dout_, v_)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if softcap:
            ds = ds * (1 - (scores / softcap) ** 2)
        ds = ds * scale
        if need_dq:
            dq = torch.einsum("nhgqk,nkhd->nqhgd", ds, k_)
            grads[0][rows_q] = dq.masked_fill(~seen.any(1)[:, None, None, None], 0.0).flatten(2, 3).to(q.dtype)
        if need_dk:
            grads[1][rows_k] = torch.einsum("nhgqk,nqhgd->nkhd", ds, q_).to(k.dtype)
    return tuple(grads)

"""Calls of varlen_attn for its tests: inputs, the same in torch's plain operators, and the judgement of both."""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise

import torch
from backends import INTERPRETED
from oracle import BACKWARD, FORWARD, assert_as_good_as, error

import pyfinetune as pf

NAMES = ["out", "lse", "dq", "dk", "dv"]


def cu(lengths) -> torch.Tensor:
    """Lengths of documents -> cu_seqlens."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@dataclasses.dataclass
class Case:
    """Inputs of one call; q, k and v are leaves that require grad."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    options: dict

    def inputs(self):
        return [self.q, self.k, self.v]

    def args(self):
        return (*self.inputs(), self.cu_seqlens_q, self.cu_seqlens_k)

    def forward(self):
        return pf.ops.varlen_attn(*self.args(), **self.options)

    def run(self, dout=None):
        """[out, lse, dq, dk, dv] through pf.ops."""
        out, lse = pf.ops.varlen_attn(*self.args(), **self.options, return_lse=True)
        dout = upstream(out, self.q.dtype) if dout is None else dout
        return [out.detach(), lse, *torch.autograd.grad(out, self.inputs(), dout)]

    def exact(self):
        """The same by the reference in float64."""
        with pf.use_backend("reference"):
            return self.cast(torch.float64).run(self.dout(torch.float64))

    def dout(self, dtype):
        shape = (*self.q.shape[:2], self.v.shape[2])
        return upstream(torch.empty(shape, dtype=dtype), self.q.dtype)

    def cast(self, dtype):
        """The same call with leaves of another dtype."""
        q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in self.inputs())
        return dataclasses.replace(self, q=q, k=k, v=v)

    def with_inputs(self, q, k, v):
        return dataclasses.replace(self, q=q, k=k, v=v)

    def fused_grads(self):
        """[dq, dk, dv] by torch's own fused attention, document by document; None with a softcap, which it has not."""
        if self.options.get("softcap"):
            return None
        cu_k = self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        out = torch.zeros((*self.q.shape[:2], self.v.shape[2]), dtype=self.q.dtype)
        for (a, b), (c, d) in zip(pairwise(self.cu_seqlens_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            if a < b and c < d:
                heads = [x.transpose(0, 1)[None] for x in (self.q[a:b], self.k[c:d], self.v[c:d])]
                seen = visible(b - a, d - c, **self.options)
                seen_by_all = seen | ~seen.any(dim=1, keepdim=True)  # such rows are taken out again below
                scale = self.options.get("softmax_scale")
                document = torch.nn.functional.scaled_dot_product_attention(
                    *heads, attn_mask=seen_by_all, scale=scale, enable_gqa=True
                )
                out[a:b] = document[0].transpose(0, 1).masked_fill(~seen.any(dim=1)[:, None, None], 0.0)
        return torch.autograd.grad(out, self.inputs(), self.dout(self.q.dtype)) if out.requires_grad else None

    def plain(self):
        """[out, lse, dq, dk, dv] by torch's operators, document by document, in the inputs' own dtype."""
        cu_k = self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        out = torch.zeros((*self.q.shape[:2], self.v.shape[2]), dtype=self.q.dtype)
        lse = torch.full((self.q.shape[1], self.q.shape[0]), float("-inf"), dtype=_lse_dtype(self.q))
        for (a, b), (c, d) in zip(pairwise(self.cu_seqlens_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            if a < b and c < d:
                document = (self.q[a:b], self.k[c:d], self.v[c:d])
                out[a:b] = plain_document(*document, **self.options)[0]
                # lse is float32 for every input: in half dtypes it is held against float32 arithmetic.
                wide = [x.detach().to(lse.dtype) for x in document]
                lse[:, a:b] = plain_document(*wide, **self.options)[1]
        grads = torch.autograd.grad(out, self.inputs(), self.dout(self.q.dtype)) if out.requires_grad else None
        return [out.detach(), lse, *(grads or [torch.zeros_like(x) for x in self.inputs()])]


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def visible(lq, lk, causal=True, window_size=(-1, -1), **_rest):
    """bool [lq, lk], from the definition: query i is at key i + lk - lq."""
    ahead = torch.arange(lk)[None, :] - torch.arange(lq)[:, None] - (lk - lq)
    left, right = window_size
    seen = torch.full((lq, lk), True)
    if causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def plain_document(q, k, v, causal=True, softmax_scale=None, window_size=(-1, -1), softcap=0.0):
    """(out [lq, heads, dv], lse [heads, lq]) of one document, as people write it."""
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale  # [heads, lq, lk]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    seen = visible(q.shape[0], k.shape[0], causal, window_size)
    dead = ~seen.any(dim=1)
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
    out = (weights @ v.transpose(0, 1)).masked_fill(dead[:, None], 0.0)
    return out.transpose(0, 1), scores.masked_fill(~seen, float("-inf")).logsumexp(-1)


def upstream(out, dtype):
    """The same random gradient, representable in `dtype`, for every run of a case."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    return torch.randn(out.shape, generator=generator).to(dtype).to(out.dtype)


HEADS = (2, 1) if INTERPRETED else (9, 3)


def make(lengths, lengths_k=None, *, heads=HEADS, dim=64, dim_v=None, dtype=torch.float32, rest=0, **options):
    """Random inputs; `rest` rows lie past the last document."""
    total_q, total_k = sum(lengths) + rest, sum(lengths if lengths_k is None else lengths_k) + rest

    def leaf(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    return Case(
        leaf(total_q, heads[0], dim),
        leaf(total_k, heads[1], dim),
        leaf(total_k, heads[1], dim_v or dim),
        cu(lengths),
        None if lengths_k is None else cu(lengths_k),
        options,
    )


def judge(ours, theirs, exact):
    """Results of several draws, judged together: the largest of a few rounding errors is a matter of luck."""
    for i, name in enumerate(NAMES):
        stacked = [torch.stack([draw[i] for draw in results]) for results in (ours, theirs, exact)]
        if name == "lse":
            masked = [x == float("-inf") for x in stacked]
            assert torch.equal(masked[0], masked[2])
            assert torch.equal(masked[1], masked[2])
            stacked = [x.masked_fill(x == float("-inf"), 0.0) for x in stacked]
        assert_as_good_as(*stacked, FORWARD if i < 2 else BACKWARD, name)


def hold_to_the_oracle(backend: str, *lengths, draws: int = 3, **options):
    """The backend's error is at most so many times that of torch's own code in the same dtype.

    For gradients that is the plain operators or the fused attention, whichever is farther off: a backward pass from
    the logarithm of a sum rounds differently from one that has kept the probabilities, and torch ships both.
    """
    ours, theirs, exact, fused = [], [], [], []
    for _ in range(draws):
        case = make(*lengths, **options)
        with pf.use_backend(backend):
            ours.append(case.run())
        theirs.append(case.cast(case.q.dtype).plain())
        exact.append(case.exact())
        fused.append(case.cast(case.q.dtype).fused_grads())
    if backend != "reference" and None not in fused:
        theirs = [_farther(*results) for results in _by_quantity(theirs, fused, exact)]
        theirs = [list(draw) for draw in zip(*theirs, strict=True)]
    judge(ours, theirs, exact)


def _by_quantity(theirs, fused, exact):
    """(plain, fused or None, exact) of all draws, for each of the five quantities."""
    for i in range(len(NAMES)):
        other = [grads[i - 2] for grads in fused] if i >= 2 else None
        yield [draw[i] for draw in theirs], other, [draw[i] for draw in exact]


def _farther(plain, fused, exact):
    def off(found):
        return max(error(a, b) for a, b in zip(found, exact, strict=True))

    return plain if fused is None or off(plain) >= off(fused) else fused


def same(results, expected) -> bool:
    """Every bit equal; NaNs count as equal to themselves."""
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
        for a, b in zip(results, expected, strict=True)
    )

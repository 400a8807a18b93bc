"""Cases of the op `varlen_attn`: attention over packed documents, against a dense mask and against a loop over them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping

import torch

import pyfinetune as pf
from pyfinetune.bench import fused_peers, peers
from pyfinetune.bench.checks import close_to_exact
from pyfinetune.bench.harness import OURS, Case, Passes, Setup, Target
from pyfinetune.bench.peer_names import LOOP, MASK
from pyfinetune.bench.shapes import Sizes, short

_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64
_NAMES = ["out", "dq", "dk", "dv"]
# How much worse than torch's eager code in the same dtype a result may be. A peer is only asked to compute the same:
# torch's fused kernel misses our own bound in dk over 4096 tokens, and is the one to be faster than all the same.
_FACTORS = [1.5, 2.0, 2.0, 2.0]
_PEERS_FACTORS = [4.0] * 4


def _plain(q, k, v, bounds: list[int], dout=None) -> list[torch.Tensor]:
    """out, and with `dout` dq, dk and dv, by torch's plain operators in q's dtype; scores of one kv head at a time."""
    group = q.shape[1] // k.shape[1]
    results = [torch.empty_like(x) for x in (q, q, k, v)]
    for (start, end), head in itertools.product(itertools.pairwise(bounds), range(k.shape[1])):
        rows, heads = slice(start, end), slice(head * group, (head + 1) * group)
        slices = [(rows, heads), (rows, heads), (rows, head), (rows, head)]
        ahead = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        with torch.set_grad_enabled(dout is not None):
            leaves = [x[at].detach().clone().requires_grad_() for x, at in zip((q, k, v), slices[1:], strict=True)]
            query, key, value = leaves
            scores = (query.transpose(0, 1) @ key.T) * q.shape[-1] ** -0.5  # [group, rows, rows]
            weights = scores.masked_fill(ahead, float("-inf")).softmax(dim=-1)
            made = [(weights @ value).transpose(0, 1)]
            if dout is not None:
                made += torch.autograd.grad(made[0], leaves, dout[rows, heads].to(q.dtype))
        for result, at, part in zip(results, slices, made, strict=False):
            result[at] = part.detach()
    return results if dout is not None else results[:1]


def _attentions(bounds: list[int], device: torch.device, with_mask: bool) -> dict[str, Callable]:
    """By name, each a function of q, k, v [tokens, heads, head_dim]."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    found = {
        OURS: lambda q, k, v: pf.ops.varlen_attn(q, k, v, cu_seqlens),
        LOOP: lambda q, k, v: peers.attention_per_document(q, k, v, bounds),
    }
    if with_mask:
        document = torch.repeat_interleave(torch.tensor(lengths, device=device))
        mask = (document[:, None] == document).tril()[None, None]
        found[MASK] = lambda q, k, v: peers.attention_with_mask(q, k, v, mask)
    return found


def build(
    device: torch.device,
    lengths: list[int],
    dtype: torch.dtype,
    backward: bool,
    with_mask: bool,
    sizes: tuple[int, int, int] = (_HEADS, _KV_HEADS, _HEAD_DIM),
    more: Callable[[list[int], torch.device], Mapping[str, Callable]] | None = None,
) -> Setup:
    """Attention over documents of such lengths, with so many heads and kv heads of such a size, and `more` peers."""
    heads, kv_heads, head_dim = sizes
    bounds = [0, *itertools.accumulate(lengths)]

    def random(heads):
        return torch.randn(bounds[-1], heads, head_dim, device=device).to(dtype)

    leaves = [random(count).requires_grad_(backward) for count in (heads, kv_heads, kv_heads)]
    dout = random(heads) if backward else None
    attentions = _attentions(bounds, device, with_mask) | (more(bounds, device) if more else {})
    detached = [leaf.detach() for leaf in leaves]

    @functools.cache  # several peers are held against them
    def expected():
        return [_plain(*(x.to(kind) for x in detached), bounds, dout) for kind in (torch.float64, dtype)]

    def results(attention):
        with torch.set_grad_enabled(backward):
            out = attention(*leaves)
            return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if backward else ())]

    def check(name):
        exact, eager = expected()
        factors = _FACTORS if name == OURS else _PEERS_FACTORS
        return close_to_exact(results(attentions[name]), exact, eager, _NAMES[: len(exact)], factors[: len(exact)])

    def forward(attention, _number=0):
        with torch.set_grad_enabled(backward):
            return attention(*leaves)

    def gradients(_number, out):
        return torch.autograd.grad(out, leaves, dout)

    setup = Setup({}, {}, inputs=leaves)
    for name, attention in attentions.items():
        half = functools.partial(forward, attention)
        setup.calls[name] = Passes(half, gradients) if backward else half
        setup.check[name] = functools.partial(check, name)
        if backward:
            setup.forward[name] = half
    return setup


def _build(
    device: torch.device,
    lengths: list[int],
    dtype: torch.dtype,
    backward: bool,
    with_mask: bool,
    sizes: tuple[int, int, int],
) -> Setup:
    """`build` with the peers of other packages."""
    bounds = [0, *itertools.accumulate(lengths)]
    others, missing = fused_peers.attentions(bounds, device, dtype, backward)
    setup = build(device, lengths, dtype, backward, with_mask, sizes, lambda bounds, device: others)
    setup.missing |= missing
    return setup


def _case(
    lengths: list[int],
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = True,
    with_mask: bool = True,
    targets: Mapping[str, Target] | None = None,
    sizes: tuple[int, int, int] = (_HEADS, _KV_HEADS, _HEAD_DIM),
    **more,
) -> Case:
    heads, kv_heads, dim = sizes
    documents = f"{len(lengths)}x{lengths[0]}" if len(set(lengths)) == 1 else f"{sum(lengths)} in {len(lengths)}"
    products = 7 if backward else 2  # of each score: q k and p v; again q k, dout v, and one for each gradient
    elements = dim * sum(lengths) * (heads + kv_heads)
    return Case(
        "varlen_attn",
        f"packed attention {documents}, {heads}/{kv_heads} heads, d {dim}, {short(dtype)}, "
        + ("fwd+bwd" if backward else "fwd"),
        functools.partial(_build, lengths=lengths, dtype=dtype, backward=backward, with_mask=with_mask, sizes=sizes),
        flops=products * heads * dim * sum(float(length) ** 2 for length in lengths),  # causal: half the scores
        dtype=dtype,
        bytes=elements * dtype.itemsize * (6.0 if backward else 2.0),
        targets=targets or {},
        **more,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    if quick:
        return [
            _case([64] * 4),
            _case([64] * 4, torch.float32),
            _case([16] * 16, backward=False),
        ]
    return [
        _case([512] * 8, targets={MASK: Target(20.0, 20.0), LOOP: Target(3.5, 3.5)}),
        _case([512] * 8, torch.float32, targets={MASK: Target(10.0, 10.0), LOOP: Target(1.5, 1.5)}),
        _case([64] * 64, targets={LOOP: Target(6.0, 6.0)}),
        _case([1024], with_mask=False),
        _case([4096], with_mask=False),
        _case([512] * 8, backward=False, with_mask=False, compiled=True),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's attention layers; a plain M,N,K has no heads."""
    model = sizes.model
    if model is None:
        return []
    heads = (model.heads, model.kv_heads, model.head_dim)
    return [
        _case(sizes.documents, dtype, sizes=heads),
        _case([sizes.tokens], dtype, with_mask=False, sizes=heads),
        _case(sizes.documents, dtype, backward=False, with_mask=False, sizes=heads),
    ]

"""Attention over packed documents on a GPU: against torch's own variable-length and flexible attention."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable

import torch

import pyfinetune as pf
from pyfinetune.bench import bench_varlen_attn
from pyfinetune.bench.checks import same_bits
from pyfinetune.bench.gpu_timing import GpuCase
from pyfinetune.bench.harness import OURS, Setup

VARLEN, FLEX = "torch varlen (FA2)", "flex attention"
_SMALL, _LARGE = (4, 2, 64), (32, 8, 128)  # heads, kv heads, size of a head


def torch_varlen(bounds: list[int], device: torch.device) -> Callable:
    """torch.nn.attention.varlen, whose arguments differ from release to release."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        options["enable_gqa"] = True
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in itertools.pairwise(bounds))

    def attention(q, k, v):
        if "enable_gqa" not in takes:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)

    return attention


def torch_flex(bounds: list[int], device: torch.device) -> Callable:
    """Flexible attention with a mask of documents, compiled where there is a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor([end - start for start, end in itertools.pairwise(bounds)], device=device)
    document = torch.repeat_interleave(lengths)

    def visible(batch, head, query, key):
        return (document[query] == document[key]) & (query >= key)

    mask = create_block_mask(visible, None, None, bounds[-1], bounds[-1], device=str(device))
    function = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def attention(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attention


def _more(bounds: list[int], device: torch.device, names: tuple[str, ...] = (VARLEN,)) -> dict[str, Callable]:
    """The peers; one that cannot be made fails when it is called, and is reported then."""
    makers = {name: {VARLEN: torch_varlen, FLEX: torch_flex}[name] for name in names}
    made = {}
    for name, maker in makers.items():

        @functools.cache
        def attention(maker=maker):
            return maker(bounds, device)

        made[name] = lambda q, k, v, attention=attention: attention()(q, k, v)
    return made


def _packed(
    device: torch.device, lengths: list[int], sizes: tuple[int, int, int], names: tuple[str, ...] = (VARLEN,)
) -> Setup:
    more = functools.partial(_more, names=names)
    return bench_varlen_attn.build(device, lengths, torch.bfloat16, True, False, sizes, more)


def _packed_case(lengths: list[int], sizes: tuple[int, int, int], goal: str, names: tuple[str, ...]) -> GpuCase:
    heads, kv_heads, dim = sizes
    note = "" if names == (VARLEN,) else f", beside {', '.join(names)}"
    return GpuCase(
        "varlen_attn",
        f"packed attention {len(lengths)}x{lengths[0]}, {heads}/{kv_heads} heads, d {dim}, bf16, fwd+bwd{note}",
        functools.partial(_packed, lengths=lengths, sizes=sizes, names=names),
        flops=7.0 * heads * dim * sum(float(length) ** 2 for length in lengths),
        bytes=12.0 * dim * sum(lengths) * (heads + kv_heads),
        goal=goal,
    )


def flex_case(quick: bool) -> GpuCase:
    """The first of the shapes beside flexible attention, which compiles for a while."""
    return _packed_case(*(([64] * 2, _SMALL) if quick else ([512] * 16, _LARGE)), "", (FLEX,))


def _build_single(device: torch.device, documents: int, sizes: tuple[int, int, int]) -> Setup:
    """Documents of one token, each of which attends to itself."""
    heads, kv_heads, dim = sizes
    q, k, v = (torch.randn(documents, n, dim, device=device).bfloat16() for n in (heads, kv_heads, kv_heads))
    cu_seqlens = torch.arange(documents + 1, dtype=torch.int32, device=device)
    expected = v.repeat_interleave(heads // kv_heads, dim=1)

    def ours(i):
        return pf.ops.varlen_attn(q, k, v, cu_seqlens)

    calls = {OURS: ours}
    peer = _more(list(range(documents + 1)), device)[VARLEN]
    calls[VARLEN] = lambda i: peer(q, k, v)
    return Setup(
        calls, {name: lambda call=call: same_bits([call(0)], [expected], ["out"]) for name, call in calls.items()}
    )


def attention_cases(quick: bool) -> list[GpuCase]:
    """The rows of the table; `quick` is smaller."""
    sizes = _SMALL if quick else _LARGE
    heads, kv_heads, dim = sizes
    shapes = [([64] * 2, "")] if quick else [([512] * 16, "≥ 1.5x backward, no host sync"), ([4096] * 2, "≥ 1.0x")]
    cases = [_packed_case(lengths, sizes, goal, (VARLEN,)) for lengths, goal in shapes]
    documents = 32 if quick else 8192
    cases.append(
        GpuCase(
            "varlen_attn",
            f"{documents} documents of one token, {heads}/{kv_heads} heads, d {dim}, bf16, forward",
            functools.partial(_build_single, documents=documents, sizes=sizes),
            bytes=4.0 * documents * dim * (heads + kv_heads),
            goal="works",
        )
    )
    return cases

"""Cases of the op `rope`, against Hugging Face's apply_rotary_pos_emb."""

from __future__ import annotations

import functools

import torch

import pyfinetune as pf
from pyfinetune.bench import elementwise, fused_peers, peers
from pyfinetune.bench.harness import OURS, Case, Setup
from pyfinetune.bench.peer_names import COMPILED, HUGGING_FACE
from pyfinetune.bench.shapes import Sizes, short


def _plain(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return rotate(q), rotate(k)


def _build(
    device: torch.device,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    backward: bool,
) -> Setup:
    angles = torch.outer(torch.arange(tokens), 10000 ** -(torch.arange(dim // 2) / (dim // 2))).repeat(1, 2)[None]
    cos, sin = (table.to(device, dtype) for table in (angles.cos(), angles.sin()))

    def random(count):
        """A projection seen with its heads first, as attention layers make it."""
        return torch.randn(batch, tokens, count, dim, device=device).to(dtype).transpose(1, 2)

    def make():
        inputs = [random(heads).requires_grad_(), random(kv_heads).requires_grad_(), cos, sin]
        return inputs, [random(heads), random(kv_heads)] if backward else []

    functions = {OURS: pf.ops.rope}
    llama, why = peers.llama()
    if llama is not None:
        functions[HUGGING_FACE] = llama.apply_rotary_pos_emb
    others, missing = fused_peers.functions("rope", device)
    functions |= {COMPILED: fused_peers.compiled(_plain), **others}
    missing |= {HUGGING_FACE: why} if llama is None else {}
    return elementwise.build(device, make, functions, _plain, missing)


def _case(batch, tokens, heads, kv_heads, dim, *, dtype=torch.bfloat16, backward=True) -> Case:
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    name = f"RoPE {batch}x{tokens}, {heads}/{kv_heads} heads, d {dim} {short(dtype)}"
    return Case(
        "rope",
        f"{name}, {'fwd+bwd' if backward else 'forward'}",
        functools.partial(_build, **sizes, dtype=dtype, backward=backward),
        dtype=dtype,
        bytes=float(dtype.itemsize) * (4 if backward else 2) * batch * tokens * (heads + kv_heads) * dim,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller."""
    if quick:
        return [_case(2, 16, 4, 2, 64), _case(1, 1, 4, 2, 64, backward=False)]
    return [_case(2, 512, 32, 8, 128), _case(4, 256, 9, 3, 64), _case(1, 1, 32, 8, 128, backward=False)]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's attention layers; a plain M,N,K has no heads."""
    model = sizes.model
    if model is None:
        return []
    heads = (model.heads, model.kv_heads, model.head_dim)
    return [_case(1, sizes.tokens, *heads, dtype=dtype), _case(1, 1, *heads, dtype=dtype, backward=False)]

"""Cases of the op `rope`, against Hugging Face's apply_rotary_pos_emb."""

from __future__ import annotations

import functools

import torch

import pyfinetune as pf
from pyfinetune.bench import elementwise, peers
from pyfinetune.bench.harness import OURS, Case, Setup

_PEER = "Hugging Face"


def _plain(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return rotate(q), rotate(k)


def _build(device: torch.device, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, backward: bool) -> Setup:
    angles = torch.outer(torch.arange(tokens), 10000 ** -(torch.arange(dim // 2) / (dim // 2))).repeat(1, 2)[None]
    cos, sin = (table.to(device).bfloat16() for table in (angles.cos(), angles.sin()))

    def random(count):
        """A projection seen with its heads first, as attention layers make it."""
        return torch.randn(batch, tokens, count, dim, device=device).bfloat16().transpose(1, 2)

    def make():
        inputs = [random(heads).requires_grad_(), random(kv_heads).requires_grad_(), cos, sin]
        return inputs, [random(heads), random(kv_heads)] if backward else []

    functions = {OURS: pf.ops.rope}
    llama, why = peers.llama()
    if llama is not None:
        functions[_PEER] = llama.apply_rotary_pos_emb
    return elementwise.build(device, make, functions, _plain, {} if llama is not None else {_PEER: why})


def _case(batch, tokens, heads, kv_heads, dim, *, backward=True) -> Case:
    return Case(
        "rope",
        f"RoPE {batch}x{tokens}, {heads}/{kv_heads} heads, d {dim} bf16, {'fwd+bwd' if backward else 'forward'}",
        functools.partial(
            _build, batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, dim=dim, backward=backward
        ),
        bytes=2.0 * (4 if backward else 2) * batch * tokens * (heads + kv_heads) * dim,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller."""
    if quick:
        return [_case(2, 16, 4, 2, 64), _case(1, 1, 4, 2, 64, backward=False)]
    return [_case(2, 512, 32, 8, 128), _case(4, 256, 9, 3, 64), _case(1, 1, 32, 8, 128, backward=False)]

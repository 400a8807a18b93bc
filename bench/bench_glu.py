"""Cases of the op `glu`: SwiGLU and GEGLU, against torch's activation and product."""

from __future__ import annotations

import functools

import torch

import pyfinetune as pf
from pyfinetune.bench import elementwise, fused_peers
from pyfinetune.bench.harness import OURS, Case, Setup, Target
from pyfinetune.bench.peer_names import COMPILED, EAGER
from pyfinetune.bench.shapes import Sizes, short


def _plain(gate, up, approximate):
    """What Hugging Face's MLPs do; silu where `approximate` is None."""
    if approximate is None:
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def _ours(gate, up, approximate):
    return pf.ops.swiglu(gate, up) if approximate is None else pf.ops.geglu(gate, up, approximate)


def _build(
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
    approximate: str | None,
    fused: bool,
    backward: bool,
) -> Setup:
    rows, cols = shape

    def make():
        if fused:
            both = torch.randn(rows, 2 * cols, device=device).to(dtype)
            inputs = [half.detach().requires_grad_() for half in both.chunk(2, dim=-1)]
        else:
            inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)]
        return inputs, [torch.randn(shape, device=device).to(dtype)] if backward else []

    plain = functools.partial(_plain, approximate=approximate)
    unit = {None: "swiglu", "tanh": "geglu"}.get(approximate, "")
    others, missing = fused_peers.functions(unit if backward else f"{unit} forward", device)
    functions = {
        OURS: functools.partial(_ours, approximate=approximate),
        EAGER: plain,
        COMPILED: fused_peers.compiled(plain),
    }
    return elementwise.build(device, make, functions | others, plain, missing)


def _case(shape, approximate=None, *, dtype=torch.bfloat16, fused=False, backward=True, **more) -> Case:
    unit = "SwiGLU" if approximate is None else f"GEGLU ({approximate})"
    name = f"{unit} {shape[0]}x{shape[1]} {short(dtype)}{', fused gate and up' if fused else ''}"
    return Case(
        "glu",
        f"{name}, {'fwd+bwd' if backward else 'forward'}",
        functools.partial(_build, shape=shape, dtype=dtype, approximate=approximate, fused=fused, backward=backward),
        dtype=dtype,
        bytes=float(dtype.itemsize) * (8 if backward else 3) * shape[0] * shape[1],  # 3 tensors forward, 5 backward
        **more,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    shape = (64, 1024) if quick else (1024, 8192)
    return [
        _case(shape, targets={} if quick else {EAGER: Target(2.2, 2.2)}, compiled=True),
        _case(shape, None, fused=True),
        _case(shape, "tanh"),
        _case(shape, "none"),
        _case((1, shape[1]), None, backward=False),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's feed-forward block, or of M rows of N gates."""
    cols = sizes.model.inner if sizes.model else sizes.out
    return [_case((sizes.tokens, cols), dtype=dtype), _case((1, cols), dtype=dtype, backward=False)]

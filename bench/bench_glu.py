"""Cases of the op `glu`: SwiGLU and GEGLU, against torch's activation and product."""

from __future__ import annotations

import functools

import torch

import pyfinetune as pf
from pyfinetune.bench import elementwise
from pyfinetune.bench.harness import OURS, Case, Setup, Target


def _plain(gate, up, approximate):
    """What Hugging Face's MLPs do; silu where `approximate` is None."""
    if approximate is None:
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def _ours(gate, up, approximate):
    return pf.ops.swiglu(gate, up) if approximate is None else pf.ops.geglu(gate, up, approximate)


def _build(device: torch.device, shape: tuple[int, int], approximate: str | None, fused: bool, backward: bool) -> Setup:
    rows, cols = shape

    def make():
        if fused:
            both = torch.randn(rows, 2 * cols, device=device).bfloat16()
            inputs = [half.detach().requires_grad_() for half in both.chunk(2, dim=-1)]
        else:
            inputs = [torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(2)]
        return inputs, [torch.randn(shape, device=device).bfloat16()] if backward else []

    plain = functools.partial(_plain, approximate=approximate)
    functions = {OURS: functools.partial(_ours, approximate=approximate), "eager": plain}
    return elementwise.build(device, make, functions, plain, {})


def _case(shape, approximate=None, target=None, *, fused=False, backward=True) -> Case:
    unit = "SwiGLU" if approximate is None else f"GEGLU ({approximate})"
    name = f"{unit} {shape[0]}x{shape[1]} bf16{', fused gate and up' if fused else ''}"
    return Case(
        "glu",
        f"{name}, {'fwd+bwd' if backward else 'forward'}",
        functools.partial(_build, shape=shape, approximate=approximate, fused=fused, backward=backward),
        bytes=2.0 * (8 if backward else 3) * shape[0] * shape[1],  # 3 tensors forward, 5 backward
        target=target,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    shape = (64, 1024) if quick else (1024, 8192)
    return [
        _case(shape, None, None if quick else Target(2.2, 2.2)),
        _case(shape, None, fused=True),
        _case(shape, "tanh"),
        _case(shape, "none"),
        _case((1, shape[1]), None, backward=False),
    ]

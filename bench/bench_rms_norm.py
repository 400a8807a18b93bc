"""Cases of the op `rms_norm`, against Hugging Face's module."""

from __future__ import annotations

import functools
import math

import torch

import pyfinetune as pf
from pyfinetune.bench import elementwise, fused_peers, peers
from pyfinetune.bench.harness import OURS, Case, Setup, Target
from pyfinetune.bench.peer_names import COMPILED, HUGGING_FACE
from pyfinetune.bench.shapes import Sizes, short

_EPS = 1e-6


def _plain(x, weight, residual=None):
    x = x if residual is None else x + residual
    wide = x if x.dtype == torch.float64 else x.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(x.dtype)
    return y if residual is None else (y, x)


def _build(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, trained: bool, residual: bool, backward: bool
) -> Setup:
    weight = torch.nn.Parameter((1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype), requires_grad=trained)

    def random():
        return torch.randn(shape, device=device).to(dtype)

    def make():
        inputs = [random().requires_grad_(), weight] + ([random().requires_grad_()] if residual else [])
        return inputs, [random() for _ in range(1 + residual)] if backward else []

    functions = {OURS: lambda x, weight, residual=None: pf.ops.rms_norm(x, weight, _EPS, residual=residual)}
    llama, why = peers.llama()
    missing = {HUGGING_FACE: why} if llama is None else {}
    if llama is not None:
        norm = llama.LlamaRMSNorm(shape[-1], _EPS)
        norm.weight = weight

        def module(x, weight, residual=None):
            if residual is None:
                return norm(x)
            total = x + residual
            return norm(total), total

        functions[HUGGING_FACE] = module
    functions[COMPILED] = fused_peers.compiled(_plain)
    if not residual:
        others, absent = fused_peers.functions("rms_norm", device, eps=_EPS)
        functions, missing = functions | others, missing | absent
    return elementwise.build(device, make, functions, _plain, missing)


def _case(
    shape,
    *,
    dtype=torch.bfloat16,
    trained=False,
    residual=False,
    backward=True,
    note="",
    **more,
) -> Case:
    # Forward reads x and writes y; backward reads x and dout and writes dx. A residual is read and its sum written,
    # and the sum's gradient is read.
    passes = (2 + 2 * residual) + (3 + residual) * backward
    name = f"RMSNorm {'x'.join(map(str, shape))} {short(dtype)}{note}, {'fwd+bwd' if backward else 'forward'}"
    return Case(
        "rms_norm",
        name,
        functools.partial(_build, shape=shape, dtype=dtype, trained=trained, residual=residual, backward=backward),
        dtype=dtype,
        bytes=float(dtype.itemsize * passes * math.prod(shape)),
        **more,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    shape, heads = ((64, 512), (1, 32, 4, 64)) if quick else ((1024, 4096), (2, 512, 32, 128))
    return [
        _case(shape, targets={} if quick else {HUGGING_FACE: Target(8.0, 8.0)}, compiled=True),
        _case(shape, trained=True, note=", weight trained"),
        _case(shape, residual=True, note=", with residual"),
        _case(heads, note=", heads"),
        _case((1, shape[1]), backward=False),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's norms, or of M rows of K."""
    width = sizes.model.hidden if sizes.model else sizes.inner
    return [
        _case((sizes.tokens, width), dtype=dtype),
        _case((sizes.tokens, width), dtype=dtype, residual=True, note=", with residual"),
        _case((1, width), dtype=dtype, backward=False),
    ]

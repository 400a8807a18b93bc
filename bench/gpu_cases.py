"""The rows of the GPU table, in groups that are measured one after the other, each in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import pyfinetune as pf
from pyfinetune.bench import bench_linear_cross_entropy, bench_lora_linear, bench_step, elementwise, gpu_nf4
from pyfinetune.bench.bench_glu import _plain as plain_glu
from pyfinetune.bench.bench_rms_norm import _plain as plain_norm
from pyfinetune.bench.bench_rope import _plain as plain_rope
from pyfinetune.bench.checks import close_to_exact
from pyfinetune.bench.gpu_attention import attention_cases, flex_case
from pyfinetune.bench.gpu_nf4 import LIBRARY
from pyfinetune.bench.gpu_step import CappedStep, capped_cases, step_cases
from pyfinetune.bench.gpu_timing import GpuCase
from pyfinetune.bench.harness import OURS, Setup

_BLOCK, _RANK, _EPS = 64, 16, 1e-6
LIGER = "Liger"
_LIGER = "liger_kernel.ops."


def _liger(module: str, function: str) -> tuple[Callable | None, str]:
    """A function of Liger's ops, or None and the reason."""
    try:
        return getattr(importlib.import_module(_LIGER + module), function).apply, ""
    except (ImportError, AttributeError) as error:
        return None, f"not installed ({error})"


# --- norms, gates, rotary embedding


def _rows_case(op: str, name: str, make, ours: Callable, plain: Callable, liger, passes: float) -> GpuCase:
    """A memory-bound case: ours, eager torch, and Liger last, as its backward writes over its inputs."""

    def build(device: torch.device) -> Setup:
        functions, missing = {OURS: ours, "eager": plain}, {}
        function, why = _liger(*liger)
        if function is None:
            missing[LIGER] = why
        else:
            functions[LIGER] = build_liger[op](function)
        return elementwise.build(device, functools.partial(make, device), functions, plain, missing)

    return GpuCase(op, name, build, bytes=passes, goal="≥ 85 % of copy rate")


build_liger: Mapping[str, Callable[[Callable], Callable]] = {
    "rms_norm": lambda apply: lambda x, weight: apply(x, weight, _EPS, 0.0, "llama", False),
    "glu": lambda apply: apply,
    "rope": lambda apply: apply,
}


def _rows(quick: bool) -> list[GpuCase]:
    tokens, width, inner = (16, 128, 256) if quick else (8192, 4096, 14336)
    heads, kv_heads, dim = (4, 2, 64) if quick else (32, 8, 128)

    def random(device, *shape):
        return torch.randn(*shape, device=device).bfloat16()

    def norm(device):
        weight = (1 + 0.1 * torch.randn(width, device=device)).bfloat16()
        return [random(device, tokens, width).requires_grad_(), weight], [random(device, tokens, width)]

    def gate(device):
        return [random(device, tokens, inner).requires_grad_() for _ in range(2)], [random(device, tokens, inner)]

    def rotary(device):
        angles = torch.outer(torch.arange(tokens), 10000 ** -(torch.arange(dim // 2) / (dim // 2))).repeat(1, 2)[None]
        tables = [table.to(device).bfloat16() for table in (angles.cos(), angles.sin())]
        q, k, dq, dk = (random(device, 1, tokens, n, dim).transpose(1, 2) for n in (heads, kv_heads) * 2)
        return [q.requires_grad_(), k.requires_grad_(), *tables], [dq, dk]

    def swiglu(gate, up):
        return F.silu(gate) * up if gate.dtype != torch.float64 else plain_glu(gate, up, None)

    return [
        _rows_case(
            "rms_norm",
            f"RMSNorm {tokens}x{width} bf16, fwd+bwd",
            norm,
            lambda x, weight: pf.ops.rms_norm(x, weight, _EPS),
            plain_norm,
            ("rms_norm", "LigerRMSNormFunction"),
            10.0 * tokens * width,
        ),
        _rows_case(
            "glu",
            f"SwiGLU {tokens}x{inner} bf16, fwd+bwd",
            gate,
            pf.ops.swiglu,
            swiglu,
            ("swiglu", "LigerSiLUMulFunction"),
            16.0 * tokens * inner,
        ),
        _rows_case(
            "rope",
            f"RoPE {tokens} tokens, {heads}/{kv_heads} heads, d {dim} bf16, fwd+bwd",
            rotary,
            pf.ops.rope,
            plain_rope,
            ("rope", "LigerRopeFunction"),
            8.0 * tokens * (heads + kv_heads) * dim,
        ),
    ]


# --- layers with adapters


class _LibraryLinear(torch.autograd.Function):
    """The plain way with a 4-bit weight: decode all of it, one product by the library, two thin ones added to it."""

    @staticmethod
    def forward(ctx, x, packed, lora_a, lora_b, scaling):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        y = x @ pf.ops.dequantize_4bit(packed).T
        thin = x @ a.T
        y.addmm_(thin, b.T, alpha=scaling)
        ctx.save_for_backward(x, a, b, thin)
        ctx.packed, ctx.scaling = packed, scaling
        return y

    @staticmethod
    def backward(ctx, dout):
        x, a, b, thin = ctx.saved_tensors
        d_thin = dout @ b
        dx = dout @ pf.ops.dequantize_4bit(ctx.packed)
        dx.addmm_(d_thin, a, alpha=ctx.scaling)
        d_a, d_b = (d_thin.T @ x).mul_(ctx.scaling), (dout.T @ thin).mul_(ctx.scaling)
        return dx, None, d_a.float(), d_b.float(), None


def _build_qlora(device: torch.device, rows: int, size: int, four_bit: bool, dropout: float, dora: bool) -> Setup:
    """`bench_lora_linear`'s case, and for QLoRA the library's products on a decoded weight."""
    setup = bench_lora_linear.build_adapter(device, rows, size, four_bit, dropout, dora)
    if not four_bit or dora or dropout:
        return setup
    x, a, b, dout, weight = setup.inputs[:5]
    packed, scaling = pf.ops.quantize_4bit(weight), bench_lora_linear.SCALING
    dense = pf.ops.dequantize_4bit(packed)

    def forward():
        with torch.enable_grad():
            return _LibraryLinear.apply(x, packed, a, b, scaling)

    def call(i):
        return torch.autograd.grad(forward(), [x, a, b], dout)

    def plain(dtype):
        with torch.enable_grad():
            leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (x, a, b)]
            y = leaves[0] @ dense.to(dtype).T + scaling * (leaves[0] @ leaves[1].T) @ leaves[2].T
            return [y.detach(), *torch.autograd.grad(y, leaves, dout.to(dtype))]

    def check():
        y = forward()
        got = [y.detach(), *torch.autograd.grad(y, [x, a, b], dout)]
        # A peer only has to compute the same.
        return close_to_exact(got, plain(torch.float64), plain(x.dtype), ["y", "dx", "d_a", "d_b"], [4.0] * 4)

    setup.calls[LIBRARY], setup.check[LIBRARY], setup.forward[LIBRARY] = call, check, forward
    return setup


def _build_mlp(device: torch.device, rows: int, width: int, inner: int) -> Setup:
    """A gated feed-forward block in 4 bits with adapters: gate and up as a group, SwiGLU, down."""
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    packed = {
        name: pf.ops.quantize_4bit(torch.randn(*shape, device=device).mul_(shape[1] ** -0.5).bfloat16())
        for name, shape in shapes.items()
    }
    x, dout = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
    leaves = [x.requires_grad_()]
    for out, cols in shapes.values():
        leaves.append(torch.randn(_RANK, cols, device=device).mul_(cols**-0.5).requires_grad_())
        leaves.append(torch.randn(out, _RANK, device=device).mul_(0.02).requires_grad_())

    def ours(x, gate_a, gate_b, up_a, up_b, down_a, down_b):
        weights, a, b = [packed["gate"], packed["up"]], [gate_a, up_a], [gate_b, up_b]
        gate, up = pf.ops.lora_linear_group(x, weights, a, b, [2.0, 2.0])
        return pf.ops.lora_linear(pf.ops.swiglu(gate, up), packed["down"], down_a, down_b, 2.0)

    def library(x, gate_a, gate_b, up_a, up_b, down_a, down_b):
        gate = _LibraryLinear.apply(x, packed["gate"], gate_a, gate_b, 2.0)
        up = _LibraryLinear.apply(x, packed["up"], up_a, up_b, 2.0)
        return _LibraryLinear.apply(F.silu(gate) * up, packed["down"], down_a, down_b, 2.0)

    def plain(x, *adapters):
        def layer(name, x, a, b):
            return x @ pf.ops.dequantize_4bit(packed[name]).to(x.dtype).T + 2.0 * (x @ a.T) @ b.T

        hidden = F.silu(layer("gate", x, *adapters[:2])) * layer("up", x, *adapters[2:4])
        return layer("down", hidden, *adapters[4:])

    def results(function, dtype=None):
        with torch.enable_grad():
            copies = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
            y = function(*copies)
            return [y.detach(), *torch.autograd.grad(y, copies, dout.to(y.dtype))]

    @functools.cache
    def expected():
        return results(plain, torch.float64), results(plain, torch.bfloat16)

    def check(name):
        names = ["y", "dx", *(f"d_{layer}_{which}" for layer in shapes for which in "ab")]
        factors = [1.5, *[2.0] * 7] if name == OURS else [4.0] * 8
        exact, eager = expected()
        return close_to_exact(results(functions[name]), exact, eager, names, factors)

    def forward(function):
        with torch.enable_grad():
            return function(*leaves)

    functions = {OURS: ours, LIBRARY: library}
    return Setup(
        {name: lambda i, f=f: torch.autograd.grad(forward(f), leaves, dout) for name, f in functions.items()},
        {name: functools.partial(check, name) for name in functions},
        inputs=[*leaves, dout],
        forward={name: functools.partial(forward, f) for name, f in functions.items()},
    )


def _lora(quick: bool) -> list[GpuCase]:
    rows, size, inner = (32, 128, 256) if quick else (4096, 4096, 14336)
    few = (1, 16) if quick else (1, 16, 64, 256)
    goals = {
        "QLoRA": "forward ≥ 1.07x, backward ≥ 1.15x decode + cuBLAS; ≥ 1.6x PEFT",
        "DoRA": "≤ 1.05x our LoRA time",
        "QDoRA": "≤ 1.05x our QLoRA time",
    }

    def adapter(method: str, dropout: float = 0.0) -> GpuCase:
        case = bench_lora_linear._adapter(method, rows, size, None, dropout)
        keywords = case.build.keywords
        return _as_gpu(case, functools.partial(_build_qlora, **keywords), goals.get(method, ""))

    def mlp(rows: int, goal: str) -> GpuCase:
        weights = 3 * size * inner
        return GpuCase(
            "lora_linear",
            f"QLoRA SwiGLU block {size} → {inner}, M {rows}, r {_RANK}, fwd+bwd",
            functools.partial(_build_mlp, rows=rows, width=size, inner=inner),
            flops=4.0 * rows * weights,
            bytes=2 * weights * 0.5625 + 4.0 * rows * (2 * size + 6 * inner),
            goal=goal,
        )

    small = [bench_lora_linear._forward(m, size, None) for m in few]
    return [
        adapter("QLoRA"),
        mlp(rows, "≥ 1.12x"),
        mlp(max(rows // 8, 1), "≥ 1.5x"),
        adapter("LoRA"),
        adapter("LoRA", 0.1),
        adapter("DoRA"),
        adapter("QDoRA"),
        *(_as_gpu(case, case.build, "≥ 1.0x bitsandbytes") for case in small),
    ]


def _as_gpu(case, build, goal: str) -> GpuCase:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return GpuCase(**fields | {"build": build}, goal=goal)


# --- the head and its loss


def _chunked(hidden, weight, labels, reduction="mean"):
    """As TRL's trainers did it before: 256 tokens at a time, in float32, made again for the backward pass."""

    def part(hidden, labels):
        logits = hidden.float() @ weight.float().T
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")

    if hidden.dtype == torch.float64:
        return bench_linear_cross_entropy._eager(hidden, weight, labels, reduction)
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    parts = [checkpoint(part, h, y) for h, y in zip(hidden.split(256), labels.split(256), strict=True)]
    losses = torch.cat(parts)
    return losses if reduction == "none" else losses.sum() / (labels != -100).sum()


def _head_peers() -> dict[str, Callable]:
    found = {"chunks of 256 in float32": _chunked}
    function, _why = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if function is not None:

        def liger(hidden, weight, labels, reduction="mean"):
            options = (None, None, -100, 0.0, 0.0, reduction)  # bias, class weights, ..., smoothing
            result = function(hidden, weight, labels, *options)
            return result[0] if isinstance(result, tuple) else result

        found[LIGER] = liger
    return found


def _build_head(device: torch.device, sizes: tuple[int, int, int], ignored: float) -> Setup:
    found = _head_peers()
    setup = bench_linear_cross_entropy.build(device, sizes, torch.bfloat16, ignored, False, found)
    if LIGER not in found:
        setup.missing[LIGER] = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")[1]
    return setup


def _head(quick: bool) -> list[GpuCase]:
    sizes = (64, 64, 1000) if quick else (4096, 4096, 128256)
    tokens, width, vocab = sizes
    cases = []
    for ignored in (0.0, 0.6):
        kept = tokens - int(tokens * ignored)
        cases.append(
            GpuCase(
                "linear_cross_entropy",
                f"head and loss, M {tokens}, H {width}, V {vocab}, bf16, frozen" + (", 60 % ignored" * bool(ignored)),
                functools.partial(_build_head, sizes=sizes, ignored=ignored),
                flops=4.0 * kept * width * vocab,
                bytes=2.0 * vocab * width,
                goal="≥ 2x Liger, ≥ 4x chunks in float32",
            )
        )
    return cases


# --- a step of two layers, whose gradients are held against exact ones


def _step(quick: bool) -> list[GpuCase]:
    shapes = bench_step._QUICK
    documents, length = 2, 32
    if not quick:
        # Two layers of an 8B-parameter Llama, and its head: what a step takes grows by the layer.
        shapes = {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        documents, length = 2, 2048
    case = bench_step._case(documents, length, None, shapes)
    layers = shapes["num_hidden_layers"]
    name = f"training step, {layers} layers of width {shapes['hidden_size']}, LoRA, {documents}x{length} tokens packed"
    return [dataclasses.replace(_as_gpu(case, case.build, "≥ 2x, ≥ 80 % of roofline"), name=name)]


# --- peers that torch compiles first, which takes its time


def _build_compiled_norm(device: torch.device, tokens: int, width: int) -> Setup:
    def make():
        x, dout = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
        return [x.requires_grad_(), torch.randn(width, device=device).bfloat16()], [dout]

    compiled = torch.compile(plain_norm) if device.type == "cuda" else plain_norm
    functions = {OURS: lambda x, weight: pf.ops.rms_norm(x, weight, _EPS), "torch.compile": compiled}
    return elementwise.build(device, make, functions, plain_norm, {})


def _compiled(quick: bool) -> list[GpuCase]:
    tokens, width = (16, 128) if quick else (8192, 4096)
    norm = functools.partial(_build_compiled_norm, tokens=tokens, width=width)
    name = f"RMSNorm {tokens}x{width} bf16, fwd+bwd, beside torch.compile"
    return [flex_case(quick), GpuCase("rms_norm", name, norm, bytes=10.0 * tokens * width)]


@dataclass(frozen=True)
class Group:
    """Cases that one process measures.

    Args:
        cases: makes them; tiny ones when its argument is true.
        budget: seconds that the process may take on a GPU.
        timed: whether it times anything, and so needs the GPU to itself and the machine's rates; the others run side
            by side.
    """

    cases: Callable[[bool], list[GpuCase] | list[CappedStep]]
    budget: int
    timed: bool = True


def _capped(size: str, gibibytes: int) -> Group:
    return Group(functools.partial(capped_cases, size=size, gibibytes=gibibytes), 45, timed=False)


# The most telling ones first: time may run out.
GROUPS: dict[str, Group] = {
    "nf4": Group(gpu_nf4.cases, 40),
    "lora_linear": Group(_lora, 45),
    "varlen_attn": Group(attention_cases, 35),
    "linear_cross_entropy": Group(_head, 30),
    "whole step": Group(step_cases, 55),
    "8 GiB": _capped("3B", 8),
    "12 GiB": _capped("8B", 12),
    "16 GiB": _capped("8B", 16),
    "24 GiB": _capped("8B", 24),
    "rows": Group(_rows, 20),
    "step": Group(_step, 25),
    "compiled": Group(_compiled, 30),
}

"""One call of every public op, small, in a shape that is nothing special, and in one that passes 2^31 elements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

import pyfinetune as pf


def upstream(y: torch.Tensor) -> torch.Tensor:
    """A gradient that is the same for each row, and exact in every dtype."""
    return (torch.arange(y.shape[-1], device=y.device) % 7 - 2).mul(0.25).to(y.dtype).expand_as(y).contiguous()


@dataclasses.dataclass
class Call:
    """Inputs of an op and the function of them.

    Args:
        function: of the tensors; returns the results as a tuple.
        tensors: inputs; those that require grad are what gradients are taken of.
        last: the same call on the last rows alone: its tensors, made of `tensors`, and how the results and gradients
            that belong to them are cut out of all.
    """

    function: Callable[..., tuple[torch.Tensor, ...]]
    tensors: list[torch.Tensor]
    last: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None

    def run(self, tensors: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Results, and gradients of the inputs that require grad."""
        given = self.tensors if tensors is None else list(tensors)
        tensors = [t.detach().requires_grad_(like.requires_grad) for t, like in zip(given, self.tensors, strict=True)]
        results = self.function(*tensors)
        leaves = [t for t in tensors if t.requires_grad]
        if not leaves:
            return list(results)
        grads = torch.autograd.grad(results, leaves, [upstream(y) for y in results])
        return [*(y.detach() for y in results), *grads]


class Maker:
    """Makes random tensors on a device in a dtype, and the calls of them."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def random(self, *shape: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device).mul_(scale).requires_grad_(grad)

    def packed(self, out: int, inner: int, double_quant: bool = True) -> pf.ops.Packed4bit:
        with pf.use_backend("reference"):
            return pf.ops.quantize_4bit(self.random(out, inner), double_quant=double_quant)

    def dequantize_4bit(self, rows: int = 37, cols: int = 130) -> Call:
        packed = self.packed(rows, cols)
        tensors = list(packed.tensors())

        def function(*tensors):
            fields = [f.name for f in dataclasses.fields(packed)][: len(tensors)]
            return (pf.ops.dequantize_4bit(dataclasses.replace(packed, **dict(zip(fields, tensors, strict=True)))),)

        return Call(function, tensors)

    def rms_norm(self, rows: int = 37, cols: int = 321) -> Call:
        x, residual = self.random(rows, cols, grad=True), self.random(rows, cols, grad=True)
        weight = self.random(cols, grad=True)

        def function(x, residual, weight):
            return pf.ops.rms_norm(x, weight, residual=residual)

        return Call(function, [x, residual, weight], lambda t: [t[0][-5:], t[1][-5:], t[2]])

    def rope(self, tokens: int = 37, heads: int = 3, dim: int = 64) -> Call:
        q, k = self.random(1, heads, tokens, dim, grad=True), self.random(1, 1, tokens, dim, grad=True)
        cos, sin = self.random(1, tokens, dim), self.random(1, tokens, dim)
        return Call(pf.ops.rope, [q, k, cos, sin], lambda t: [x[..., -5:, :] for x in t])

    def swiglu(self, rows: int = 37, cols: int = 321) -> Call:
        tensors = [self.random(rows, cols, grad=True), self.random(rows, cols, grad=True)]
        return Call(lambda gate, up: (pf.ops.swiglu(gate, up),), tensors, lambda t: [x[-5:] for x in t])

    def geglu(self, rows: int = 37, cols: int = 321) -> Call:
        tensors = [self.random(rows, cols, grad=True), self.random(rows, cols, grad=True)]
        return Call(lambda gate, up: (pf.ops.geglu(gate, up),), tensors, lambda t: [x[-5:] for x in t])

    def varlen_attn(self, lengths: Sequence[int] = (19, 0, 1, 45), heads: int = 4, kv_heads: int = 2, dim: int = 64):
        total = sum(lengths)
        q = self.random(total, heads, dim, grad=True)
        k, v = (self.random(total, kv_heads, dim, grad=True) for _ in range(2))
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype=torch.int32, device=self.device)

        def function(q, k, v, bounds):
            return (pf.ops.varlen_attn(q, k, v, bounds),)

        def last(t):
            start = total - lengths[-1]
            return [*(x[start:] for x in t[:3]), t[3][-2:] - t[3][-2]]

        return Call(function, [q, k, v, bounds], last)

    def lora_linear(self, rows: int = 37, inner: int = 128, out: int = 96, rank: int = 8) -> Call:
        packed = self.packed(out, inner)
        x = self.random(rows, inner, grad=True)
        lora_a = self.random(rank, inner, scale=inner**-0.5, grad=True)
        lora_b = self.random(out, rank, grad=True)
        seed = torch.tensor(7, device=self.device)

        def function(x, lora_a, lora_b, seed):
            return (pf.ops.lora_linear(x, packed, lora_a, lora_b, 2.0, dropout_p=0.1, seed=seed),)

        return Call(function, [x, lora_a, lora_b, seed])

    def lora_linear_group(self, rows: int = 37, inner: int = 128, rank: int = 8) -> Call:
        widths = (96, 32)
        weights = [self.packed(out, inner) for out in widths]
        x = self.random(rows, inner, grad=True)
        adapters = [self.random(rank, inner, scale=inner**-0.5, grad=True) for _ in widths]
        adapters += [self.random(out, rank, grad=True) for out in widths]

        def function(x, *adapters):
            return tuple(pf.ops.lora_linear_group(x, weights, adapters[:2], adapters[2:], [2.0, 1.0]))

        return Call(function, [x, *adapters])

    def linear_cross_entropy(self, tokens: int = 37, width: int = 64, vocab: int = 301) -> Call:
        hidden = self.random(tokens, width, grad=True)
        weight = self.random(vocab, width, scale=width**-0.5, grad=True)
        labels = torch.randint(vocab, (tokens,), device=self.device)
        labels[::3] = -100

        def function(hidden, weight, labels):
            return (pf.ops.linear_cross_entropy(hidden, weight, labels, reduction="none"),)

        return Call(function, [hidden, weight, labels])


CALLS = [name for name in vars(Maker) if not name.startswith("_") and name not in ("random", "packed")]


LARGE = ["rms_norm", "swiglu", "geglu", "rope", "varlen_attn"]


def large(name: str, device: str, dtype: torch.dtype, numel: int) -> Call:
    """One of the calls `LARGE` with its largest tensors just past `numel` elements."""
    make = Maker(device, dtype)
    if name == "rope":
        return make.rope(math.ceil(numel / (8 * 128)) + 3, 8, 128)
    if name == "varlen_attn":
        heads, kv_heads, dim, length = (32, 8, 128, 256) if numel > 2**20 else (4, 2, 64, 16)
        return make.varlen_attn([length] * (numel // (length * heads * dim) + 1), heads, kv_heads, dim)
    cols = 4096 if numel > 2**20 else 256
    return getattr(make, name)(math.ceil(numel / cols) + 3, cols)

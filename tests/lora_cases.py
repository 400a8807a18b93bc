"""Calls of the op lora_linear, with the same call in float64 and as torch's eager code makes it."""

from __future__ import annotations

import dataclasses

import torch

import pyfinetune as pf
from pyfinetune.ops._philox import dropout


@dataclasses.dataclass
class Case:
    """Inputs of one call; leaves that require grad are in `inputs`."""

    x: torch.Tensor
    weight: torch.Tensor
    packed: pf.Packed4bit | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    dropout_p: float = 0.0
    scaling: float = 0.7
    seed: int = 1234

    def inputs(self):
        leaves = (self.x, None if self.packed else self.weight, self.lora_a, self.lora_b, self.bias, self.magnitude)
        return [t for t in leaves if t is not None]

    def args(self):
        base = self.weight if self.packed is None else self.packed
        adapter = (self.lora_a, self.lora_b, self.scaling)
        return (self.x, base, *adapter, self.bias, self.dropout_p, self.seed, self.magnitude)

    def forward(self):
        return pf.ops.lora_linear(*self.args())

    def run(self):
        """(y, gradients) through pf.ops."""
        y = self.forward()
        return [y, *torch.autograd.grad(y, self.inputs(), upstream(y, self.x.dtype))]

    def exact(self):
        """(y, gradients) by the reference in float64; a packed weight's own gradient is left out."""
        case = self.cast(torch.float64)
        with pf.use_backend("reference"):
            y = case.forward()
        return self.without_packed([y, *torch.autograd.grad(y, case.inputs(), upstream(y, self.x.dtype))])

    def without_packed(self, results):
        return results if self.packed is None else results[:2] + results[3:]

    def cast(self, dtype):
        """The same call with dense leaves of another dtype."""

        def leaf(t):
            return None if t is None else t.detach().to(dtype).requires_grad_()

        parts = [leaf(t) for t in (self.lora_a, self.lora_b, self.bias, self.magnitude)]
        return dataclasses.replace(
            self,
            x=leaf(self.x),
            weight=self.weight.detach().to(dtype).requires_grad_(),
            packed=None,
            lora_a=parts[0],
            lora_b=parts[1],
            bias=parts[2],
            magnitude=parts[3],
        )


def upstream(y, dtype):
    """The same random gradient, representable in `dtype`, for every run of a case."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    return torch.randn(y.shape, generator=generator).to(dtype).to(y.dtype)


def make(rows, out, inner, rank, *, dtype, packed, bias=False, dora=False, dropout_p=0.0, adapter_dtype=None):
    weight = (torch.randn(out, inner) * inner**-0.5).to(dtype)
    quantized = pf.ops.quantize_4bit(weight, double_quant=True) if packed else None
    if packed:
        weight = pf.ops.dequantize_4bit(quantized)

    def leaf(*shape, scale=1.0, dtype=adapter_dtype or dtype):
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    return Case(
        x=leaf(rows, inner, dtype=dtype),
        weight=weight.requires_grad_(not packed),
        packed=quantized,
        lora_a=leaf(rank, inner, scale=inner**-0.5) if rank else None,
        lora_b=leaf(out, rank, scale=0.3) if rank else None,
        bias=leaf(out, dtype=dtype) if bias else None,
        magnitude=(weight.detach().float().norm(dim=1) * 1.1).to(adapter_dtype or dtype).requires_grad_()
        if dora
        else None,
        dropout_p=dropout_p,
    )


def eager(case: Case):
    """What PEFT computes under autocast, in plain torch: adapters in x's dtype, each product rounded to it."""
    x, weight = case.x, case.weight
    y = torch.nn.functional.linear(x, weight)
    if case.lora_a is not None:
        a, b = case.lora_a.to(x.dtype), case.lora_b.to(x.dtype)
        dropped = x
        if case.dropout_p:
            keep = dropout(torch.ones(x.shape), case.dropout_p, torch.tensor(case.seed)).to(x.dtype)
            dropped = x * keep
        update = torch.nn.functional.linear(torch.nn.functional.linear(dropped, a), b) * case.scaling
        if case.magnitude is None:
            y = y + update
        else:
            with torch.no_grad():
                norm = torch.linalg.norm(weight + case.scaling * (b @ a), dim=1).to(weight.dtype)
            factor = (case.magnitude.to(x.dtype) / norm)[None]
            inner = torch.nn.functional.linear(dropped, weight) if case.dropout_p else y
            y = y + (factor - 1) * inner + factor * update
    if case.bias is not None:
        y = y + case.bias
    return [y, *torch.autograd.grad(y, case.inputs(), upstream(y, x.dtype))]

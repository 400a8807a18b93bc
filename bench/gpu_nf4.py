"""Rows of the GPU table for 4-bit weights: decode, encode, and the product for few to many rows of x.

Ours stands as it is chosen, and once for each backend that can be forced; peers are bitsandbytes, and decoding all of
the weight before the library's product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.ceilings import sets_beyond_cache
from pyfinetune.bench.checks import close_to_exact, same_bits
from pyfinetune.bench.gpu_timing import GpuCase
from pyfinetune.bench.harness import OURS, Setup

_BLOCK = 64
LIBRARY = "decode + cuBLAS"
_BACKENDS = ("cuda", "triton")
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_ROWS = (1, 4, 16, 64, 256, 1024)
_FORWARD = 1.5  # how much worse than torch's eager code in the same dtype a result may be; a peer may be 4 times


def _add_ours(setup: Setup, call: Callable[[int], object]) -> None:
    """The call as it is, and forced to each backend that takes it; why another does not is noted."""
    setup.calls[OURS] = call
    for backend in _BACKENDS:
        name = f"{OURS}, {backend}"

        def forced(i, backend=backend):
            with pf.use_backend(backend):
                return call(i)

        try:
            forced(0)
        except pf.BackendUnavailable as error:
            setup.missing[name] = str(error)
        else:
            setup.calls[name] = forced


def _weights(device: torch.device, rows: int, cols: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(rows, cols, device=device).mul_(cols**-0.5).bfloat16() for _ in range(count)]


def _bitsandbytes(setup: Setup):
    module, why = peers.find("bitsandbytes")
    if module is None:
        setup.missing["bitsandbytes"] = why
    return module


def _build_decode(device: torch.device, rows: int, cols: int, nested: bool) -> Setup:
    weights = _weights(device, rows, cols, sets_beyond_cache(rows * cols // 2, device))
    packed = [pf.ops.quantize_4bit(weight, _BLOCK, "nf4", nested) for weight in weights]
    with pf.use_backend("reference"):
        expected = pf.ops.dequantize_4bit(packed[0])
    setup = Setup({}, {})
    _add_ours(setup, lambda i: pf.ops.dequantize_4bit(packed[i % len(packed)]))
    bnb = _bitsandbytes(setup)
    if bnb is not None:
        encode = functools.partial(bnb.functional.quantize_4bit, blocksize=_BLOCK, quant_type="nf4")
        states = [encode(weight, compress_statistics=nested) for weight in weights]
        setup.calls["bitsandbytes"] = lambda i: bnb.functional.dequantize_4bit(*states[i % len(states)])
    setup.check |= {
        name: lambda call=call: same_bits([call(0)], [expected], ["weight"]) for name, call in setup.calls.items()
    }
    return setup


def _build_encode(device: torch.device, rows: int, cols: int, nested: bool) -> Setup:
    (weight,) = _weights(device, rows, cols, 1)
    with pf.use_backend("reference"):
        expected = pf.ops.quantize_4bit(weight, _BLOCK, "nf4", nested)
    setup = Setup({}, {})
    _add_ours(setup, lambda i: pf.ops.quantize_4bit(weight, _BLOCK, "nf4", nested))
    bnb = _bitsandbytes(setup)
    if bnb is not None:
        setup.calls["bitsandbytes"] = lambda i: bnb.functional.quantize_4bit(
            weight, blocksize=_BLOCK, quant_type="nf4", compress_statistics=nested
        )

    def check(call):
        made = call(0)
        if not isinstance(made, pf.Packed4bit):
            return same_bits([made[0]], [expected.codes], ["codes"])
        return same_bits([made.codes, made.absmax], [expected.codes, expected.absmax], ["codes", "absmax"])

    setup.check |= {name: functools.partial(check, call) for name, call in setup.calls.items()}
    return setup


def _judge(setup: Setup, exact: torch.Tensor, eager: torch.Tensor, name: str) -> None:
    def check(call, factor):
        return close_to_exact([call(0).detach()], [exact], [eager], [name], [factor])

    for who, call in setup.calls.items():
        factor = _FORWARD if who.startswith(OURS) else 4.0
        setup.check[who] = functools.partial(check, call, factor)


def _build_product(device: torch.device, tokens: int, rows: int, cols: int) -> Setup:
    """x W^T with a frozen weight of [rows, cols], no adapter: what a generated token costs."""
    weights = _weights(device, rows, cols, sets_beyond_cache(rows * cols // 2, device))
    packed = [pf.ops.quantize_4bit(weight, _BLOCK) for weight in weights]
    x = torch.randn(tokens, cols, device=device).bfloat16()
    setup = Setup({}, {})
    _add_ours(setup, lambda i: pf.ops.lora_linear(x, packed[i % len(packed)], None, None, 1.0))
    setup.calls[LIBRARY] = lambda i: x @ pf.ops.dequantize_4bit(packed[i % len(packed)]).T
    if _bitsandbytes(setup) is not None:
        layers = [peers.bnb_linear(weight) for weight in weights]
        setup.calls["bitsandbytes"] = lambda i: layers[i % len(layers)](x)
    dense = pf.ops.dequantize_4bit(packed[0])
    _judge(setup, x.double() @ dense.double().T, x @ dense.T, "y")
    return setup


def _build_dx(device: torch.device, tokens: int, rows: int, cols: int) -> Setup:
    """dY W: the gradient that goes on through a frozen weight, as autograd asks for it."""
    packed = [pf.ops.quantize_4bit(weight, _BLOCK) for weight in _weights(device, rows, cols, 2)]
    dout = torch.randn(tokens, rows, device=device).bfloat16()
    x = torch.randn(tokens, cols, device=device).bfloat16()
    setup = Setup({}, {})

    def ours(i):
        weight = packed[i % len(packed)]
        base = (*weight.tensors(), weight.block_size, weight.nested_block_size, rows)
        adapter, results = (None, None, 1.0, 0.0, None, None), (x.new_empty(0), x.new_empty(0), x.new_empty(0).float())
        needs = (True, False, False, False, False, False)
        return torch.ops.pyfinetune.lora_linear_bwd(dout, x, *base, *adapter, *results, *needs)[0]

    _add_ours(setup, ours)
    setup.calls[LIBRARY] = lambda i: dout @ pf.ops.dequantize_4bit(packed[i % len(packed)])
    dense = pf.ops.dequantize_4bit(packed[0])
    _judge(setup, dout.double() @ dense.double(), dout @ dense, "dx")
    return setup


def cases(quick: bool) -> list[GpuCase]:
    """The rows; small ones for a rehearsal."""
    shapes, tokens = ([(128, 256)], (1, 16)) if quick else (_SHAPES, _ROWS)
    found = []
    for rows, cols in shapes[:2]:
        size = rows * cols
        for nested in (True, False):
            total = 2.5 * size + size / _BLOCK * (1 + 1 / 64 if nested else 4)
            note = ", double-quantized" if nested else ""
            shape = {"rows": rows, "cols": cols, "nested": nested}
            decode, encode = functools.partial(_build_decode, **shape), functools.partial(_build_encode, **shape)
            goal = "≥ 1.8x bitsandbytes, ≥ 85 % of copy rate"
            found.append(GpuCase("nf4", f"decode NF4 {rows}x{cols}{note}", decode, bytes=total, goal=goal))
            found.append(GpuCase("nf4", f"encode NF4 {rows}x{cols}{note}", encode, bytes=total))
    for rows, cols in shapes:
        for m in tokens:
            work = {"flops": 2.0 * m * rows * cols, "bytes": rows * cols * 0.5625 + 2.0 * m * (rows + cols)}
            build = functools.partial(_build_product, tokens=m, rows=rows, cols=cols)
            goal = "≥ 1.0x bitsandbytes" if m <= 256 else ""
            found.append(GpuCase("lora_linear", f"NF4 {rows}x{cols}, x W^T, M {m}", build, **work, goal=goal))
    rows, cols = shapes[0]
    for m in tokens:
        work = {"flops": 2.0 * m * rows * cols, "bytes": rows * cols * 0.5625 + 2.0 * m * (rows + cols)}
        build = functools.partial(_build_dx, tokens=m, rows=rows, cols=cols)
        found.append(GpuCase("lora_linear", f"NF4 {rows}x{cols}, dY W, M {m}", build, **work))
    return found

"""Cases of the op `nf4`: decoding and encoding a weight, against bitsandbytes."""

from __future__ import annotations

import functools

import torch

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.ceilings import sets_beyond_cache
from pyfinetune.bench.checks import same_bits
from pyfinetune.bench.harness import OURS, Case, Setup, Target

_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
_BLOCK = 64


def packed_bytes(size: int, double_quant: bool = False) -> float:
    """Bytes of a [size, size] weight in 4 bits."""
    blocks = size * size / _BLOCK
    return size * size / 2 + (blocks + blocks / 64 if double_quant else 4 * blocks)


def _reference(function, *args, **kwargs):
    with pf.use_backend("reference"):
        return function(*args, **kwargs)


def _bnb_encoder(bnb, double_quant: bool):
    return functools.partial(
        bnb.functional.quantize_4bit, blocksize=_BLOCK, quant_type="nf4", compress_statistics=double_quant
    )


def _build_decode(device: torch.device, size: int, dtype: torch.dtype, double_quant: bool) -> Setup:
    count = sets_beyond_cache(int(packed_bytes(size, double_quant)), device)
    weights = [torch.randn(size, size, device=device).to(dtype) for _ in range(count)]
    packed = [pf.ops.quantize_4bit(weight, _BLOCK, "nf4", double_quant) for weight in weights]
    expected = _reference(pf.ops.dequantize_4bit, packed[0])
    calls = {OURS: lambda i: pf.ops.dequantize_4bit(packed[i % count])}
    bnb, why = peers.find("bitsandbytes")
    missing = {}
    if bnb is None:
        missing["bitsandbytes"] = why
    else:
        states = [_bnb_encoder(bnb, double_quant)(weight) for weight in weights]
        calls["bitsandbytes"] = lambda i: bnb.functional.dequantize_4bit(*states[i % count])
    check = {name: lambda call=call: same_bits([call(0)], [expected], ["weight"]) for name, call in calls.items()}
    return Setup(calls, check, missing)


def _build_encode(device: torch.device, size: int, dtype: torch.dtype, double_quant: bool) -> Setup:
    count = sets_beyond_cache(size * size * dtype.itemsize, device)
    weights = [torch.randn(size, size, device=device).to(dtype) for _ in range(count)]
    expected = _reference(pf.ops.quantize_4bit, weights[0], _BLOCK, "nf4", double_quant)
    calls = {OURS: lambda i: pf.ops.quantize_4bit(weights[i % count], _BLOCK, "nf4", double_quant)}

    def parts_of_ours(packed):
        return [packed.codes, packed.absmax] + ([packed.nested_absmax, packed.nested_offset] if double_quant else [])

    def parts_of_theirs(result):
        codes, state = result
        return [codes, state.absmax] + ([state.state2.absmax, state.offset] if double_quant else [])

    names = ["codes", "absmax", "nested_absmax", "nested_offset"][: 4 if double_quant else 2]
    check = {OURS: lambda: same_bits(parts_of_ours(calls[OURS](0)), parts_of_ours(expected), names)}
    bnb, why = peers.find("bitsandbytes")
    missing = {}
    if bnb is None:
        missing["bitsandbytes"] = why
    else:
        encode = _bnb_encoder(bnb, double_quant)
        calls["bitsandbytes"] = lambda i: encode(weights[i % count])
        check["bitsandbytes"] = lambda: same_bits(
            parts_of_theirs(calls["bitsandbytes"](0)), parts_of_ours(expected), names
        )
    return Setup(calls, check, missing)


def _decode(size: int, dtype: torch.dtype, double_quant: bool, target: Target | None, **more) -> Case:
    name = f"decode NF4 {size}² to {_SHORT[dtype]}" + (", double-quantized" if double_quant else "")
    if "isa" in more:
        more["versus"], name = name, f"{name}, {more['isa'].upper()} forced"
    return Case(
        "nf4",
        name,
        functools.partial(_build_decode, size=size, dtype=dtype, double_quant=double_quant),
        bytes=packed_bytes(size, double_quant) + size * size * dtype.itemsize,
        target=target,
        **more,
    )


def _encode(size: int, dtype: torch.dtype, double_quant: bool, target: Target | None) -> Case:
    return Case(
        "nf4",
        f"encode NF4 {size}² from {_SHORT[dtype]}" + (", double-quantized" if double_quant else ""),
        functools.partial(_build_encode, size=size, dtype=dtype, double_quant=double_quant),
        bytes=packed_bytes(size, double_quant) + size * size * dtype.itemsize,
        target=target,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    size = 512 if quick else 4096
    decode, encode, avx2 = (
        (None, None, None) if quick else (Target(4.0, 1.0), Target(50.0, 50.0), Target(1 / 1.5, 1 / 1.5))
    )
    return [
        _decode(size, torch.bfloat16, False, decode),
        _decode(size, torch.float32, False, decode),
        _decode(size, torch.bfloat16, True, None),
        _encode(size, torch.bfloat16, False, encode),
        _encode(size, torch.bfloat16, True, encode),
        _decode(size, torch.bfloat16, False, avx2, isa="avx2"),
    ]

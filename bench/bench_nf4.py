"""Cases of the op `nf4`: decoding and encoding a weight, against bitsandbytes."""

from __future__ import annotations

import functools
import math

import torch

import pyfinetune as pf
from pyfinetune.bench import fused_peers, peers
from pyfinetune.bench.ceilings import sets_beyond_cache
from pyfinetune.bench.checks import same_bits
from pyfinetune.bench.harness import OURS, Case, Setup, Target
from pyfinetune.bench.shapes import Sizes, short

_BLOCK = 64


def packed_bytes(elements: float, double_quant: bool = False) -> float:
    """Bytes of a weight in 4 bits."""
    blocks = elements / _BLOCK
    return elements / 2 + (blocks + blocks / 64 if double_quant else 4 * blocks)


def named(shape: tuple[int, int]) -> str:
    """A weight's shape in a case's name."""
    return f"{shape[0]}²" if shape[0] == shape[1] else f"{shape[0]}x{shape[1]}"


def _reference(function, *args, **kwargs):
    with pf.use_backend("reference"):
        return function(*args, **kwargs)


def _bnb_encoder(bnb, double_quant: bool):
    return functools.partial(
        bnb.functional.quantize_4bit, blocksize=_BLOCK, quant_type="nf4", compress_statistics=double_quant
    )


def _build_decode(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> Setup:
    count = sets_beyond_cache(int(packed_bytes(math.prod(shape), double_quant)), device)
    weights = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
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
        others, absent = fused_peers.functions("decode", device)
        missing |= absent
        calls |= {name: lambda i, decode=decode: decode(*states[i % count]) for name, decode in others.items()}
    check = {name: lambda call=call: same_bits([call(0)], [expected], ["weight"]) for name, call in calls.items()}
    return Setup(calls, check, missing)


def _build_encode(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> Setup:
    count = sets_beyond_cache(math.prod(shape) * dtype.itemsize, device)
    weights = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
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


def _case(verb: str, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, target=None, **more) -> Case:
    build, way = (_build_decode, "to") if verb == "decode" else (_build_encode, "from")
    name = f"{verb} NF4 {named(shape)} {way} {short(dtype)}" + (", double-quantized" if double_quant else "")
    if "isa" in more:
        more["versus"], name = name, f"{name}, {more['isa'].upper()} forced"
    elements = math.prod(shape)
    return Case(
        "nf4",
        name,
        functools.partial(build, shape=shape, dtype=dtype, double_quant=double_quant),
        dtype=dtype,
        bytes=packed_bytes(elements, double_quant) + elements * dtype.itemsize,
        target=target,
        **more,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    shape = (512, 512) if quick else (4096, 4096)
    decode, encode, avx2 = (
        (None, None, None) if quick else (Target(4.0, 1.0), Target(50.0, 50.0), Target(1 / 1.5, 1 / 1.5))
    )
    return [
        _case("decode", shape, torch.bfloat16, False, decode),
        _case("decode", shape, torch.float32, False, decode),
        _case("decode", shape, torch.bfloat16, True),
        _case("encode", shape, torch.bfloat16, False, encode),
        _case("encode", shape, torch.bfloat16, True, encode),
        _case("decode", shape, torch.bfloat16, False, avx2, isa="avx2"),
    ]


def shaped(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """The cases of a model's largest weight of a layer, or of a weight of N rows and K columns."""
    shape = (sizes.model.inner, sizes.model.hidden) if sizes.model else (sizes.out, sizes.inner)
    return [_case(verb, shape, dtype, nested) for verb in ("decode", "encode") for nested in (False, True)]

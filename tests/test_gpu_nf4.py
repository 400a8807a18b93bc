"""The CUDA C++ kernels on a GPU: the CPU's bits for encoding and decoding, and the fused products against float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle import BACKWARD, FORWARD, assert_as_good_as
from test_gpu import Captured, between_nans, side_stream

import pyfinetune as pf
from pyfinetune._native import capsule, native, packed_fields
from pyfinetune.ops import _lora_linear_cuda, _nf4_cuda
from pyfinetune.ops.lora_linear import prepare

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not native.cuda_archs, reason="this build has no CUDA kernels"),
]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HALVES = FLOATS[:2]
SIZES = [1, 7, 31, 33, 1023, 1024, 1025, 4097, 100_003]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=name_of)


def moved(packed: pf.Packed4bit) -> pf.Packed4bit:
    return packed.to("cuda")


def random(*shape, dtype, scale=1.0):
    return torch.randn(*shape, device="cuda").mul_(scale).to(dtype)


@every_dtype
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 1024, 4096])
def test_encoding_has_the_bits_of_the_cpu(dtype, quant_type, block_size):
    for size in SIZES:
        weight = torch.randn(size).to(dtype)
        weight[: size // 3 // block_size * block_size] = 0.0
        weight[-1] = 1e-38
        for double_quant in (False, True):
            expected = pf.ops.quantize_4bit(weight, block_size, quant_type, False)
            with pf.use_backend("cuda"):
                got = pf.ops.quantize_4bit(weight.cuda(), block_size, quant_type, double_quant)
            assert torch.equal(got.codes.cpu(), expected.codes)
            if not double_quant:
                assert torch.equal(got.absmax.cpu(), expected.absmax)
                continue
            # From here on of equal scales: the mean that is taken from them is torch's, on either device.
            nested = pf.ops.nf4._quantize_absmax
            centred = expected.absmax - got.nested_offset.cpu()
            codes, absmax = nested(centred, pf.ops.nf4.NESTED_NEAREST, 256)
            assert torch.equal(got.absmax.cpu(), codes)
            assert torch.equal(got.nested_absmax.cpu(), absmax)


@every_dtype
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 1024, 4096])
def test_decoding_has_the_bits_of_the_cpu(dtype, nested, block_size):
    for size in SIZES:
        packed = pf.ops.quantize_4bit(torch.randn(size), block_size, "nf4", nested)
        expected = pf.ops.dequantize_4bit(packed, dtype)
        buffer = torch.full((size + 17,), math.nan, dtype=dtype, device="cuda")
        for begin in (0, 1, 8):  # a multiple of 16 bytes, and none
            out = buffer[begin : begin + size]
            with pf.use_backend("cuda"):
                pf.ops.dequantize_4bit(moved(packed), out=out)
            assert torch.equal(out.cpu(), expected)
            assert bool(buffer[:begin].isnan().all())
            assert bool(buffer[begin + size :].isnan().all())
            buffer.fill_(math.nan)


@every_dtype
@pytest.mark.parametrize("shape", [(37, 130), (64, 4096), (5, 24)])
def test_decoding_beside_and_above_an_adapter(dtype, shape):
    rows, cols = shape
    packed = moved(pf.ops.quantize_4bit(torch.randn(rows, cols), 64, "nf4", True))
    weight = pf.ops.dequantize_4bit(packed, dtype)
    a, b = torch.randn(5, cols, device="cuda"), torch.randn(rows, 5, device="cuda")
    beside = torch.full((rows, cols + 8), math.nan, dtype=dtype, device="cuda")
    below = torch.full((rows + 5, cols), math.nan, dtype=dtype, device="cuda")
    fields = packed_fields(packed.tensors(), 64, packed.nested_block_size)
    _nf4_cuda.decode_with_adapter(beside, fields, rows, cols, b, 1, 0.5)
    fields = packed_fields(packed.tensors(), 64, packed.nested_block_size)
    _nf4_cuda.decode_with_adapter(below, fields, rows, cols, a)
    zero = weight.new_zeros(rows, 1)
    assert torch.equal(beside, torch.cat([weight, zero, (0.5 * b).to(dtype), zero, zero], 1))
    assert torch.equal(below, torch.cat([weight, a.to(dtype)]))


def problem(rows: int, out: int, inner: int, rank: int | None, dtype: torch.dtype) -> list:
    packed = moved(pf.ops.quantize_4bit(torch.randn(out, inner) * inner**-0.5, 64, "nf4", True))
    a = b = None
    if rank is not None:
        a, b = random(rank, inner, dtype=torch.float32, scale=inner**-0.5), random(out, rank, dtype=torch.float32)
    x, bias = random(rows, inner, dtype=dtype), random(out, dtype=dtype)
    return [x, packed, a, b, 0.7, bias]


def results(args: list, dtype: torch.dtype) -> list[torch.Tensor]:
    """y, and the gradients of x and of the adapter."""
    x, packed, a, b, scaling, bias = args
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, a, b) if t is not None]
    adapter = leaves[1:] or [None, None]
    y = pf.ops.lora_linear(leaves[0], packed, *adapter, scaling, bias.to(dtype))
    dout = (torch.arange(y.shape[1], device="cuda") % 7 - 2).mul(0.25).to(dtype).expand_as(y).contiguous()
    return [y.detach(), *torch.autograd.grad(y, leaves, dout)]


@every_half
@pytest.mark.parametrize("rank", [None, 1, 16, 40])
@pytest.mark.parametrize("shape", [(256, 512), (136, 4096), (70, 96), (33, 100), (9, 31), (200, 40)])
def test_products(dtype, rank, shape):
    """Whole tiles, rows that begin in the middle of a block of scales, and rows that begin in the middle of a byte."""
    for rows in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 100):
        args = problem(rows, *shape, rank, dtype)
        with pf.use_backend("cuda"):
            got = results(args, dtype)
        with pf.use_backend("reference"):
            eager, exact = results(args, dtype), results(args, torch.float64)
        for index, (one, plain, right) in enumerate(zip(got, eager, exact, strict=True)):
            factor = BACKWARD if index else FORWARD
            assert_as_good_as(one, plain, right, factor, f"{rows} rows, result {index}")


@every_half
def test_both_paths_agree(dtype):
    """With and without the matrix unit, for the rows that both take."""
    args = prepare(*problem(8, 300, 640, 16, dtype))
    vector = _lora_linear_cuda.forward(*args, path="vector")[0]
    tensor = _lora_linear_cuda.forward(*args, path="tensor")[0]
    torch.testing.assert_close(vector, tensor, rtol=2**-6, atol=2**-5)
    with pytest.raises(pf.InvalidInput, match=r"lora_linear .9 rows.*at most 8"):
        _lora_linear_cuda.forward(*prepare(*problem(9, 300, 640, 16, dtype)), path="vector")


@every_half
def test_equal_bits_on_another_stream_between_nans_and_in_a_graph(dtype):
    args = problem(33, 136, 256, 16, dtype)
    with pf.use_backend("cuda"):
        expected = results(args, dtype)
        packed = args[1]
        fields = {
            field.name: between_nans(getattr(packed, field.name))
            for field in dataclasses.fields(packed)
            if isinstance(getattr(packed, field.name), torch.Tensor)
        }
        moved_args = [between_nans(args[0]), dataclasses.replace(packed, **fields), *args[2:]]
        with side_stream():
            again = results(moved_args, dtype)
        torch.cuda.synchronize()
        captured = Captured(lambda: results(args, dtype))
        for _ in range(20):
            found = captured.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_refusals():
    x, packed, *rest = problem(4, 32, 64, 4, torch.bfloat16)
    with pf.use_backend("cuda"), pytest.raises(pf.BackendUnavailable, match="1025 rows"):
        pf.ops.lora_linear(x.repeat(257, 1)[:1025], packed, *rest)
    fields = packed_fields(packed.tensors(), 64, packed.nested_block_size)
    host = packed_fields(packed.to("cpu").tensors(), 64, packed.nested_block_size)
    with pytest.raises(pf.InvalidInput, match="codes is on another device"):
        native.cuda_lora_linear(host, 32, 64, capsule(x), capsule(x.new_empty(4, 32)), *[None] * 3, 1.0, "chosen", 0)
    with pytest.raises(pf.InvalidInput, match=r"y is \[4, 31\], needs \[4, 32\]"):
        native.cuda_lora_linear(fields, 32, 64, capsule(x), capsule(x.new_empty(4, 31)), *[None] * 3, 1.0, "chosen", 0)

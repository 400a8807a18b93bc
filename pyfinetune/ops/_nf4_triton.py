"""The Triton backend of `nf4`: what its kernels (kernels/nf4.py) are launched with."""

from __future__ import annotations

import functools
import math

import torch

from pyfinetune._native import native
from pyfinetune.ops._triton import configuration, kernels, on_device_of, triton_dtypes, triton_why_not


@functools.cache
def _encode_tables(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 15 midpoints between neighbouring values, and the code of each of the 16 intervals."""
    order = torch.tensor(native.code_order(quant_type), device="cpu")
    values = torch.tensor(native.code_table(quant_type), dtype=torch.float32, device="cpu")[order]
    return ((values[:-1] + values[1:]) / 2).to(device), order.to(device, torch.uint8)


def quantize_into(codes, absmax, weight, block_size: int, quant_type: str) -> None:
    """Codes and scales of a weight."""
    with on_device_of(weight):
        tables = _encode_tables(quant_type, weight.device)
        kernels("nf4").quantize_4bit(codes, absmax, weight.contiguous(), *tables, block_size)


def quantize_absmax_into(codes, absmax, centred, nearest, block_size: int) -> None:
    """The scales' own codes and scales."""
    with on_device_of(centred):
        kernels("nf4").quantize_absmax(codes, absmax, centred.contiguous(), nearest.contiguous(), block_size)


def decode_into(out, *args) -> None:
    """The weight that the arguments of `dequantize_4bit` describe; `out` has contiguous rows, perhaps apart."""
    *tensors, block_size, nested_block_size, shape, _dtype = args
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    with on_device_of(out):
        kernels("nf4").dequantize_4bit(out, *contiguous, block_size, nested_block_size, math.prod(shape))


def decode_why_not(*args) -> str | None:
    """The reason why the kernel cannot take the arguments of `dequantize_4bit`, or None."""
    dtype = args[9]
    return triton_why_not(*args[:6]) if dtype in triton_dtypes() else f"no kernel for {dtype}"


def encode_configuration(capability: int | None, weight, block_size: int, quant_type: str):
    """A `Backend.configuration` of `quantize_4bit`."""
    sizes = weight.element_size(), block_size, weight.numel()
    return configuration(weight, capability, lambda on: kernels("nf4").describe_encode(on, *sizes))


def decode_configuration(capability: int | None, *args):
    """A `Backend.configuration` of `dequantize_4bit`."""
    *_nested, block_size, _nested_block_size, shape, dtype = args
    sizes = dtype.itemsize, block_size, math.prod(shape)
    # The scales are of a dtype that every kernel takes.
    return configuration(args[2], capability, lambda on: kernels("nf4").describe_decode(on, *sizes))

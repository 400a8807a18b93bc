"""The CUDA C++ backend of `nf4` (csrc/cuda/nf4.cu): one launch each, double-quantized or not."""

from __future__ import annotations

import math

import torch

from pyfinetune._native import capsule, native, packed_fields
from pyfinetune.ops._cuda import cuda_why_not, stream_of


def decode_why_not(*args) -> str | None:
    """The reason why the kernel cannot take the arguments of `dequantize_4bit`, or None."""
    return cuda_why_not(*args[:6])


def decode_into(out: torch.Tensor, *args) -> None:
    """The weight that the arguments of `dequantize_4bit` describe into the contiguous tensor `out`."""
    *tensors, block_size, nested_block_size, shape, _dtype = args
    fields = packed_fields(tensors, block_size, nested_block_size)
    flat = capsule(out.view(1, -1))
    native.cuda_dequantize_4bit(fields, 1, math.prod(shape), flat, None, 0, 1.0, stream_of(out))


def decode_with_adapter(
    out: torch.Tensor, fields: tuple, rows: int, cols: int, adapter: torch.Tensor, first: int = 0, scaling: float = 1.0
) -> None:
    """A decoded weight and an adapter, in one launch: [W | scaling * B] or [W ; scaling * A].

    Args:
        out: [rows, cols + spare], or [rows + r, cols]; float32, float16 or bfloat16 with contiguous rows. Every
            element is written.
        fields: the packed weight, from `packed_fields`.
        rows, cols: of the weight.
        adapter: [rows, r], r <= spare - first, or [r, cols]; float32 or out's dtype with contiguous rows.
        first: the adapter's first column, counted from the first spare one; the others are zero.
        scaling: what the adapter is multiplied by, in float32.
    """
    native.cuda_dequantize_4bit(fields, rows, cols, capsule(out), capsule(adapter), first, scaling, stream_of(out))


def quantize_into(codes, absmax, weight, block_size: int, quant_type: str) -> None:
    """Codes and scales of a weight."""
    weight = weight.contiguous()
    native.cuda_quantize_4bit(
        capsule(weight), quant_type, block_size, capsule(codes), capsule(absmax), stream_of(weight)
    )


def quantize_absmax_into(codes, absmax, centred, nearest, block_size: int) -> None:
    """The scales' own codes and scales."""
    centred, nearest = centred.contiguous(), nearest.contiguous()
    parts = (capsule(codes), capsule(absmax), stream_of(centred))
    native.cuda_quantize_absmax(capsule(centred), block_size, capsule(nearest), *parts)

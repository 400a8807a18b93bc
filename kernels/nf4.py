"""Triton: 4-bit decode (format: csrc/nf4_format.h).

    out[i] = round(quant_map[code[i]] * scale[i // block_size])

    program p decodes elements [p * 2 * BYTES, (p + 1) * 2 * BYTES): BYTES bytes of codes become two vectors, the high
    nibbles (even elements) and the low ones (odd), which are interleaved on the way out.

Double-quantized scales, nested_map[absmax8[b]] * nested_absmax[b // nested_block] + nested_offset, are decoded in the
same launch. Reference: pyfinetune/ops/nf4.py.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from pyfinetune.kernels.config import Compilation, Config


@triton.jit
def _dequantize_4bit_kernel(
    out_ptr,
    codes_ptr,
    absmax_ptr,
    quant_map_ptr,
    nested_absmax_ptr,
    nested_map_ptr,
    nested_offset_ptr,
    numel,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    # int64 throughout: 2^31 elements are one large embedding.
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)  # [BYTES]
    packed = tl.load(codes_ptr + byte, mask=2 * byte < numel, other=0)
    block = (2 * byte) // BLOCK_SIZE  # both elements of a byte are in one block
    inside = 2 * byte < numel
    if NESTED:
        code8 = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_map_ptr + code8) * nested + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    even = tl.load(quant_map_ptr + (packed >> 4).to(tl.int32)) * scale
    odd = tl.load(quant_map_ptr + (packed & 15).to(tl.int32)) * scale
    values = tl.interleave(even, odd)  # [2 * BYTES]
    element = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=element < numel)


def dequantize_4bit(
    out,
    codes,
    absmax,
    quant_map,
    nested_absmax,
    nested_map,
    nested_offset,
    block_size: int,
    nested_block_size: int,
    numel: int,
) -> None:
    """Decode `numel` values into the contiguous tensor `out`, on its device's current stream.

    Args:
        out: [numel] elements, float32, float16 or bfloat16.
        codes: uint8 [(numel + 1) // 2]; all tensors contiguous and on one device.
        absmax: float32 [blocks], or uint8 [blocks] when `nested_absmax` is given.
        quant_map: float32 [16].
        nested_absmax, nested_map, nested_offset: float32 [nested blocks], [256] and 0-d, or None.
        block_size, nested_block_size: elements to a scale, scales to a nested scale; powers of two.
        numel: how many elements.
    """
    if numel == 0:
        return
    bytes_per_program = 1024
    nested = nested_absmax is not None
    grid = (triton.cdiv(numel, 2 * bytes_per_program),)
    _dequantize_4bit_kernel[grid](
        out,
        codes,
        absmax,
        quant_map,
        nested_absmax if nested else absmax,
        nested_map if nested else absmax,
        nested_offset if nested else absmax,
        numel,
        BLOCK_SIZE=block_size,
        NESTED_BLOCK_SIZE=nested_block_size if nested else 1,
        NESTED=nested,
        BYTES=bytes_per_program,
        num_warps=4,
        # Multiply, round, add, round: a fused multiply-add gives other bits.
        enable_fp_fusion=False,
    )


def compilations(capability: int) -> Iterator[Compilation]:
    """Decoding into bfloat16 and float32, with scales in 32 bits and double-quantized."""
    kernel, config = _dequantize_4bit_kernel, Config({"BYTES": 1024})
    for dtype in ("*bf16", "*fp32"):
        for nested in (False, True):
            types = {"out_ptr": dtype, "codes_ptr": "*u8", "absmax_ptr": "*u8" if nested else "*fp32", "numel": "i64"}
            constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256 if nested else 1, "NESTED": nested}
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            name = f"decode {dtype}{' nested' if nested else ''}"
            yield Compilation(name, kernel, signature, constants, config, options={"enable_fp_fusion": False})

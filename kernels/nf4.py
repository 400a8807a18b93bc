"""Triton: 4-bit decode and encode (format: csrc/nf4_format.h).

    decode   out[i] = round(quant_map[code[i]] * scale[i // block_size])
    encode   scale[b] = max |w|,  code[i] = nearest(w[i] * (1 / scale[i // block_size]))
    scales   nested_map[absmax8[b]] * nested_absmax[b // nested_block] + nested_offset, where double-quantized

A program takes whole blocks, TILE elements in all; a row of its tile is one block and has one scale:

    codes  b0 b1 b2 ...      one byte = elements 2i (high nibble) and 2i+1 (low), 16 bytes to a thread
    tile   [BLOCKS, BLOCK_SIZE] <- interleave(high nibbles, low nibbles), or the way back

Reference: pyfinetune/ops/nf4.py.
"""

import functools
from collections.abc import Iterator

import triton
import triton.language as tl

from pyfinetune.kernels.config import Compilation, Config, Family, Work, capability_of, size_class

# (Elements of a tile, warps), best first: 16 bytes of codes to a thread; a block of the largest size fits the first.
_TILES = ((4096, 4), (2048, 2), (8192, 8), (2048, 4))
# Bits of 1e-38, the smallest scale that an encoder divides by. As integers magnitudes compare like floats, and NaN
# comes last; as a Python float the number is below float32's normal range and would be taken for a double.
_MIN_ABSMAX_BITS = tl.constexpr(0x006CE3EE)


def _candidates(tensors: float, capability: int, itemsize: int, block_size: int, numel: int) -> list[Config]:
    """`tensors`: of a tile's size that are in registers at a time."""
    found = []
    for elements, warps in _TILES:
        blocks = elements // block_size
        if not blocks:
            continue
        moved = numel * (0.5 + itemsize + 4 / block_size)
        work = Work(triton.cdiv(numel, elements), moved, elements * (itemsize if tensors > 2 else 0.5))
        registers = int(tensors * elements) // (32 * warps) + 32
        found.append(Config({"BLOCKS": blocks}, warps, 2, registers=registers, work=work))
    return found


_FIELDS = ("itemsize", "block_size", "numel")
DECODE = Family("nf4_decode", _FIELDS, functools.partial(_candidates, 1.2))
ENCODE = Family("nf4_encode", _FIELDS, functools.partial(_candidates, 3))


@functools.lru_cache(1024)  # each call asks
def _class(itemsize: int, block_size: int, numel: int) -> tuple[int, int, int]:
    # Blocks are independent: no bit depends on the choice.
    return itemsize, block_size, size_class(numel, 1 << 16, 1 << 28)


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
    num_bytes,
    cols,
    out_row_stride,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    STRIDED: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # int64 throughout: 2^31 elements are one large embedding.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    inside = block * BLOCK_SIZE < numel
    if NESTED:
        code8 = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_map_ptr + code8) * nested + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    # Compared as bytes: the compiler sees that 16 neighbours are all inside or all outside, and loads them at once.
    packed = tl.load(codes_ptr + byte, mask=byte < num_bytes, other=0)
    even = tl.load(quant_map_ptr + (packed >> 4).to(tl.int32)) * scale[:, None]
    odd = tl.load(quant_map_ptr + (packed & 15).to(tl.int32)) * scale[:, None]
    values = tl.interleave(even, odd)  # [BLOCKS, BLOCK_SIZE]
    within = tl.arange(0, BLOCK_SIZE)[None, :]
    element = block[:, None] * BLOCK_SIZE + within
    if not STRIDED:
        place = element
    elif WHOLE_ROWS:  # no block crosses a row
        row = block * BLOCK_SIZE // cols
        place = (row * out_row_stride + (block * BLOCK_SIZE - row * cols))[:, None] + within
    else:
        row = element // cols
        place = row * out_row_stride + (element - row * cols)
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=element < numel)


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
    """Decode `numel` values into `out`, on its device's current stream.

    Args:
        out: [numel] elements, float32, float16 or bfloat16; contiguous, or [rows, cols] with contiguous rows that lie
            further apart than they are long.
        codes: uint8 [(numel + 1) // 2]; these and what follows contiguous and on out's device.
        absmax: float32 [blocks], or uint8 [blocks] when `nested_absmax` is given.
        quant_map: float32 [16].
        nested_absmax, nested_map, nested_offset: float32 [nested blocks], [256] and 0-d, or None.
        block_size, nested_block_size: elements to a scale, scales to a nested scale; powers of two.
        numel: how many elements.
    """
    if numel == 0:
        return
    strided = not out.is_contiguous()
    cols, row_stride = (out.shape[1], out.stride(0)) if strided else (numel, numel)
    nested = nested_absmax is not None

    def launch(config: Config) -> None:
        _dequantize_4bit_kernel[(triton.cdiv(numel, config.blocks["BLOCKS"] * block_size),)](
            out,
            codes,
            absmax,
            quant_map,
            nested_absmax if nested else absmax,
            nested_map if nested else absmax,
            nested_offset if nested else absmax,
            numel,
            (numel + 1) // 2,
            cols,
            row_stride,
            BLOCK_SIZE=block_size,
            NESTED_BLOCK_SIZE=nested_block_size if nested else 1,
            NESTED=nested,
            STRIDED=strided,
            WHOLE_ROWS=cols % block_size == 0,
            # Multiply, round, add, round: a fused multiply-add gives other bits.
            enable_fp_fusion=False,
            **config.options(),
        )

    of_class = _class(out.element_size(), block_size, numel)
    launch(DECODE.choose(capability_of(out), *of_class, launch=launch))


@triton.jit
def _quantize_4bit_kernel(
    codes_ptr,
    absmax_ptr,
    weight_ptr,
    pivots_ptr,
    order_ptr,
    numel,
    num_bytes,
    first_block,
    last_block,
    BLOCK_SIZE: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    inside = block < last_block
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    mask = inside[:, None] & (element < numel) if PARTIAL else inside[:, None]
    weight = tl.load(weight_ptr + element, mask=mask, other=0.0).to(tl.float32)  # [BLOCKS, BLOCK_SIZE]
    bits = tl.max(weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    divisor = tl.maximum(bits, _MIN_ABSMAX_BITS).to(tl.float32, bitcast=True)
    if PARTIAL:
        # bitsandbytes divides in the last block of a size that is no multiple, and stores the clamped scale.
        scaled = tl.div_rn(weight, tl.broadcast_to(divisor[:, None], (BLOCKS, BLOCK_SIZE)))
        scaled = tl.where(mask, scaled, 0.0)  # the half byte past the end is a zero's, whatever the scale: 0 / NaN
        tl.store(absmax_ptr + block, divisor, mask=inside)
    else:
        scaled = weight * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)[:, None]
        tl.store(absmax_ptr + block, bits.to(tl.float32, bitcast=True), mask=inside)
    interval = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        # NaN is not <= anything and takes the last interval, as a sorted search gives it.
        interval += tl.where(scaled <= tl.load(pivots_ptr + i), 0, 1)
    codes = tl.load(order_ptr + interval).to(tl.int32)
    even, odd = tl.split(tl.reshape(codes, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    mask = inside[:, None] & (byte < num_bytes) if PARTIAL else inside[:, None]
    tl.store(codes_ptr + byte, (even << 4 | odd).to(tl.uint8), mask=mask)


def quantize_4bit(codes, absmax, weight, pivots, order, block_size: int) -> None:
    """Encode a weight, on its device's current stream.

    Args:
        codes: uint8 [(numel + 1) // 2, 1], written.
        absmax: float32 [blocks], written.
        weight: contiguous, float32, float16 or bfloat16.
        pivots: float32 [15], the midpoints between neighbouring values of codes, ascending.
        order: uint8 [16], the code of each interval between them.
        block_size: elements to a scale; a power of two.
    """
    numel = weight.numel()
    whole = numel // block_size
    launches = [(0, whole, False)] if whole else []
    launches += [(whole, whole + 1, True)] if numel % block_size else []

    def launch(config: Config) -> None:
        for first, last, partial in launches:
            _quantize_4bit_kernel[(triton.cdiv(last - first, config.blocks["BLOCKS"]),)](
                codes,
                absmax,
                weight,
                pivots,
                order,
                numel,
                (numel + 1) // 2,
                first,
                last,
                BLOCK_SIZE=block_size,
                PARTIAL=partial,
                enable_fp_fusion=False,
                **config.options(),
            )

    of_class = _class(weight.element_size(), block_size, numel)
    launch(ENCODE.choose(capability_of(weight), *of_class, launch=launch))


def describe_decode(capability: int, itemsize: int, block_size: int, numel: int) -> list[str]:
    """How a weight would be decoded, for `pf.explain`."""
    return [DECODE.describe(capability, *_class(itemsize, block_size, numel))] if numel else []


def describe_encode(capability: int, itemsize: int, block_size: int, numel: int) -> list[str]:
    """How a weight would be encoded, for `pf.explain`."""
    return [ENCODE.describe(capability, *_class(itemsize, block_size, numel))] if numel else []


@triton.jit
def _quantize_absmax_kernel(
    codes_ptr,
    absmax_ptr,
    centred_ptr,
    nearest_ptr,
    numel,
    block_size,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    element = block * block_size + within
    mask = (within < block_size) & (element < numel)
    centred = tl.load(centred_ptr + element, mask=mask, other=0.0)  # [BLOCK]
    bits = tl.max(centred.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    largest = (tl.zeros((BLOCK,), tl.int32) + bits).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block + within, largest, mask=within == 0)
    # A block of zeros has no reciprocal, and needs none.
    x = centred * tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), tl.where(largest == 0.0, 1.0, largest))
    x = tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))
    # In float64 the product is exact: one rounding, as the native kernel's fused multiply-add.
    position = (((x + 1.0) * 0.5).to(tl.float64) * 65535.0 + 0.5).to(tl.float32)
    found = (largest > 0.0) & (position >= 0.0)  # NaN takes code 0, and so does a block of zeros
    index = tl.where(found, position, 0.0).to(tl.int32)
    code = tl.load(nearest_ptr + index)
    tl.store(codes_ptr + element, tl.where(found, code, 0).to(tl.uint8), mask=mask)


def quantize_absmax(codes, absmax, centred, nearest, block_size: int) -> None:
    """Encode scales in 8 bits.

    Args:
        codes: uint8, as many as `centred`, written.
        absmax: float32 [blocks], written.
        centred: float32, contiguous: the scales minus their mean.
        nearest: uint8 [65536], the code nearest to each of so many even steps from -1 to 1.
        block_size: scales to a nested scale.
    """
    numel = centred.numel()
    if numel == 0:
        return
    block = max(16, triton.next_power_of_2(block_size))
    _quantize_absmax_kernel[(triton.cdiv(numel, block_size),)](
        codes, absmax, centred, nearest, numel, block_size, BLOCK=block, num_warps=4, enable_fp_fusion=False
    )


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel as it is launched for the weights of a model: see `kernels.config.Compilation`."""
    unfused = {"enable_fp_fusion": False}
    pointers = ["codes_ptr", "absmax_ptr", "quant_map_ptr", "nested_absmax_ptr", "nested_map_ptr", "nested_offset_ptr"]
    sizes = dict.fromkeys(["numel", "num_bytes", "cols", "out_row_stride"], "i64")

    def of(family, kernel, name, dtype, fields, constants):
        of_class = _class(4 if dtype == "fp32" else 2, 64, 1 << 24)
        for config, label, alternative in family.instances(capability, *of_class):
            made = name + label, kernel, fields, constants, config
            yield Compilation(*made, options=unfused, alternative=alternative)

    for dtype, nested, strided in (("bf16", True, False), ("bf16", True, True), ("bf16", False, True), ("fp32", 1, 0)):
        types = ["*u8", "*u8" if nested else "*fp32", *["*fp32"] * 4]
        name = f"decode {dtype}{' nested' if nested else ''}{' strided' if strided else ''}"
        fields = {"out_ptr": f"*{dtype}", **dict(zip(pointers, types, strict=True)), **sizes}
        constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256 if nested else 1, "NESTED": bool(nested)}
        constants |= {"STRIDED": bool(strided), "WHOLE_ROWS": True}
        yield from of(DECODE, _dequantize_4bit_kernel, name, dtype, fields, constants)
    for dtype, partial in (("bf16", False), ("fp32", False), ("bf16", True)):
        types = {"codes_ptr": "*u8", "absmax_ptr": "*fp32", "weight_ptr": f"*{dtype}", "pivots_ptr": "*fp32"}
        types |= {"order_ptr": "*u8"} | dict.fromkeys(["numel", "num_bytes", "first_block", "last_block"], "i64")
        constants = {"BLOCK_SIZE": 64, "PARTIAL": partial}
        name = f"encode {dtype}{' partial' if partial else ''}"
        yield from of(ENCODE, _quantize_4bit_kernel, name, dtype, types, constants)
    types = {"codes_ptr": "*u8", "absmax_ptr": "*fp32", "centred_ptr": "*fp32", "nearest_ptr": "*u8"}
    types |= {"numel": "i64", "block_size": "i32"}
    yield Compilation(
        "encode scales", _quantize_absmax_kernel, types, {}, Config({"BLOCK": 256}, num_warps=4), options=unfused
    )

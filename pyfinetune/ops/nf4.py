"""Op `nf4`: weights in 4 bits, in bitsandbytes' storage layout byte for byte (csrc/nf4_format.h)."""

from __future__ import annotations

import dataclasses
import math

import torch

from pyfinetune._native import capsule, native, packed_fields, threads
from pyfinetune.ops import _nf4_cuda as cuda
from pyfinetune.ops import _nf4_triton as gpu
from pyfinetune.ops._checks import FLOATS, check_same_device, check_tensor, cpu_why_not, fail
from pyfinetune.ops._cuda import cuda_why_not
from pyfinetune.ops._op import Backend, Op
from pyfinetune.ops._triton import triton_why_not

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK_SIZE = 256
_MIN_ABSMAX = 1e-38  # what a scale is clamped to before it divides, as in nf4_format.h


@dataclasses.dataclass(frozen=True)
class Packed4bit:
    """A weight in 4 bits: codes, their scales, and what is needed to decode them.

    Args:
        codes: uint8 [(numel + 1) // 2, 1]; element 2i in the high nibble of byte i.
        absmax: scale of each block: float32 [blocks], or uint8 [blocks] codes when double-quantized.
        quant_map: float32 [16], the value of each code.
        nested_absmax: float32 [blocks / nested_block_size], scale of each block of scales; None unless
            double-quantized, like the next two.
        nested_quant_map: float32 [256], the value of each 8-bit code.
        nested_offset: float32 0-d, the mean that was taken from the scales.
        block_size: elements that share a scale.
        nested_block_size: scales that share a nested scale.
        quant_type: "nf4" or "fp4".
        shape: shape of the decoded weight.
        dtype: dtype that the weight had, and decodes to by default.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    quant_map: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_quant_map: torch.Tensor | None
    nested_offset: torch.Tensor | None
    block_size: int
    nested_block_size: int
    quant_type: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The six tensors in the order of the ops' schemas."""
        return (
            self.codes,
            self.absmax,
            self.quant_map,
            self.nested_absmax,
            self.nested_quant_map,
            self.nested_offset,
        )

    def to(self, device: torch.device | str) -> Packed4bit:
        """The same weight on another device; dtypes stay."""
        moved = [tensor if tensor is None else tensor.to(device) for tensor in self.tensors()]
        return Packed4bit(*moved, self.block_size, self.nested_block_size, self.quant_type, self.shape, self.dtype)


def _make_nested_map() -> torch.Tensor:
    """float32 [256]: the signed dynamic 8-bit map of double quantization, ascending.

    Seven decades, each twice as finely divided as the one below: in decade i, 2**i midpoints of an even division of
    [0.1, 1] times 10**(i - 6), both signs, and 0 and 1 (Dettmers 2015, https://arxiv.org/abs/1511.04561).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (decade - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


# Constants of the format, on the CPU: the value of each 4-bit code, of each 8-bit code, and the nearest 8-bit code of
# each of 65,536 evenly spaced positions of [-1, 1].
QUANT_MAPS = {kind: torch.tensor(native.code_table(kind), dtype=torch.float32) for kind in QUANT_TYPES}
NESTED_MAP = _make_nested_map()
NESTED_NEAREST = torch.bucketize(
    torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1, (NESTED_MAP[:-1] + NESTED_MAP[1:]) / 2
).to(torch.uint8)


def _num_blocks(numel: int, block_size: int) -> int:
    return (numel + block_size - 1) // block_size


def _check_size(op: str, name: str, tensor: torch.Tensor, size: int) -> None:
    if tensor.numel() != size:
        fail(op, f"{name} has {tensor.numel()} elements, needs {size}")


def check_packed(op: str, codes, absmax, quant_map, nested, block_size: int, nested_block_size: int, numel) -> None:
    """The parts of a packed weight of `numel` elements fit each other; `nested` is the last three tensors."""
    if block_size not in BLOCK_SIZES:
        fail(op, f"block_size is {block_size}, needs one of {BLOCK_SIZES}")
    nested_absmax, nested_quant_map, nested_offset = nested
    check_tensor(op, "codes", codes, (torch.uint8,))
    check_tensor(op, "quant_map", quant_map, (torch.float32,))
    check_tensor(op, "absmax", absmax, (torch.float32,) if nested_absmax is None else (torch.uint8,))
    _check_size(op, "quant_map", quant_map, 16)
    blocks = _num_blocks(numel, block_size)
    if codes.numel() != (numel + 1) // 2:
        fail(op, f"codes has {codes.numel()} bytes, needs {(numel + 1) // 2} ({numel} values, two in a byte)")
    if absmax.numel() != blocks:
        plural = "" if absmax.numel() == 1 else "s"
        fail(
            op,
            f"absmax has {absmax.numel()} element{plural}, needs {blocks} ({numel} values / block_size {block_size})",
        )
    check_same_device(
        op,
        codes=codes,
        absmax=absmax,
        quant_map=quant_map,
        nested_absmax=nested_absmax,
        nested_quant_map=nested_quant_map,
        nested_offset=nested_offset,
    )
    if nested_absmax is None:
        return
    if nested_block_size <= 0 or nested_block_size & (nested_block_size - 1):
        fail(op, f"nested_block_size is {nested_block_size}, needs a power of two")
    sizes = {"nested_absmax": _num_blocks(blocks, nested_block_size), "nested_quant_map": 256, "nested_offset": 1}
    for (name, size), tensor in zip(sizes.items(), nested, strict=True):
        check_tensor(op, name, tensor, (torch.float32,))
        _check_size(op, name, tensor, size)


# --- quantize_4bit: weight -> codes, absmax


def _check_quantize(weight, block_size, quant_type):
    check_tensor("quantize_4bit", "weight", weight, FLOATS)
    if block_size not in BLOCK_SIZES:
        fail("quantize_4bit", f"block_size is {block_size}, needs one of {BLOCK_SIZES}")
    if quant_type not in QUANT_TYPES:
        fail("quantize_4bit", f"quant_type is {quant_type!r}, needs one of {QUANT_TYPES}")


def _fake_quantize(weight, block_size, quant_type):
    n = weight.numel()
    return (
        weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8),
        weight.new_empty((_num_blocks(n, block_size),), dtype=torch.float32),
    )


def _quantize_reference(weight, block_size, quant_type):
    values = QUANT_MAPS[quant_type].to(weight.device)
    order = torch.tensor(native.code_order(quant_type), device=weight.device)
    pivots = (values[order[:-1]] + values[order[1:]]) / 2
    flat = weight.reshape(-1).float()
    full = flat.numel() // block_size * block_size
    blocks = flat[:full].reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = [(blocks * (1 / absmax.clamp(min=_MIN_ABSMAX))[:, None]).reshape(-1)]
    if full < flat.numel():
        # bitsandbytes divides in the partial last block, and stores the clamped scale.
        last = flat[full:].abs().amax().clamp(min=_MIN_ABSMAX).reshape(1)
        absmax = torch.cat([absmax, last])
        scaled.append(flat[full:] / last)
    if flat.numel() % 2:
        scaled.append(flat.new_zeros(1))
    codes = order[torch.bucketize(torch.cat(scaled), pivots)].to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), absmax


def _quantize_cpu(weight, block_size, quant_type):
    weight = weight.contiguous()
    codes, absmax = _fake_quantize(weight, block_size, quant_type)
    native.quantize_4bit(capsule(weight), quant_type, block_size, capsule(codes), capsule(absmax), threads())
    return codes, absmax


def _quantize_cuda(weight, block_size, quant_type):
    codes, absmax = _fake_quantize(weight, block_size, quant_type)
    cuda.quantize_into(codes, absmax, weight, block_size, quant_type)
    return codes, absmax


def _quantize_triton(weight, block_size, quant_type):
    codes, absmax = _fake_quantize(weight, block_size, quant_type)
    gpu.quantize_into(codes, absmax, weight, block_size, quant_type)
    return codes, absmax


_quantize = Op(
    "quantize_4bit",
    "(Tensor weight, int block_size, str quant_type) -> (Tensor codes, Tensor absmax)",
    check=_check_quantize,
    fake=_fake_quantize,
    reference=_quantize_reference,
    backends=[
        Backend("triton", _quantize_triton, lambda weight, *rest: triton_why_not(weight), gpu.encode_configuration),
        Backend("cuda", _quantize_cuda, lambda weight, *rest: cuda_why_not(weight)),
        Backend("cpu", _quantize_cpu, lambda weight, *rest: cpu_why_not(weight)),
    ],
    prepare=lambda weight, block_size=64, quant_type="nf4", double_quant=False: (
        weight.detach(),
        block_size,
        quant_type,
    ),
)

# --- quantize_absmax: the scales of a double-quantized weight, minus their mean, in 8 bits


def _check_absmax(centred, nearest, block_size):
    check_tensor("quantize_absmax", "centred", centred, (torch.float32,))
    check_tensor("quantize_absmax", "nearest", nearest, (torch.uint8,))
    _check_size("quantize_absmax", "nearest", nearest, 65536)


def _fake_absmax(centred, nearest, block_size):
    return (
        torch.empty_like(centred, dtype=torch.uint8, memory_format=torch.contiguous_format),
        centred.new_empty((_num_blocks(centred.numel(), block_size),)),
    )


def _absmax_reference(centred, nearest, block_size):
    n = centred.numel()
    blocks = torch.nn.functional.pad(centred.reshape(-1), (0, -n % block_size)).reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp(-1, 1)
    # In float64 the product is exact, which is what the kernels' fused multiply-add gives.
    position = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float()
    codes = nearest[torch.where(absmax[:, None] > 0, position, 0).nan_to_num(0.0).long()]
    codes = torch.where(absmax[:, None] > 0, codes, 0)
    return codes.reshape(-1)[:n].reshape(centred.shape), absmax


def _absmax_cpu(centred, nearest, block_size):
    centred = centred.contiguous()
    codes, absmax = _fake_absmax(centred, nearest, block_size)
    native.quantize_absmax(capsule(centred), block_size, capsule(nearest), capsule(codes), capsule(absmax), threads())
    return codes, absmax


def _absmax_cuda(centred, nearest, block_size):
    codes, absmax = _fake_absmax(centred, nearest, block_size)
    cuda.quantize_absmax_into(codes, absmax, centred, nearest, block_size)
    return codes, absmax


def _absmax_triton(centred, nearest, block_size):
    codes, absmax = _fake_absmax(centred, nearest, block_size)
    gpu.quantize_absmax_into(codes, absmax, centred, nearest, block_size)
    return codes, absmax


_quantize_absmax = Op(
    "quantize_absmax",
    "(Tensor centred, Tensor nearest, int block_size) -> (Tensor codes, Tensor absmax)",
    check=_check_absmax,
    fake=_fake_absmax,
    reference=_absmax_reference,
    backends=[
        Backend("triton", _absmax_triton, lambda centred, nearest, block_size: triton_why_not(centred, nearest)),
        Backend("cuda", _absmax_cuda, lambda centred, nearest, block_size: cuda_why_not(centred, nearest)),
        Backend("cpu", _absmax_cpu, lambda centred, nearest, block_size: cpu_why_not(centred, nearest)),
    ],
)


def quantize_4bit(
    weight: torch.Tensor, block_size: int = 64, quant_type: str = "nf4", double_quant: bool = False
) -> Packed4bit:
    """Quantize a weight to 4 bits in blocks.

    code[i] = nearest(weight[i] / absmax[i // block_size]), over the weight flattened row-major.

    Args:
        weight: float32, float16 or bfloat16 tensor of any shape, layout and size.
        block_size: values that share a scale: 32, 64, 128, ..., 4096.
        quant_type: "nf4" (quantiles of a normal distribution) or "fp4".
        double_quant: also quantize the scales to 8 bits (0.37 bits saved a value at block size 64).

    Returns:
        A `Packed4bit`, bit-equal to what bitsandbytes makes of the weight on a CPU.

    Raises:
        InvalidInput: a wrong dtype, block size or type.

    Example:
        >>> packed = pf.ops.quantize_4bit(torch.randn(64, 128))
        >>> packed.codes.shape
        torch.Size([4096, 1])

    Source: QLoRA, https://arxiv.org/abs/2305.14314; layout: bitsandbytes' QuantState.
    """
    check_tensor("quantize_4bit", "weight", weight)
    codes, absmax = _quantize(weight.detach(), block_size, quant_type)
    quant_map = QUANT_MAPS[quant_type].to(weight.device)
    shape, dtype = tuple(weight.shape), weight.dtype
    if not double_quant:
        return Packed4bit(codes, absmax, quant_map, None, None, None, block_size, 0, quant_type, shape, dtype)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    absmax8, nested_absmax = _quantize_absmax(absmax - offset, NESTED_NEAREST.to(weight.device), NESTED_BLOCK_SIZE)
    nested = (nested_absmax, NESTED_MAP.to(weight.device), offset)
    return Packed4bit(codes, absmax8, quant_map, *nested, block_size, NESTED_BLOCK_SIZE, quant_type, shape, dtype)


# --- dequantize_4bit: codes and scales -> weight


def _check_dequantize(codes, absmax, quant_map, n1, n2, n3, block_size, nested_block_size, shape, dtype):
    if any(size < 0 for size in shape):
        fail("dequantize_4bit", f"shape is {list(shape)}, has a negative size")
    if dtype not in FLOATS:
        fail("dequantize_4bit", f"dtype is {dtype}, needs float32, float16 or bfloat16")
    numel = math.prod(shape)
    check_packed("dequantize_4bit", codes, absmax, quant_map, (n1, n2, n3), block_size, nested_block_size, numel)


def _fake_dequantize(codes, absmax, quant_map, n1, n2, n3, block_size, nested_block_size, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


def decoded_absmax(absmax, nested, nested_block_size):
    """float32 [blocks]: the scales, decoded from 8 bits where they are double-quantized."""
    nested_absmax, nested_quant_map, nested_offset = nested
    if nested_absmax is None:
        return absmax.reshape(-1)
    scale = nested_absmax.reshape(-1).repeat_interleave(nested_block_size)[: absmax.numel()]
    return nested_quant_map.reshape(-1)[absmax.reshape(-1).long()] * scale + nested_offset


def dequantize_reference(codes, absmax, quant_map, n1, n2, n3, block_size, nested_block_size, shape, dtype):
    numel = math.prod(shape)
    scales = decoded_absmax(absmax, (n1, n2, n3), nested_block_size)
    flat = codes.reshape(-1)
    nibbles = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:numel]
    values = quant_map.reshape(-1)[nibbles.long()] * scales.repeat_interleave(block_size)[:numel]
    return values.to(dtype).reshape(shape)


def decode_into(
    out: torch.Tensor,
    fields: tuple,
    rows: int,
    cols: int,
    row_begin: int = 0,
    col_begin: int = 0,
    *,
    stream: bool = False,
) -> None:
    """Decode the tile of a [rows, cols] weight that starts at (row_begin, col_begin) into the 2-D tensor `out`.

    `stream` writes past the caches, for a scratch that other cores have just read.
    """
    native.dequantize_4bit(fields, rows, cols, row_begin, col_begin, capsule(out), threads(), stream)


def _decode_cpu(out, *args):
    *tensors, block_size, nested_block_size, shape, _dtype = args
    decode_into(out.view(1, -1), packed_fields(tensors, block_size, nested_block_size), 1, math.prod(shape))


def _dequantize_cpu(*args):
    out = _fake_dequantize(*args)
    _decode_cpu(out, *args)
    return out


def _dequantize_cuda(*args):
    out = _fake_dequantize(*args)
    cuda.decode_into(out, *args)
    return out


def _dequantize_triton(*args):
    out = _fake_dequantize(*args)
    gpu.decode_into(out, *args)
    return out


def _prepare_dequantize(packed: Packed4bit, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> tuple:
    if not isinstance(packed, Packed4bit):
        fail("dequantize_4bit", f"packed is {type(packed).__name__}, needs a Packed4bit")
    if dtype is None:
        dtype = packed.dtype if out is None else out.dtype
    return (*packed.tensors(), packed.block_size, packed.nested_block_size, packed.shape, dtype)


_PACKED = (
    "Tensor codes, Tensor absmax, Tensor quant_map, Tensor? nested_absmax, Tensor? nested_quant_map, "
    "Tensor? nested_offset, int block_size, int nested_block_size, SymInt[] shape, ScalarType dtype"
)

_dequantize = Op(
    "dequantize_4bit",
    f"({_PACKED}) -> Tensor",
    check=_check_dequantize,
    fake=_fake_dequantize,
    reference=dequantize_reference,
    backends=[
        Backend("cuda", _dequantize_cuda, cuda.decode_why_not),
        Backend("triton", _dequantize_triton, gpu.decode_why_not, gpu.decode_configuration),
        Backend("cpu", _dequantize_cpu, lambda *args: cpu_why_not(*args[:6])),
    ],
    prepare=_prepare_dequantize,
)


def _check_dequantize_out(*args):
    *packed, out = args
    _check_dequantize(*packed)
    shape, dtype = packed[-2:]
    check_tensor("dequantize_4bit", "out", out, (dtype,))
    if tuple(out.shape) != tuple(shape):
        fail("dequantize_4bit", f"out is {list(out.shape)}, needs {list(shape)}")
    if not out.is_contiguous():
        fail("dequantize_4bit", "out is not contiguous")
    check_same_device("dequantize_4bit", codes=packed[0], out=out)


def _into(decode):
    def run(*args):
        *packed, out = args
        decode(out, *packed)

    return run


_dequantize_out = Op(
    "dequantize_4bit_out",
    f"({_PACKED}, Tensor(a!) out) -> ()",
    check=_check_dequantize_out,
    fake=lambda *args: None,
    reference=lambda *args: args[-1].copy_(dequantize_reference(*args[:-1])) and None,
    backends=[
        Backend("cuda", _into(cuda.decode_into), cuda.decode_why_not),
        Backend("triton", _into(gpu.decode_into), gpu.decode_why_not),
        Backend("cpu", _into(_decode_cpu), lambda *args: cpu_why_not(*args[:6])),
    ],
)


def dequantize_4bit(
    packed: Packed4bit, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode a 4-bit weight.

    weight[i] = round(quant_map[code[i]] * absmax[i // block_size]), computed in float32 and rounded once to `dtype`.

    Args:
        packed: what `quantize_4bit` returned, or a `Packed4bit` made from a checkpoint.
        dtype: float32, float16 or bfloat16; by default that of `out`, else of the weight that was quantized.
        out: a contiguous tensor of the weight's shape and of `dtype` to write to.

    Returns:
        The weight, `packed.shape`; `out` itself where it was given.

    Raises:
        InvalidInput: the parts of `packed` do not fit each other, or `out` does not fit them.

    Example:
        >>> weight = pf.ops.dequantize_4bit(packed, dtype=torch.bfloat16)
    """
    args = _prepare_dequantize(packed, dtype, out)
    if out is None:
        return _dequantize(*args)
    check_tensor("dequantize_4bit", "out", out)
    if out.requires_grad and torch.is_grad_enabled():
        fail("dequantize_4bit", "out requires grad; decode into a detached tensor")
    _dequantize_out(*args, out)
    return out

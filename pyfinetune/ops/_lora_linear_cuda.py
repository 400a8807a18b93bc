"""The CUDA C++ backend of `lora_linear` (csrc/cuda/lora_linear.cu): the product reads codes, W is never decoded.

    forward    Y = X W^T + s (X A^T) B^T + bias      one kernel behind X A^T
    backward   dX = dY W + s (dY B) A                one kernel behind dY B

Decoding all of W and the library's product is the other way, and the better one for many rows: which of the two a
call takes is `MEASURED`'s to say. It has no entry yet, so that this backend runs where it is forced by name, and where
a GPU has no Triton.
"""

from __future__ import annotations

import torch

from pyfinetune._native import capsule, native, packed_fields
from pyfinetune.ops._cuda import capability_of, cuda_why_not, stream_of
from pyfinetune.ops._layout import rows_apart
from pyfinetune.ops._lora_linear_cpu import BASE_ARGS
from pyfinetune.ops._triton import triton_why_not

MAX_ROWS = 1024
_DTYPES = (torch.float16, torch.bfloat16)

# By compute capability, pairs of elements of a weight and rows of x: for a weight of at least so many elements, up to
# so many rows the fused product was measured to be faster than decoding and the library's. First match.
MEASURED: dict[int, tuple[tuple[int, int], ...]] = {}


def why_not(x, weight, *rest) -> str | None:
    """The reason why the kernels cannot take the arguments of `lora_linear`, or None."""
    absmax, (dropout_p, _seed, magnitude) = rest[0], rest[BASE_ARGS + 2 : BASE_ARGS + 5]
    if absmax is None:
        return "the weight is not in 4 bits"
    if magnitude is not None or dropout_p:
        return f"no kernel with {'dropout' if magnitude is None else 'a magnitude'}"
    if x.shape[0] > MAX_ROWS:
        return f"x has {x.shape[0]} rows, the kernels take up to {MAX_ROWS}"
    if x.dtype not in _DTYPES:
        return f"no kernel for {str(x.dtype).removeprefix('torch.')}"
    return cuda_why_not(x, weight)


def yields(x, weight, *rest) -> str | None:
    """The reason to leave the call to decoding and the library's product, or None."""
    if triton_why_not(x, weight) is not None:
        return None  # nothing else here would decode on the GPU
    capability, elements = capability_of(x.device.index), rest[BASE_ARGS - 2] * x.shape[1]
    for least, rows in MEASURED.get(capability, ()):
        if elements >= least:
            return None if x.shape[0] <= rows else f"measured on sm_{capability}: slower above {rows} rows"
    return f"not measured on sm_{capability} for this shape; decoding and the library's product is the default"


def _fields(base) -> tuple:
    return packed_fields(base[:6], base[6], base[7])


def forward(x, *args, path: str = "chosen"):
    """Schema: see `lora_linear`. Returns y, s = x A^T, and two empty tensors.

    `path` is "vector" (up to 8 rows, without the matrix unit), "tensor", or "chosen" by the number of rows.
    """
    base, (lora_a, lora_b, scaling, *_unused, bias) = args[:BASE_ARGS], args[BASE_ARGS:]
    x, out_features = rows_apart(x), int(base[-1])
    y = x.new_empty((x.shape[0], out_features))
    s, b = x.new_empty(0), None
    if lora_a is not None:
        s = torch.mm(x, lora_a.detach().to(x.dtype).T)
        b = rows_apart(lora_b.detach().to(x.dtype))
    low = (None, None) if b is None or not b.shape[1] else (capsule(s), capsule(b))
    bias = None if bias is None else capsule(bias.detach().to(x.dtype).contiguous())
    sizes = (out_features, x.shape[1])
    native.cuda_lora_linear(_fields(base), *sizes, capsule(x), capsule(y), *low, bias, scaling, path, stream_of(x))
    return y, s, x.new_empty(0), x.new_empty(0, dtype=torch.float32)


def backward(dout, x, *args):
    """Schema: see `lora_linear_bwd`."""
    base, (lora_a, lora_b, scaling, *_adapter) = args[:BASE_ARGS], args[BASE_ARGS : BASE_ARGS + 6]
    s, _z, _norm, *needs = args[BASE_ARGS + 6 :]
    need_dx, _need_dweight, need_da, need_db, need_dbias, _need_dmagnitude = needs
    empty = [x.new_empty(0, dtype=x.dtype if like is None else like.dtype) for like in (x, x, lora_a, lora_b, x, None)]
    dx, dweight, da, db, dbias, dmagnitude = empty
    dout, low, factor = rows_apart(dout), None, None
    if lora_a is not None and (need_dx or need_da):
        low, factor = torch.mm(dout, lora_b.detach().to(x.dtype)), rows_apart(lora_a.detach().to(x.dtype))
    if need_dx:
        dx = x.new_empty(x.shape)
        pair = (None, None) if low is None or not low.shape[1] else (capsule(low), capsule(factor))
        sizes = (dout.shape[1], x.shape[1])
        native.cuda_lora_linear_bwd(_fields(base), *sizes, capsule(dout), capsule(dx), *pair, scaling, stream_of(x))
    if need_da:
        da = torch.mm(low.T, x).mul_(scaling).to(lora_a.dtype)
    if need_db:
        db = torch.mm(dout.T, s).mul_(scaling).to(lora_b.dtype)
    if need_dbias:
        dbias = dout.sum(dim=0, dtype=torch.float32).to(x.dtype)
    return dx, dweight, da, db, dbias, dmagnitude

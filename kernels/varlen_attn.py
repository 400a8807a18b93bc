"""Triton: attention over packed documents, its launches; kernels/_varlen_attn_device.py has the maths and the tiling.

Nothing here reads a tensor's values: the tiles are listed on the device, in a buffer with room for as many as there can
be, and a program that finds no tile in its slot ends at once. A call never waits for the GPU, and graphs can hold it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton

from pyfinetune.kernels._varlen_attn_device import (
    TILE_FIELDS,
    _varlen_attn_bwd_dkv_kernel,
    _varlen_attn_bwd_dq_kernel,
    _varlen_attn_fwd_kernel,
    _varlen_attn_tiles_kernel,
)
from pyfinetune.kernels.config import INTERPRETER, Compilation, Config, Family, capability_of

_WIDEST = (1 << 30) - 1  # a wider window is none: documents have fewer rows, and the sum of both fits into int32
_SLOTS = 128  # of the list of tiles, to a program
_LOG2E = math.log2(math.e)

# (BLOCK_M queries, BLOCK_N keys, warps, stages) by the wider head_dim, for 16-bit elements. Per product of a tile the
# arithmetic grows with the tile's area and what is read with its edge, so: the largest tile whose sums stay in
# registers (64 K of 32 bits to a multiprocessor), then as many stages as shared memory holds.
# mma (80, 86, 89, 120): a tile of at least head_dim rows has each warp on rows of its own, and p goes from one product
# into the next in registers; of fewer, the warps share rows and p goes through shared memory.
# Those further back are for what needs more registers: a window to the left, a softcap, a head_dim that is padded.
_MMA = {
    "fwd": {64: [(64, 64, 4, 3)], 128: [(128, 64, 8, 3), (128, 32, 8, 3)], 256: [(64, 32, 8, 2)]},
    "dq": {64: [(64, 64, 4, 2)], 128: [(128, 32, 8, 2)], 256: [(32, 32, 4, 2)]},
    "dkv": {64: [(32, 64, 4, 2)], 128: [(32, 128, 8, 2), (16, 128, 8, 2), (16, 64, 4, 2)], 256: [(32, 32, 8, 2)]},
}
# wgmma (90): operands are read from shared memory, so tiles are larger; four warps take 64 rows.
_WGMMA = {
    "fwd": {64: [(128, 64, 4, 3)], 128: [(128, 128, 8, 2)], 256: [(128, 64, 8, 2)]},
    "dq": {64: [(64, 64, 4, 2)], 128: [(128, 64, 8, 2)], 256: [(128, 32, 8, 2)]},
    "dkv": {64: [(64, 128, 8, 2)], 128: [(64, 128, 8, 2), (32, 128, 8, 2)], 256: [(16, 64, 8, 2), (32, 32, 8, 2)]},
}
# tcgen05 (100): the same, and sums are in a memory of their own; what the forward makes of scores needs the registers.
_TCGEN05 = _WGMMA | {"fwd": {64: [(128, 64, 4, 3)], 128: [(128, 64, 8, 3)], 256: [(128, 32, 8, 2)]}}
# float32 has no tensor cores at full precision: its products are plain multiply-adds out of registers.
_FLOAT32 = {64: [(32, 32, 8, 1)], 128: [(16, 32, 8, 1)], 256: [(16, 16, 8, 1)]}
# Small enough for the interpreter to meet boundaries in small inputs, and not square.
_INTERPRETED = [(64, 32, 4, 2)]
_SMALLEST = (16, 16, 4, 1)


@functools.cache
def configs(kernel: str, capability: int, dim: int, dim_v: int, itemsize: int, crowded: bool) -> list[Config]:
    """The configurations of "fwd", "dq" or "dkv", best first.

    Args:
        kernel: which.
        capability: of the GPU, such as 86; `INTERPRETER` for none.
        dim, dim_v: head_dim of q and k, and of v, padded.
        itemsize: bytes of an element.
        crowded: whether the kernel does more than the plain causal one, and needs more registers.
    """
    size = max(64, dim, dim_v)
    if capability == INTERPRETER:
        sizes = _INTERPRETED
    elif itemsize == 4:
        sizes = _FLOAT32[size]
    else:
        sizes = _tensor_cores(capability)[kernel][size]
    tighter = crowded + (capability >= 120 and kernel == "dkv")  # compiled for sm_120 the plain one spills, too
    chosen = sizes[min(tighter, len(sizes) - 1)]
    return [_config(kernel, capability, *each, dim, dim_v, itemsize) for each in (chosen, _SMALLEST)]


def _tensor_cores(capability: int) -> dict:
    """The table for a GPU's: sm_120, which consumers have, takes operands from registers as those before sm_90 do."""
    if 90 <= capability < 120:
        return _WGMMA if capability < 100 else _TCGEN05
    return _MMA


def _config(kernel, capability, block_m, block_n, warps, stages, dim, dim_v, itemsize) -> Config:
    """With all operands in shared memory: those of the loop once for each stage in flight, the others once."""
    looped, kept = (block_m, block_n * (dim + dim_v)) if kernel == "dkv" else (block_n, block_m * (dim + dim_v))
    if kernel == "fwd":
        kept = block_m * dim
    tensor_cores = _tensor_cores(capability)
    if tensor_cores is _TCGEN05 or (block_n if kernel == "dkv" else block_m) < max(dim, dim_v):
        kept += 2 * block_m * block_n  # p and ds on their way from one product into the next
    in_flight = max(stages - 1, 1) if tensor_cores is _MMA else stages
    shared = itemsize * (in_flight * looped * (dim + dim_v) + kept) + 2 * 4 * block_m * stages  # lse and delta
    # A branch around the mask keeps products apart that mma wants to see together; there the mask is cheap beside them.
    branch = int(tensor_cores is not _MMA or capability == INTERPRETER)
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BRANCH": branch}, warps, stages, shared)


def _class(itemsize: int, constants: dict[str, Any]) -> tuple[int, ...]:
    dims = constants["PADDED"], constants["PADDED_V"]
    crowded = constants["HAS_LEFT"] or constants["HAS_CAP"] or dims != (constants["DIM"], constants["DIM_V"])
    return itemsize, *dims, int(crowded)


def _candidates(kernel: str, capability: int, itemsize: int, dim: int, dim_v: int, crowded: int) -> list[Config]:
    return configs(kernel, capability, dim, dim_v, itemsize, bool(crowded))


_FIELDS = ("itemsize", "dim", "dim_v", "crowded")
_FAMILIES = {
    kernel: Family(f"varlen_attn_{kernel}", _FIELDS, functools.partial(_candidates, kernel)) for kernel in _MMA
}


def padded(dim: int) -> int:
    """The power of two that holds a head's elements; a product's sides have at least 16."""
    return max(16, triton.next_power_of_2(dim))


def _config_for(kernel: str, q: torch.Tensor, constants: dict[str, Any]) -> Config:
    return _chosen(kernel, capability_of(q), q.element_size(), constants)


def _chosen(kernel: str, capability: int, itemsize: int, constants: dict[str, Any]) -> Config:
    return _FAMILIES[kernel].choose(capability, *_class(itemsize, constants))


def _slots(rows: int, documents: int, block: int) -> int:
    """How many tiles there can be: a document begins at most one that is not full, the rows past the last too."""
    return rows // block + documents + 1


def _list_tiles(cu_seqlens_q, cu_seqlens_k, total_q: int, total_k: int, block_q: int, block_k: int | None):
    """The tiles of queries and of keys, int32 [slots, TILE_FIELDS] each; no keys where `block_k` is None."""
    documents = cu_seqlens_q.shape[0] - 1
    slots_q = _slots(total_q, documents, block_q)
    slots_k = 0 if block_k is None else _slots(total_k, documents, block_k)
    tiles_q, tiles_k = (
        torch.empty((slots, TILE_FIELDS.value), dtype=torch.int32, device=cu_seqlens_q.device)
        for slots in (slots_q, slots_k)
    )
    grid = (triton.cdiv(max(slots_q, slots_k), _SLOTS), 1 if block_k is None else 2)
    _varlen_attn_tiles_kernel[grid](
        tiles_q,
        tiles_k,
        cu_seqlens_q,
        cu_seqlens_k,
        total_q,
        total_k,
        documents,
        slots_q,
        slots_k,
        documents.bit_length(),
        BLOCK_Q=block_q,
        BLOCK_K=block_k or block_q,
        SLOTS=_SLOTS,
        num_warps=4,
    )
    return tiles_q, tiles_k


def _options(q, k, v, causal: bool, scale: float, left: int, right: int, softcap: float) -> tuple[list, dict[str, Any]]:
    """(score_scale, cap, window_left, window_right) and the constants of every kernel."""
    right = 0 if causal else right  # a window open to the right shows a causal query nothing more
    unit = 1.0 if q.dtype == torch.float32 else _LOG2E
    score_scale, cap = (scale / softcap, softcap * unit) if softcap else (scale * unit, 0.0)
    constants = {
        "GROUP": q.shape[1] // k.shape[1],
        "DIM": q.shape[2],
        "DIM_V": v.shape[2],
        "PADDED": padded(q.shape[2]),
        "PADDED_V": padded(v.shape[2]),
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_CAP": softcap != 0.0,
    }
    return [score_scale, cap, min(left, _WIDEST), min(right, _WIDEST)], constants


def varlen_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, causal: bool, scale: float, left: int, right: int, softcap: float
) -> None:
    """Attention of every document, into `out` and `lse`.

    Args:
        q: [total_q, num_heads, head_dim]; k, v [total_k, num_kv_heads, head_dim and head_dim_v]; the last stride is 1.
        cu_seqlens_q, cu_seqlens_k: int32 [documents + 1], contiguous.
        out: [total_q, num_heads, head_dim_v], contiguous, as are lse: float32 [num_heads, total_q].
        causal, scale, left, right, softcap: as the op has them.
    """
    scalars, constants = _options(q, k, v, causal, scale, left, right, softcap)
    config = _config_for("fwd", q, constants)
    block = config.blocks["BLOCK_M"]
    tiles, _ = _list_tiles(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], block, None)
    _varlen_attn_fwd_kernel[(tiles.shape[0], q.shape[1])](
        q,
        k,
        v,
        out,
        lse,
        tiles,
        *_strides(q, k, v),
        out.stride(0),
        q.shape[0],
        *scalars,
        **constants,
        **config.options(),
    )


def varlen_attn_bwd(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    dq,
    dk,
    dv,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> None:
    """Gradients of every document, into those of `dq`, `dk`, `dv` that are not None.

    Args:
        dout: the gradient of out, its last stride 1; out and lse contiguous, as `varlen_attn` made them.
        dq, dk, dv: contiguous, in the shapes of q, k, v.
        The others: see `varlen_attn`.
    """
    total_q, num_heads, _ = q.shape
    scalars, constants = _options(q, k, v, causal, scale, left, right, softcap)
    dq_config, dkv_config = _config_for("dq", q, constants), _config_for("dkv", q, constants)
    blocks = dq_config.blocks["BLOCK_M"], dkv_config.blocks["BLOCK_N"]
    tiles_q, tiles_k = _list_tiles(cu_seqlens_q, cu_seqlens_k, total_q, k.shape[0], *blocks)
    strides = _strides(dout, q, k, v)
    delta = lse
    if dq is not None or dk is not None:
        delta = torch.empty_like(lse)
        # dk needs delta, which comes with dq: asked for alone it gets the same bits so.
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if dq is None else dq
        _varlen_attn_bwd_dq_kernel[(tiles_q.shape[0], num_heads)](
            dout,
            q,
            k,
            v,
            out,
            lse,
            delta,
            dq,
            tiles_q,
            *strides,
            out.stride(0),
            dq.stride(0),
            total_q,
            scale,
            *scalars,
            **constants,
            **dq_config.options(),
        )
    if dk is None and dv is None:
        return
    _varlen_attn_bwd_dkv_kernel[(tiles_k.shape[0], k.shape[1])](
        dout,
        q,
        k,
        v,
        lse,
        delta,
        k if dk is None else dk,
        v if dv is None else dv,
        tiles_k,
        *strides,
        k.shape[1] * k.shape[2],
        v.shape[1] * v.shape[2],
        total_q,
        scale,
        *scalars,
        **constants,
        NEED_DK=dk is not None,
        NEED_DV=dv is not None,
        **dkv_config.options(),
    )


def describe(capability: int, q, k, v, *options) -> list[str]:
    """How both directions would be launched, for `pf.explain`; `options` as `varlen_attn` takes them."""
    _scalars, constants = _options(q, k, v, *options)
    of_class = _class(q.element_size(), constants)
    return [family.describe(capability, *of_class) for family in _FAMILIES.values()]


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of rows and heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


# What people fine-tune: (head_dim, head_dim_v, query heads to a key head, window to the left, softcap).
_TYPICAL = {
    "d64": (64, 64, 3, False, False),
    "d128": (128, 128, 4, False, False),
    "d128 window": (128, 128, 4, True, False),
    "d80": (80, 80, 1, False, False),
    "d192/128": (192, 128, 1, False, False),
    "d256 softcap": (256, 256, 2, True, True),
}
_KERNELS = {
    "fwd": _varlen_attn_fwd_kernel,
    "dq": _varlen_attn_bwd_dq_kernel,
    "dkv": _varlen_attn_bwd_dkv_kernel,
}


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel as it is launched for typical models."""
    signature = {name: "i32" for name in _varlen_attn_tiles_kernel.arg_names if not name.isupper()}
    signature |= {name: "*i32" for name in signature if name.endswith("_ptr")}
    tiles = Config({}, 4, 2)
    sizes = {"BLOCK_Q": 128, "BLOCK_K": 64, "SLOTS": _SLOTS}
    yield Compilation("varlen_attn tiles", _varlen_attn_tiles_kernel, signature, sizes, tiles)
    for kernel, function in _KERNELS.items():
        for shape, (dim, dim_v, group, window, softcap) in _TYPICAL.items():
            constants = {"GROUP": group, "DIM": dim, "DIM_V": dim_v, "PADDED": padded(dim), "PADDED_V": padded(dim_v)}
            constants |= {"HAS_LEFT": window, "HAS_RIGHT": True, "HAS_CAP": softcap}
            if kernel == "dkv":
                constants |= {"NEED_DK": True, "NEED_DV": True}
            for element, itemsize in (("bf16", 2), ("fp32", 4)) if shape == "d64" else (("bf16", 2),):
                config = _chosen(kernel, capability, itemsize, constants)
                name = f"varlen_attn {kernel} {shape} {element}"
                signature = _signature(function, element)
                yield Compilation(name, function, signature, constants, config, matmul=element != "fp32")


def _signature(function, element: str) -> dict[str, str]:
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "tiles_ptr": "*i32"}
    types |= dict.fromkeys(("scale", "score_scale", "cap"), "fp32")
    names = [name for name in function.arg_names if not name.isupper()]
    return {name: types.get(name, f"*{element}" if name.endswith("_ptr") else "i32") for name in names}

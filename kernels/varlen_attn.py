"""Triton: attention over packed documents, its launches; kernels/_varlen_attn_device.py has the maths and the tiling.

Nothing here reads a tensor's values: the tiles are listed on the device, in a buffer with room for as many as there can
be, and a program that finds no tile in its slot ends at once. A call never waits for the GPU, and graphs can hold it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from pyfinetune.kernels._varlen_attn_device import (
    _varlen_attn_bwd_dkv_kernel,
    _varlen_attn_bwd_dq_kernel,
    _varlen_attn_fwd_kernel,
)
from pyfinetune.kernels._varlen_attn_short_device import (
    _varlen_attn_bwd_dkv_shared_kernel,
    _varlen_attn_bwd_dq_shared_kernel,
    _varlen_attn_fwd_shared_kernel,
)
from pyfinetune.kernels._varlen_attn_tiles import MEMBER_FIELDS, TILE_FIELDS, _varlen_attn_tiles_kernel
from pyfinetune.kernels.config import INTERPRETER, Compilation, Config, Family, capability_of

_WIDEST = (1 << 30) - 1  # a wider window is none: documents have fewer rows, and the sum of both fits into int32
_SLOTS = 128  # of the list of tiles, to a program
_MOST_LISTERS = 8  # programs; each walks along all documents
_DOCUMENTS = 512  # that it takes at once
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
# What only a measurement can prefer: taller tiles read less, smaller ones leave room for more of them at a time.
_OTHER_MMA = {
    "fwd": {64: [(128, 64, 8, 3)], 128: [(64, 64, 4, 2)]},
    "dq": {64: [(128, 64, 8, 2), (64, 32, 4, 2)], 128: [(64, 32, 4, 2)]},
    "dkv": {64: [(32, 128, 8, 2)], 128: [(32, 64, 4, 2)]},
}
_OTHER_WGMMA = {
    "fwd": {64: [(128, 128, 8, 2), (128, 64, 8, 3)], 128: [(128, 64, 8, 3), (64, 128, 4, 2)]},
    "dq": {64: [(128, 64, 8, 2), (64, 128, 4, 2)], 128: [(64, 64, 4, 2)]},
    "dkv": {64: [(64, 64, 4, 2), (128, 128, 8, 2)], 128: [(64, 64, 4, 2)]},
}
# float32 has no tensor cores at full precision: its products are plain multiply-adds out of registers.
_FLOAT32 = {64: [(32, 32, 8, 1)], 128: [(16, 32, 8, 1)], 256: [(16, 16, 8, 1)]}
# Small enough for the interpreter to meet boundaries in small inputs, and not square.
_INTERPRETED, _OTHER_INTERPRETED = [(64, 32, 4, 2)], [(32, 64, 4, 2)]


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
    size, others = max(64, dim, dim_v), []
    if capability == INTERPRETER:
        sizes, others = _INTERPRETED, _OTHER_INTERPRETED
    elif itemsize == 4:
        sizes = _FLOAT32[size]
    else:
        sizes = _tensor_cores(capability)[kernel][size]
        others = (_OTHER_MMA if _tensor_cores(capability) is _MMA else _OTHER_WGMMA)[kernel].get(size, [])
    tighter = crowded + (capability >= 120 and kernel == "dkv")  # compiled for sm_120 the plain one spills, too
    first = min(tighter, len(sizes) - 1)
    found = [*sizes[first:], *([] if tighter else others)]
    return [_config(kernel, capability, *each, dim, dim_v, itemsize) for each in dict.fromkeys(found)]


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


_Launch = Callable[[Config], None]
_FIELDS = ("itemsize", "dim", "dim_v", "crowded")
_FAMILIES = {
    kernel: Family(f"varlen_attn_{kernel}", _FIELDS, functools.partial(_candidates, kernel)) for kernel in _MMA
}


def padded(dim: int) -> int:
    """The power of two that holds a head's elements; a product's sides have at least 16."""
    return max(16, triton.next_power_of_2(dim))


def _config_for(
    kernel: str, q: torch.Tensor, constants: dict[str, Any], launch: Callable[[Config], None] | None
) -> Config:
    of_class = _class(q.element_size(), constants)
    return _FAMILIES[kernel].choose(capability_of(q), *of_class, launch=launch)


def _shared_config(kernel: str, config: Config, constants: dict[str, Any]) -> Config:
    """That of the kernel for shared tiles, beside the configuration for a document's own."""
    own, other = ("BLOCK_N", "BLOCK_M") if kernel == "dkv" else ("BLOCK_M", "BLOCK_N")
    # Each element that enters a product is looked at in registers, beside the sums, of which dk and dv are two.
    size = max(constants["PADDED"], constants["PADDED_V"])
    tile = min(config.blocks[own], 32 if size > 128 else 64)
    sums = tile * size * (2 if kernel == "dkv" else 1)
    blocks = {"TILE": tile, "STEP": min(config.blocks[other], 32 if sums <= 4096 else 16)}
    return Config(blocks, 8 if kernel == "dkv" else 4, 1, config.shared_bytes)


def _blocks_of(kernel: str, config: Config, shared_config: Config) -> tuple[int, int]:
    """Rows of a tile that a document has for itself, and of a shared one."""
    return config.blocks["BLOCK_N" if kernel == "dkv" else "BLOCK_M"], shared_config.blocks["TILE"]


def _shared_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Without the window, which is in the list of tiles."""
    return {name: value for name, value in constants.items() if name not in ("HAS_LEFT", "HAS_RIGHT")}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one side, as kernels/_varlen_attn_tiles.py lists them.

    Args:
        fields: int32 [slots, TILE_FIELDS], of tiles that one document has for itself.
        members: int32 [slots, MEMBER_FIELDS, tile], of tiles that documents share.
    """

    fields: torch.Tensor
    members: torch.Tensor

    def slots(self) -> tuple[int, int]:
        """How many tiles of each kind there is room for."""
        return self.fields.shape[0], self.members.shape[0]


def _slots(rows: int, other_rows: int, documents: int, block: int, tile: int) -> tuple[int, int]:
    """How many tiles of a document's own and how many shared ones there can be.

    The rows past the last document count as one more. By documents: each has at most one tile that is not full. By
    rows: a long document, whose longer side has n rows, has at most 2 n / tile of them; a short one takes fewer than
    2 n places, and skips fewer than it takes.
    """
    rows_of_both = rows + other_rows
    own = min(rows // block + documents, 2 * rows_of_both // tile) + 1
    return own, min(documents, 4 * rows_of_both // tile) + 1


def _list_tiles(cu_seqlens_q, cu_seqlens_k, totals: tuple[int, int], blocks, window: list) -> list[Tiles]:
    """The tiles of queries, and of keys where `blocks` has two pairs (rows of a document's own, of a shared one)."""
    documents = cu_seqlens_q.shape[0] - 1
    same = cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr()
    sides = []
    for rows, other_rows, (block, tile) in zip(totals, reversed(totals), blocks, strict=False):
        own, shared = _slots(rows, 0 if same else other_rows, documents, block, tile)
        shapes = (own, TILE_FIELDS.value), (shared, MEMBER_FIELDS.value, tile)
        sides.append(Tiles(*(torch.empty(shape, dtype=torch.int32, device=cu_seqlens_q.device) for shape in shapes)))
    queries, keys = sides[0], sides[-1]
    slots = queries.slots(), keys.slots()
    listers = min(triton.cdiv(max(map(sum, slots)), _SLOTS), _MOST_LISTERS)
    _varlen_attn_tiles_kernel[(listers, len(sides))](
        *[x for tiles in (queries, keys) for x in (tiles.fields, tiles.members)],
        cu_seqlens_q,
        cu_seqlens_k,
        *totals,
        documents,
        *[own for own, _ in slots],
        *[shared for _, shared in slots],
        *window,
        BLOCK_Q=blocks[0][0],
        TILE_Q=blocks[0][1],
        BLOCK_K=blocks[-1][0],
        TILE_K=blocks[-1][1],
        DOCUMENTS=_documents_at_once(cu_seqlens_q),
        num_warps=4,
    )
    return sides


def _documents_at_once(cu_seqlens: torch.Tensor) -> int:
    # In Python a scan takes its time for each of them, and several rounds should be met by small inputs.
    return 16 if capability_of(cu_seqlens) == INTERPRETER else _DOCUMENTS


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
    tensors, totals = (q, k, v, out, lse), (q.shape[0], k.shape[0])
    sizes = *_strides(q, k, v), out.stride(0), q.shape[0]

    def launch(config: Config) -> None:
        shared_config = _shared_config("fwd", config, constants)
        blocks = [_blocks_of("fwd", config, shared_config)]
        (tiles,) = _list_tiles(cu_seqlens_q, cu_seqlens_k, totals, blocks, scalars[2:])
        own, shared = tiles.slots()
        _varlen_attn_fwd_kernel[(own, q.shape[1])](
            *tensors, tiles.fields, *sizes, *scalars, **constants, **config.options()
        )
        _varlen_attn_fwd_shared_kernel[(shared, q.shape[1])](
            *tensors, tiles.members, *sizes, *scalars[:2], **_shared_constants(constants), **shared_config.options()
        )

    launch(_config_for("fwd", q, constants, launch))


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
    scalars, constants = _options(q, k, v, causal, scale, left, right, softcap)
    totals, strides = (q.shape[0], k.shape[0]), _strides(dout, q, k, v)
    need_dq, need_dkv = dq is not None or dk is not None, dk is not None or dv is not None
    delta = torch.empty_like(lse) if need_dq else lse
    if need_dq and dq is None:
        # dk needs delta, which comes with dq: asked for alone it gets the same bits so.
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def queries(config: Config, tiles: Tiles) -> None:
        shared_config, (own, shared) = _shared_config("dq", config, constants), tiles.slots()
        tensors = dout, q, k, v, out, lse, delta, dq
        sizes = *strides, out.stride(0), dq.stride(0), q.shape[0], scale
        _varlen_attn_bwd_dq_kernel[(own, q.shape[1])](
            *tensors, tiles.fields, *sizes, *scalars, **constants, **config.options()
        )
        _varlen_attn_bwd_dq_shared_kernel[(shared, q.shape[1])](
            *tensors, tiles.members, *sizes, *scalars[:2], **_shared_constants(constants), **shared_config.options()
        )

    def keys(config: Config, tiles: Tiles) -> None:
        shared_config, (own, shared) = _shared_config("dkv", config, constants), tiles.slots()
        tensors = dout, q, k, v, lse, delta, k if dk is None else dk, v if dv is None else dv
        sizes = *strides, k.shape[1] * k.shape[2], v.shape[1] * v.shape[2], q.shape[0], scale
        known = constants | {"NEED_DK": dk is not None, "NEED_DV": dv is not None}
        _varlen_attn_bwd_dkv_kernel[(own, k.shape[1])](
            *tensors, tiles.fields, *sizes, *scalars, **known, **config.options()
        )
        _varlen_attn_bwd_dkv_shared_kernel[(shared, k.shape[1])](
            *tensors, tiles.members, *sizes, *scalars[:2], **_shared_constants(known), **shared_config.options()
        )

    def listed(*chosen: tuple[str, Config]) -> list[Tiles]:
        blocks = [_blocks_of(kernel, config, _shared_config(kernel, config, constants)) for kernel, config in chosen]
        return _list_tiles(cu_seqlens_q, cu_seqlens_k, totals, blocks, scalars[2:])

    def launch_dq(config: Config) -> None:
        queries(config, listed(("dq", config))[0])

    def launch_dkv(config: Config) -> None:
        keys(config, listed(("dq", dq_config), ("dkv", config))[1])

    dq_config = _config_for("dq", q, constants, launch_dq if need_dq else None)
    dkv_config = _config_for("dkv", q, constants, launch_dkv if need_dkv else None)
    tiles_q, tiles_k = listed(("dq", dq_config), ("dkv", dkv_config))
    if need_dq:
        queries(dq_config, tiles_q)
    if need_dkv:
        keys(dkv_config, tiles_k)


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
    "fwd": (_varlen_attn_fwd_kernel, _varlen_attn_fwd_shared_kernel),
    "dq": (_varlen_attn_bwd_dq_kernel, _varlen_attn_bwd_dq_shared_kernel),
    "dkv": (_varlen_attn_bwd_dkv_kernel, _varlen_attn_bwd_dkv_shared_kernel),
}


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel as it is launched for typical models."""
    signature = {name: "i32" for name in _varlen_attn_tiles_kernel.arg_names if not name.isupper()}
    signature |= {name: "*i32" for name in signature if name.endswith("_ptr")}
    tiles = Config({}, 4, 2)
    sizes = {"BLOCK_Q": 128, "TILE_Q": 128, "BLOCK_K": 64, "TILE_K": 64, "DOCUMENTS": _DOCUMENTS}
    yield Compilation("varlen_attn tiles", _varlen_attn_tiles_kernel, signature, sizes, tiles)
    for kernel, (own, shared) in _KERNELS.items():
        for shape, (dim, dim_v, group, window, softcap) in _TYPICAL.items():
            constants = {"GROUP": group, "DIM": dim, "DIM_V": dim_v, "PADDED": padded(dim), "PADDED_V": padded(dim_v)}
            constants |= {"HAS_LEFT": window, "HAS_RIGHT": True, "HAS_CAP": softcap}
            if kernel == "dkv":
                constants |= {"NEED_DK": True, "NEED_DV": True}
            for element, itemsize in (("bf16", 2), ("fp32", 4)) if shape == "d64" else (("bf16", 2),):
                compiled: list[str] = []
                for config, kind, alternative in _FAMILIES[kernel].instances(capability, *_class(itemsize, constants)):
                    its = _shared_config(kernel, config, constants)
                    launches = [(kernel, own, constants, config)]
                    if str(its) not in compiled:
                        compiled.append(str(its))
                        launches.append((f"{kernel} shared", shared, _shared_constants(constants), its))
                    for which, function, known, its in launches:
                        name = f"varlen_attn {which} {shape} {element}{kind}"
                        signature = _signature(function, element)
                        yield Compilation(
                            *(name, function, signature, known, its), matmul=element != "fp32", alternative=alternative
                        )


def _signature(function, element: str) -> dict[str, str]:
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "tiles_ptr": "*i32", "members_ptr": "*i32"}
    types |= dict.fromkeys(("scale", "score_scale", "cap"), "fp32")
    names = [name for name in function.arg_names if not name.isupper()]
    return {name: types.get(name, f"*{element}" if name.endswith("_ptr") else "i32") for name in names}

"""Triton: what a LoRA linear computes beside the library's GEMM; the kernels are in `_lora_linear_device`.

Each function is one step of the op, on the tensors' device and current stream. A rank beyond what fits one tile is
taken in chunks. Every sum over a long side is split among programs, by shapes and the GPU alone, and added up in a
fixed order. Reference: pyfinetune/ops/lora_linear.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from pyfinetune.kernels._lora_linear_device import (
    _lora_linear_both_kernel,
    _lora_linear_dora_bwd_kernel,
    _lora_linear_dora_fwd_kernel,
    _lora_linear_down_kernel,
    _lora_linear_outer_kernel,
    _lora_linear_sum_kernel,
    _lora_linear_up_kernel,
)
from pyfinetune.kernels._lora_linear_tiles import FAMILIES, class_of, parts_of
from pyfinetune.kernels.config import Compilation, Config, capability_of

SHARED_PASS_RANK = 32  # above it the partial sums of `both` are more bytes than a second pass over G reads
COPY_NONE, COPY_PLAIN, COPY_DROPPED = 0, 1, 2


class Dropout(NamedTuple):
    """What a mask is made from: a 0-d int64 tensor on the device, and the share that is dropped."""

    seed: torch.Tensor
    p: float

    @property
    def threshold(self) -> int:
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        return 1.0 / (1.0 - self.p)


def _choose(kind: str, rank: int, x: torch.Tensor, busy: bool = False, launch=None, aside=None) -> Config:
    of_class = class_of(kind, rank, x.element_size(), busy, *x.shape)
    return FAMILIES[kind].choose(capability_of(x), *of_class, launch=launch, aside=aside)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _split(programs: int, steps: int, device: torch.device) -> tuple[int, int]:
    """(parts, steps of each) of a sum, such that `programs` of them fill the GPU twice; at least four steps each."""
    return parts_of(programs, steps, _multiprocessors(device), 4 if device.type == "cuda" else 1)


def _float32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _add_up(out, part, scale: float, second=None) -> None:
    """out[m, r] = scale * sum over the first dimension of part[splits, m, R], any strides; also into `second`."""
    splits, rows, block_r = part.shape
    block_m = 64
    _lora_linear_sum_kernel[(triton.cdiv(rows, block_m),)](
        out,
        out if second is None else second,
        part,
        rows,
        out.shape[1],
        splits,
        part.stride(0),
        part.stride(1),
        part.stride(2),
        out.stride(0),
        out.stride(1),
        0 if second is None else second.stride(0),
        scale,
        SECOND=second is not None,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        num_warps=4,
    )


def _mask_args(x, dropout: Dropout | None) -> tuple[torch.Tensor, int]:
    return (x, 0) if dropout is None else (dropout.seed, dropout.threshold)


def down(
    x, a, out, scale: float = 1.0, dropout: Dropout | None = None, second=None, copy=None, squares: bool = False
) -> torch.Tensor | None:
    """out[m, r] = scale * keep(x) a^T.

    Args:
        x: [m, k] with contiguous rows.
        a: [r, k], any strides; rounded to x's dtype.
        out: [m, r], any strides.
        scale: applied in float32 to the sum.
        dropout: mask of x; its own scale is not applied.
        second: [m, >= r] with contiguous rows, takes the same.
        copy: [m, k] with contiguous rows: takes x itself.
        squares: also return the sum of squares of each row, float32 [m].
    """
    return _down(x, a, out, scale, dropout, second, copy, COPY_NONE if copy is None else COPY_PLAIN, squares)


def down_dropped(x, a, out, dropout: Dropout, copy) -> None:
    """copy = dropout(x), scaled and rounded; out[m, r] = copy a^T."""
    _down(x, a, out, 1.0, dropout, None, copy, COPY_DROPPED, False)


def _down(x, a, out, scale, dropout, second, copy, how, squares):
    (rows, width), rank = x.shape, a.shape[0]
    if rows == 0:
        return _float32(x, 0) if squares else None
    seed, threshold = _mask_args(x, dropout)

    def launch(config: Config) -> torch.Tensor | None:
        blocks = config.blocks
        parts, steps = _split(triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(width, blocks["BLOCK_K"]), x.device)
        square = _float32(x, parts, rows) if squares else x
        for start in range(0, rank, blocks["BLOCK_R"]):
            chunk = a[start : start + blocks["BLOCK_R"]]
            part = _float32(x, parts, rows, blocks["BLOCK_R"])
            first = start == 0
            _lora_linear_down_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), parts)](
                part,
                x,
                chunk,
                x if copy is None else copy,
                square,
                seed,
                rows,
                width,
                chunk.shape[0],
                x.stride(0),
                chunk.stride(0),
                chunk.stride(1),
                0 if copy is None else copy.stride(0),
                steps,
                threshold,
                1.0 if dropout is None else dropout.scale,
                DROPOUT=dropout is not None,
                QUADS=width % 4 == 0,
                COPY=how if first or how == COPY_DROPPED else COPY_NONE,
                SQUARES=squares and first,
                **config.options(),
            )
            stop = start + chunk.shape[0]
            _add_up(out[:, start:stop], part, scale, None if second is None else second[:, start:stop])
        return square.sum(dim=0) if squares else None

    return launch(_choose("down", rank, x, squares or dropout is not None, launch))


def outer(t, x, out, scale: float = 1.0, dropout: Dropout | None = None) -> None:
    """out[r, k] = scale * t^T keep(x).

    Args:
        t: [m, r] with contiguous rows, of x's dtype.
        x: [m, k] with contiguous rows.
        out: [r, k], any strides.
        scale: applied in float32 to the sum.
        dropout: mask of x; its own scale is not applied.
    """
    (rows, width), rank = x.shape, t.shape[1]
    if width == 0 or rank == 0:
        return
    seed, threshold = _mask_args(x, dropout)

    def launch(config: Config) -> None:
        blocks = config.blocks
        strips = triton.cdiv(width, blocks["BLOCK_K"])
        parts, steps = _split(strips, triton.cdiv(rows, blocks["BLOCK_M"]), x.device)
        for start in range(0, rank, blocks["BLOCK_R"]):
            chunk = t[:, start : start + blocks["BLOCK_R"]]
            part = _float32(x, parts, blocks["BLOCK_R"], width)
            _lora_linear_outer_kernel[(strips, parts)](
                part,
                x,
                chunk,
                seed,
                rows,
                width,
                chunk.shape[1],
                x.stride(0),
                chunk.stride(0),
                steps,
                threshold,
                DROPOUT=dropout is not None,
                QUADS=width % 4 == 0,
                **config.options(),
            )
            _add_up(out[start : start + chunk.shape[1]].T, part.mT, scale)

    launch(_choose("outer", rank, x, dropout is not None, launch))


def both(g, s, b, t, d, scale: float, second=None, copy=None) -> None:
    """t[m, r] = scale * g b and d[n, r] = scale * g^T s, reading g once.

    Args:
        g: [m, n] with contiguous rows.
        s: [m, r] with contiguous rows, of g's dtype.
        b: [n, r], any strides; rounded to g's dtype. r is at most SHARED_PASS_RANK.
        t: [m, r], any strides.
        d: [n, r], any strides.
        scale: applied in float32 to the sums.
        second: [m, >= r] with contiguous rows, takes what t does.
        copy: [m, n] with contiguous rows: takes g itself.
    """
    (rows, width), rank = g.shape, b.shape[1]

    def launch(config: Config) -> None:
        blocks = config.blocks
        strips = triton.cdiv(width, blocks["BLOCK_K"])
        parts, steps = _split(strips, triton.cdiv(rows, blocks["BLOCK_M"]), g.device)
        t_part = _float32(g, strips, rows, blocks["BLOCK_R"])
        d_part = _float32(g, parts, width, blocks["BLOCK_R"])
        _lora_linear_both_kernel[(strips, parts)](
            t_part,
            d_part,
            g,
            s,
            b,
            g if copy is None else copy,
            rows,
            width,
            rank,
            g.stride(0),
            s.stride(0),
            b.stride(0),
            b.stride(1),
            0 if copy is None else copy.stride(0),
            steps,
            COPY=copy is not None,
            **config.options(),
        )
        _add_up(t, t_part, scale, second)
        _add_up(d, d_part, scale)

    launch(_choose("both", rank, g, launch=launch))


def up(out, s, b, scale: float, onto=None, inner=None, dropout: Dropout | None = None) -> None:
    """out[m, k] = onto + scale * keep(inner + s b^T).

    Args:
        out: [m, k] with contiguous rows; may be `onto`.
        s: [m, r] with contiguous rows, of out's dtype; None without an update.
        b: [k, r], any strides; rounded to s's dtype.
        scale: applied in float32 to the sum.
        onto, inner: [m, k] with contiguous rows, or None.
        dropout: mask of the sum; its own scale is not applied.
    """
    rows, width = out.shape
    if out.numel() == 0:
        return
    seed, threshold = _mask_args(out, dropout)

    def launch(config: Config, to=out) -> None:
        grid = triton.cdiv(rows, config.blocks["BLOCK_M"]), triton.cdiv(width, config.blocks["BLOCK_K"])
        _lora_linear_up_kernel[grid](
            to,
            out if onto is None else onto,
            out if inner is None else inner,
            out if s is None else s,
            out if s is None else b,
            seed,
            rows,
            width,
            0 if s is None else s.shape[1],
            to.stride(0),
            0 if onto is None else onto.stride(0),
            0 if inner is None else inner.stride(0),
            0 if s is None else s.stride(0),
            0 if s is None else b.stride(0),
            0 if s is None else b.stride(1),
            scale,
            threshold,
            ONTO=onto is not None,
            INNER=inner is not None,
            ADAPTER=s is not None,
            DROPOUT=dropout is not None,
            QUADS=width % 4 == 0,
            **config.options(),
        )

    # A measurement must not add to what it reads.
    aside = functools.partial(torch.empty_like, out)
    launch(_choose("up", 16 if s is None else s.shape[1], out, dropout is not None, launch, aside))


def dora(y, z, s, b, scale: float, factor, base=None, bias=None) -> None:
    """z += scale * s b^T; y = factor * z + (base - what z was) + bias.

    Args:
        y, z, base: contiguous [m, n]; base may be None.
        s: [m, r] with contiguous rows, of y's dtype.
        b: [n, r], any strides; rounded to s's dtype.
        scale: applied in float32 to the sum.
        factor: float32 [n], contiguous.
        bias: [n], contiguous, or None.
    """
    rows, width = y.shape
    if y.numel() == 0:
        return

    def launch(config: Config, z=z) -> None:
        grid = triton.cdiv(rows, config.blocks["BLOCK_M"]), triton.cdiv(width, config.blocks["BLOCK_K"])
        _lora_linear_dora_fwd_kernel[grid](
            y,
            z,
            y if base is None else base,
            factor,
            factor if bias is None else bias,
            s,
            b,
            rows,
            width,
            s.shape[1],
            s.stride(0),
            b.stride(0),
            b.stride(1),
            scale,
            BASE=base is not None,
            BIAS=bias is not None,
            **config.options(),
        )

    launch(_choose("dora", s.shape[1], y, launch=launch, aside=z.clone))


def dora_bwd(g, dout, z, factor) -> torch.Tensor | None:
    """g = factor * dout; the sums of dout * z by column, float32 [n], where z is given.

    Args:
        g, dout, z: [m, n] with contiguous rows; z may be None.
        factor: float32 [n], contiguous.
    """
    rows, width = dout.shape
    config = Config({"BLOCK_M": 32, "BLOCK_K": 128}, num_warps=4)
    parts, steps = _split(triton.cdiv(width, 128), triton.cdiv(rows, 32), dout.device)
    part = None if z is None else torch.zeros((parts, width), dtype=torch.float32, device=dout.device)
    if dout.numel():
        _lora_linear_dora_bwd_kernel[(triton.cdiv(width, 128), parts)](
            g,
            factor if part is None else part,
            dout,
            dout if z is None else z,
            factor,
            rows,
            width,
            g.stride(0),
            dout.stride(0),
            0 if z is None else z.stride(0),
            steps,
            MAGNITUDE=z is not None,
            **config.options(),
        )
    return None if part is None else part.sum(dim=0)


def describe(
    capability: int, x: torch.Tensor, rank: tuple[int, int], out_features: int, packed: bool, dropout: bool, dora: bool
) -> list[str]:
    """How the products of a rank would be launched in both directions, for `pf.explain`.

    Args:
        capability: of the GPU.
        x: [m, in].
        rank: the projection's own, and that of all which share x with it.
        out_features: of the projection.
        packed, dropout, dora: whether its base is in 4 bits, and what its adapter has.
    """
    (rows, width), (own, shared) = x.shape, rank
    if not own:
        return []
    wanted = [("down", shared, dropout, width)]
    if dora:
        wanted.append(("dora", own, False, out_features))
    elif not packed:
        wanted.append(("up", own, False, out_features))
    if own <= SHARED_PASS_RANK:
        wanted.append(("both", own, False, out_features))
    else:
        wanted += [("down", own, False, out_features), ("outer", own, False, out_features)]
    wanted.append(("outer", shared, dropout, width))
    if dropout or not packed:
        wanted.append(("up", shared, dropout, width))
    classes = ((kind, class_of(kind, r, x.element_size(), busy, rows, columns)) for kind, r, busy, columns in wanted)
    return [FAMILIES[kind].describe(capability, *of_class) for kind, of_class in classes]


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel as it is launched for a model's layers: see `kernels.config.Compilation`."""
    for rank in (16, 32, 64, 128):
        for dropout in (False, True):
            yield from _instances(capability, "bf16", rank, dropout)
    yield from _instances(capability, "fp32", 16, True)


def _instances(capability: int, dtype: str, rank: int, dropout: bool) -> Iterator[Compilation]:
    """The kernels for one dtype and rank; only those with a mask where there is dropout."""
    itemsize, label = (2, f"{dtype} r{rank}") if dtype == "bf16" else (4, f"{dtype} r{rank}")
    name = f"{label} dropout" if dropout else label

    def made(kind, kernel, pointers, constants, label=None):
        busy = constants.get("DROPOUT", False) or constants.get("SQUARES", False)
        unit = {"down": "a_col_stride"}.get(kind, "b_col_stride")  # A and B as they lie in memory
        constants = {key: value for key, value in {**constants, unit: 1}.items() if key in kernel.arg_names}
        types = {n: pointers.get(n, f"*{dtype}") for n in kernel.arg_names if n.endswith("_ptr")}
        types |= {n: "fp32" for n in kernel.arg_names if n.endswith("scale")}
        rest = set(kernel.arg_names) - set(types) - set(constants) - {"BLOCK_M", "BLOCK_K", "BLOCK_R"}
        types |= {n: "i64" if n in ("threshold", "rows") or n.endswith("stride") else "i32" for n in rest}
        of_class = class_of(kind, rank, itemsize, busy, 8192, 4096)
        for config, apart, alternative in FAMILIES[kind].instances(capability, *of_class):
            title = f"{label or kind} {name}{apart}"
            matmul = dtype == "bf16"
            yield Compilation(title, kernel, types, constants, config, matmul=matmul, alternative=alternative)

    part, seed = {"part_ptr": "*fp32"}, {"seed_ptr": "*i64"}
    flags = {"DROPOUT": dropout, "QUADS": True}
    copy = COPY_DROPPED if dropout and rank == 16 else COPY_PLAIN
    more = {"COPY": copy, "SQUARES": False}
    yield from made("down", _lora_linear_down_kernel, {**part, **seed, "square_ptr": "*fp32"}, flags | more)
    yield from made("outer", _lora_linear_outer_kernel, {**part, **seed}, flags)
    more = {"ONTO": True, "INNER": False, "ADAPTER": True}
    yield from made("up", _lora_linear_up_kernel, seed, flags | more)
    if dropout and dtype == "bf16":
        return
    pointers = {**part, "square_ptr": "*fp32", "seed_ptr": "*i64"}
    norms = flags | {"DROPOUT": False, "COPY": COPY_NONE, "SQUARES": True}
    yield from made("down", _lora_linear_down_kernel, pointers, norms, "norms")
    if rank <= SHARED_PASS_RANK:
        pointers = {"t_part_ptr": "*fp32", "d_part_ptr": "*fp32"}
        yield from made("both", _lora_linear_both_kernel, pointers, {"COPY": True})
    pointers = {"factor_ptr": "*fp32"}
    yield from made("dora", _lora_linear_dora_fwd_kernel, pointers, {"BASE": True, "BIAS": True})
    config = Config({"BLOCK_M": 64, "BLOCK_R": rank}, num_warps=4)
    types = {"out_ptr": f"*{dtype}", "second_ptr": f"*{dtype}", "part_ptr": "*fp32", "scale": "fp32", "rows": "i64"}
    types |= dict.fromkeys(["rank", "splits"], "i32")
    types |= {n: "i64" for n in _lora_linear_sum_kernel.arg_names if n.endswith("stride")}
    yield Compilation(f"sum {name}", _lora_linear_sum_kernel, types, {"SECOND": True, "part_col_stride": 1}, config)
    if rank == 16:
        config = Config({"BLOCK_M": 32, "BLOCK_K": 128}, num_warps=4)
        types = dict.fromkeys(["g_ptr", "dout_ptr", "z_ptr"], f"*{dtype}")
        types |= {"part_ptr": "*fp32", "factor_ptr": "*fp32", "width": "i32", "steps": "i32"}
        types |= dict.fromkeys(["rows", "g_row_stride", "dout_row_stride", "z_row_stride"], "i64")
        yield Compilation(f"dora_bwd {name}", _lora_linear_dora_bwd_kernel, types, {"MAGNITUDE": True}, config)

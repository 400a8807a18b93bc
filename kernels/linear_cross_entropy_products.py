"""Triton: the three products of linear cross-entropy, by a kernel that skips ignored tokens, or by the library.

    logits   z [tokens, V] = h [tokens, H] W^T        BLOCK_M x BLOCK_N tiles of the result, one program each, in
    d_hidden   [tokens, H] = g [tokens, V] W          groups of GROUP_M rows of tiles that share operands in cache;
    d_weight   [V, H]     += g^T [V, tokens] h        programs past the tokens that count, read on the device, return

Which of the two is `own_products`' choice. Reference: pyfinetune/ops/linear_cross_entropy.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from pyfinetune.kernels.config import INTERPRETER, Compilation, Config, Family, Work, size_class

# A100, H100, B200 and their kin: the library's products there use instructions or schedules that Triton's do not.
_LIBRARY = (80, 90, 100, 103, 110)
_LOGITS, _D_HIDDEN, _D_WEIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["start", "num_rows"])
def _linear_cross_entropy_matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    count_ptr,
    a_m_stride,
    a_k_stride,
    b_k_stride,
    b_n_stride,
    c_m_stride,
    start,
    num_rows,
    vocab,
    padded,
    hidden,
    PRODUCT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One of the three products, over the tokens of a chunk that count; programs past those return at once.

    Where the vocabulary is the dimension that stands side by side in memory, masks run to its padded size, which keeps
    vectors whole; what lies between is zero on at least one side.
    """
    kept = tl.maximum(tl.minimum(tl.load(count_ptr) - start, num_rows), 0).to(tl.int32)
    if PRODUCT == _LOGITS:  # h [kept, hidden] times W^T [hidden, vocab]
        size_m, size_n, size_k = kept, padded, hidden
        a_m, a_k, b_k, b_n, c_m, c_n = kept, hidden, hidden, vocab, kept, padded
    elif PRODUCT == _D_HIDDEN:  # g [kept, vocab] times W [vocab, hidden]
        size_m, size_n, size_k = kept, hidden, padded
        a_m, a_k, b_k, b_n, c_m, c_n = kept, padded, vocab, hidden, kept, hidden
    else:  # g^T [vocab, kept] times h [kept, hidden]
        size_m, size_n, size_k = vocab, hidden, kept
        a_m, a_k, b_k, b_n, c_m, c_n = padded, kept, kept, hidden, vocab, hidden

    # Programs go down the rows of GROUP_M tiles before the next column of tiles, whose operands they share in cache.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N)
    if program >= tiles_m * tiles_n:
        return
    if ACCUMULATE and kept == 0:
        return
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    place = program % (GROUP_M * tiles_n)
    tile_m = (group * GROUP_M + place % group_rows) * BLOCK_M
    tile_n = place // group_rows * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)

    # Where the tiles start is counted in int64, places within one in int32, which takes half of the registers.
    a_ptr += tile_m.to(tl.int64) * a_m_stride
    b_ptr += tile_n.to(tl.int64) * b_n_stride
    c_ptrs = c_ptr + tile_m.to(tl.int64) * c_m_stride + tile_n + m[:, None] * c_m_stride + n[None, :]
    a_offsets = m[:, None] * a_m_stride + k[None, :] * a_k_stride  # [BLOCK_M, BLOCK_K]
    b_offsets = k[:, None] * b_k_stride + n[None, :] * b_n_stride  # [BLOCK_K, BLOCK_N]
    a_inside, b_inside = (m < a_m - tile_m)[:, None], (n < b_n - tile_n)[None, :]
    c_inside = (m < c_m - tile_m)[:, None] & (n < c_n - tile_n)[None, :]
    if ACCUMULATE:
        acc = tl.load(c_ptrs, mask=c_inside, other=0.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, size_k, BLOCK_K):
        a = tl.load(a_ptr + a_offsets, mask=a_inside & (k < a_k - begin)[None, :], other=0.0)
        b = tl.load(b_ptr + b_offsets, mask=(k < b_k - begin)[:, None] & b_inside, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptr += BLOCK_K * a_k_stride
        b_ptr += BLOCK_K * b_k_stride
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=c_inside)


def own_products(capability: int, dtype: torch.dtype) -> bool:
    """Whether the products are the kernels of this file, and not the library's.

    Ours skip what is ignored, often half of the tokens, and the library's cannot: its sizes come from the host. That
    is worth having where both use the same instructions. In float32 only the library's products are fast. Under the
    interpreter ours are what is to be tested.
    """
    return capability == INTERPRETER or (dtype != torch.float32 and capability not in _LIBRARY)


# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), best first. 128x128 tiles need 1/64 of an element of operands for each
# multiply-add: 1.1 TB/s at an RTX 3090's rate, 2.6 at a 4090's, about half of what their second-level caches deliver.
# With 128x256 the masks and pointers beside 128 accumulators a thread spill. The smaller ones are for few tokens.
_TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 3),
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (32, 128, 64, 4, 3),
)


def _candidates(capability: int, m: int, n: int, k: int) -> list[Config]:
    """For a product [m, k] x [k, n]."""
    if capability == INTERPRETER:
        # In float32 numpy multiplies by its BLAS, 30 times faster than in float16.
        return [Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP_M": 2, "UPCAST": True})]
    # Compiled for sm_120 the third spills.
    return [_config(m, n, k, *tile) for i, tile in enumerate(_TILES) if i != 2 or capability < 120]


def _config(m: int, n: int, k: int, block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "UPCAST": False}
    tiles_m, tiles_n, steps = triton.cdiv(m, block_m), triton.cdiv(n, block_n), triton.cdiv(k, block_k)
    programs, tile = tiles_m * tiles_n, 2 * (block_m + block_n) * block_k
    # What a program multiplies is whole tiles, be they full or not.
    flops = 2.0 * programs * block_m * block_n * steps * block_k
    moved = 2.0 * (m * k + k * n + m * n)
    work = Work(programs, moved, (stages - 1) * tile, programs * steps * tile, flops, steps, tensor_cores=True)
    registers = (block_m * block_n + (block_m + block_n) * 16) // (32 * warps) + 60
    return Config(blocks, warps, stages, stages * tile + 1024, registers, work)


FAMILY = Family("linear_cross_entropy_matmul", ("m", "n", "k"), _candidates)


@functools.lru_cache(1024)  # each call asks
def _class(m: int, n: int, k: int) -> tuple[int, int, int]:
    return size_class(m, 16, 1 << 14), size_class(n, 64, 1 << 18), size_class(k, 64, 1 << 18)


@dataclass(frozen=True)
class Chunk:
    """Where a chunk stands among the tokens in their new order, and what the kernels know them by.

    Args:
        rows, targets: int64 [N], the index and label of each token, those that count first.
        count: int64 [1], how many count.
        start, size: the chunk's place.
        capability: the GPU's.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    count: torch.Tensor
    start: int
    size: int
    capability: int

    def piece(self, start: int, size: int) -> Chunk:
        """Another chunk of the same tokens."""
        return replace(self, start=start, size=size)


class LibraryProducts:
    """The products by torch, over all tokens of a chunk: rows past those that count are zero on both sides."""

    zeros = True

    def __init__(self, weight: torch.Tensor):
        self.weight, self.vocab = weight, weight.shape[0]

    def logits(self, chunk: Chunk, h, z) -> None:
        torch.mm(h, self.weight.T, out=z[:, : self.vocab])

    def d_hidden(self, chunk: Chunk, g, out) -> None:
        torch.mm(g[:, : self.vocab], self.weight, out=out)

    def d_weight(self, chunk: Chunk, g, h, out) -> None:
        g, beta = g[:, : self.vocab].T, 1 if chunk.start else 0
        if h.is_cuda and h.dtype != torch.float32:
            # Summed in float32 by the product itself: a float16 result could overflow, and rounds once for each chunk.
            torch.addmm(out, g, h, out_dtype=torch.float32, beta=beta, out=out)
        else:
            torch.addmm(out, g.float(), h.float(), beta=beta, out=out)


class OwnProducts:
    """The products by this file's kernel, over the tokens that count."""

    zeros = False

    def __init__(self, weight: torch.Tensor):
        self.weight, (self.vocab, self.width) = weight, weight.shape

    def logits(self, chunk: Chunk, h, z) -> None:
        sizes, weight = (chunk.size, z.shape[1]), self.weight
        strides = (h.stride(0), 1, 1, weight.stride(0), z.stride(0))
        self._launch(chunk, _LOGITS, (h, weight, z), strides, sizes, z.shape[1])

    def d_hidden(self, chunk: Chunk, g, out) -> None:
        sizes, weight = (chunk.size, self.width), self.weight
        strides = (g.stride(0), 1, weight.stride(0), 1, out.stride(0))
        self._launch(chunk, _D_HIDDEN, (g, weight, out), strides, sizes, g.shape[1])

    def d_weight(self, chunk: Chunk, g, h, out) -> None:
        strides = (1, g.stride(0), h.stride(0), 1, out.stride(0))
        accumulate = chunk.start > 0
        sizes = (self.vocab, self.width)
        self._launch(chunk, _D_WEIGHT, (g, h, out), strides, sizes, g.shape[1], accumulate)

    def _launch(self, chunk, product, tensors, strides, sizes, padded, accumulate=False) -> None:
        place = (chunk.start, chunk.size, self.vocab, padded, self.width)
        if not all(sizes):
            return

        def launch(config: Config) -> None:
            tiles = triton.cdiv(sizes[0], config.blocks["BLOCK_M"]) * triton.cdiv(sizes[1], config.blocks["BLOCK_N"])
            _linear_cross_entropy_matmul_kernel[(tiles,)](
                *tensors, chunk.count, *strides, *place, PRODUCT=product, ACCUMULATE=accumulate, **config.options()
            )

        # What adds to its result cannot be done again to be measured.
        of_class = _class(*_sizes(product.value, chunk.size, self.vocab, self.width))
        launch(FAMILY.choose(chunk.capability, *of_class, launch=None if accumulate else launch))


def products_for(weight: torch.Tensor, capability: int) -> LibraryProducts | OwnProducts:
    """The products with a weight [V, H], whose rows are contiguous."""
    return (OwnProducts if own_products(capability, weight.dtype) else LibraryProducts)(weight)


def compilations(capability: int) -> Iterator[Compilation]:
    """The three products in bfloat16, where they are chosen."""
    if not own_products(capability, torch.bfloat16):
        return
    kernel = _linear_cross_entropy_matmul_kernel
    for name, product, ones, result in (
        ("logits", _LOGITS, ("a_k_stride", "b_k_stride"), "*bf16"),
        ("d_hidden", _D_HIDDEN, ("a_k_stride", "b_n_stride"), "*bf16"),
        ("d_weight", _D_WEIGHT, ("a_m_stride", "b_n_stride"), "*fp32"),
    ):
        sizes = _sizes(product.value, 2048, 128256, 4096)
        for accumulate in (False, True) if product == _D_WEIGHT else (False,):
            constants = {"PRODUCT": product, "ACCUMULATE": accumulate} | dict.fromkeys(ones, 1)
            types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": result, "count_ptr": "*i64"}
            for config, label, alternative in FAMILY.instances(capability, *_class(*sizes)):
                fixed = {*constants, *config.blocks}
                signature = {arg: "constexpr" if arg in fixed else types.get(arg, "i32") for arg in kernel.arg_names}
                made = f"{name} accumulate={accumulate}{label}", kernel, signature, constants, config
                yield Compilation(*made, matmul=True, alternative=alternative)


def _sizes(product: int, tokens: int, vocab: int, width: int) -> tuple[int, int, int]:
    """(m, n, k) of a product."""
    return ((tokens, vocab, width), (tokens, width, vocab), (vocab, width, tokens))[product]


def describe(capability: int, tokens: int, vocab: int, width: int, grad: bool) -> list[str]:
    """How the products of a chunk would be launched, for `pf.explain`."""
    names = ("logits", "d_hidden", "d_weight") if grad else ("logits",)
    sizes = (_sizes(product, tokens, vocab, width) for product in range(len(names)))
    return [f"{name}: {FAMILY.describe(capability, *_class(*each))}" for name, each in zip(names, sizes, strict=True)]

"""What a call of an op costs beside its results: floating-point operations, and scratch that no tensor of torch shows.

Read from the arguments' shapes alone, so that `planner` can ask on tensors without memory. The sizes are those that the
backends use: change them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from pyfinetune.ops import _linear_cross_entropy_cpu as head_cpu
from pyfinetune.ops import _linear_cross_entropy_triton as head_triton
from pyfinetune.ops import _lora_linear_cpu as lora_cpu
from pyfinetune.ops import _lora_linear_group as group
from pyfinetune.ops import _lora_linear_triton as lora_triton

# Of csrc/cpu/varlen_attn_bwd.kernel.h and csrc/bindings/varlen_attn.cpp.
_LANES, _KEY_BLOCK, _MOST_BLOCKS, _UNIT_FLOATS, _KEPT_SUMS = 16, 64, 8, 128 << 10, 16 << 20
_LOGITS_PADDING = 64  # of kernels/linear_cross_entropy.py


@dataclass(frozen=True)
class Cost:
    """The cost of one call.

    Args:
        flops: floating-point operations of its matrix products.
        passing: bytes that are held during the call.
        kept: bytes that stay for the next call, by the name of the buffer.
    """

    flops: float = 0.0
    passing: int = 0
    kept: dict[str, int] = field(default_factory=dict)


def cost_of(name: str, args: Sequence, device: str) -> Cost:
    """The cost of a call.

    Args:
        name: of the op, as in `torch.ops.pyfinetune.<name>`.
        args: what its schema takes; only shapes and dtypes are read.
        device: "cpu" or "cuda", whose kernels are meant.
    """
    return _COSTS[name](device, *args) if name in _COSTS else Cost()


def _thin_bytes(k: int, n: int) -> int:
    """Of a product whose one side is the rank (thin_scratch in csrc/cpu/dispatch.h)."""
    return (k + 16) * (n + 128) * 4


def _linear(device: str, x: torch.Tensor, projections: Sequence[tuple], needs: Sequence[Sequence[bool]] | None) -> Cost:
    """Forward, or backward with `needs` of dx and of each projection (weight, lora_a, lora_b)."""
    rows, width, item = x.shape[0], x.shape[1], x.element_size()
    flops, thin, ranks, outs = 0.0, 0, 0, 0
    packed = [p for p in projections if p[1] is not None]
    for i, p in enumerate(projections):
        out, rank = (
            int(p[lora_cpu.BASE_ARGS - 1]),
            0 if p[lora_cpu.BASE_ARGS] is None else p[lora_cpu.BASE_ARGS].shape[0],
        )
        base, down, up = 2.0 * rows * width * out, 2.0 * rows * width * rank, 2.0 * rows * out * rank
        if needs is None:
            flops += base + down + up
            thin = max(thin, _thin_bytes(width, rank), _thin_bytes(rank, out))
        else:
            dx, weight, lora_a, lora_b = needs[i]
            flops += base * (bool(dx) + bool(weight)) + up * (bool(dx or lora_a) + bool(lora_b))
            flops += down * (bool(dx) + bool(lora_a))
            thin = max(thin, _thin_bytes(rows, rank) + _thin_bytes(rank, max(out, width)))
        thin = thin if rank else 0
        ranks, outs = ranks + rank, outs + out
    if device == "cpu":
        # Every A below each other; backward also T, and all dA in one float32 product.
        together = ranks * width * item + (0 if needs is None else ranks * (rows * item + width * 4))
        return Cost(flops, thin + together, {"decoded weight": lora_cpu.SCRATCH_BYTES} if packed else {})
    if not packed:
        return Cost(flops)
    wide = ranks + lora_triton._room(ranks) - ranks
    largest = max(int(p[lora_cpu.BASE_ARGS - 1]) for p in packed)
    if needs is None:
        return Cost(flops, item * (rows + largest) * (width + wide))
    together = item * (outs + wide) * (rows + width)
    fits = len(projections) == 1 or together <= lora_triton.CONCATENATED_BYTES
    return Cost(flops, together if fits else item * largest * width)


def _lora(device, x, *args):
    return _linear(device, x, [args], None)


def _lora_bwd(device, dout, x, *args):
    need_dx, need_dweight, need_da, need_db, *_rest = args[-6:]
    return _linear(device, x, [args], [(need_dx, need_dweight, need_da, need_db)])


def _group(device, *args):
    return _linear(device, args[0], group._projections(args), None)


def _group_bwd(device, douts, *args):
    need_dx, each = group._needs_of(args[-1])
    needs = [(need_dx, need.weight, need.lora_a, need.lora_b) for need in each]
    return _linear(device, args[0], group._projections(args[: group._COUNT]), needs)


def _head(device: str, hidden, weight, needs: Sequence[bool], workspace_bytes: int) -> Cost:
    tokens, width = hidden.shape
    vocab, item = weight.shape[0], hidden.element_size()
    flops = 2.0 * tokens * width * vocab * (1 + bool(needs[0]) + bool(needs[1]))
    if device != "cpu":
        # The same rule as `chunk_rows`, which asks Triton for the padding.
        row = -(-vocab // _LOGITS_PADDING) * _LOGITS_PADDING * item
        budget = max(head_triton.LOGITS_BYTES, vocab * width * 4 // head_triton._OF_D_WEIGHT if needs[1] else 0)
        rows = min(tokens, workspace_bytes // row if workspace_bytes else max(head_triton.MIN_ROWS, budget // row))
        return Cost(flops, max(1, rows) * row)
    plan = head_cpu.Plan.of(tokens, vocab, item, workspace_bytes, bool(needs[1] or needs[2]))
    size = sum(head_cpu.scratch_sizes(head_cpu.scratch_shapes(plan, vocab, width, hidden.dtype, tuple(needs))))
    keeps = size <= head_cpu.REUSED_BYTES
    return Cost(flops, 0 if keeps else size, {"tiles of logits": size} if keeps else {})


def _head_fwd(device, hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes, per_token, *needs):
    return _head(device, hidden, weight, needs, workspace_bytes)


def _head_bwd(device, dout, hidden, weight, labels, bias, ignore_index, softcap, workspace_bytes, *needs):
    return _head(device, hidden, weight, needs, workspace_bytes)


def _pairs(q, cu_seqlens, causal: bool) -> float:
    """Pairs of a query and a key that it sees, with documents of equal length."""
    total = q.shape[0]
    return total * total / max(1, cu_seqlens.shape[0] - 1) * (0.5 if causal else 1.0)


def _attention(device, q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *rest):
    return Cost(2.0 * _pairs(q, cu_seqlens_q, causal) * q.shape[1] * (q.shape[2] + v.shape[2]))


def _attention_bwd(device, dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, *rest):
    flops = 2.0 * _pairs(q, cu_seqlens_q, causal) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])
    total, heads, size = q.shape
    if device != "cpu":
        return Cost(flops, heads * total * 4)
    if not rest[-3] or not _shared_sums(total, max(1, cu_seqlens_q.shape[0] - 1), k.shape[1], size + v.shape[2]):
        return Cost(flops)
    sums = heads * total * (-(-size // _LANES) * _LANES) * 4
    return Cost(flops, 0, {"sums of dq": sums}) if sums <= _KEPT_SUMS else Cost(flops, sums)


def _shared_sums(total: int, documents: int, kv_heads: int, sizes: int) -> bool:
    """Whether documents of equal length are split over several units, whose dq is summed in float32.

    As unit_key_blocks in csrc/cpu/varlen_attn_bwd.kernel.h.
    """
    keys = math.ceil(math.ceil(total / documents) / _KEY_BLOCK)
    blocks = max(1, min(_MOST_BLOCKS, _UNIT_FLOATS // (3 * sizes * _KEY_BLOCK)))
    while blocks > 1 and documents * kv_heads * -(-keys // blocks) < 8 * torch.get_num_threads():
        blocks = (blocks + 1) // 2
    return keys > blocks


_COSTS: dict[str, Callable[..., Cost]] = {
    "lora_linear": _lora,
    "lora_linear_bwd": _lora_bwd,
    "lora_linear_group": _group,
    "lora_linear_group_bwd": _group_bwd,
    "linear_cross_entropy": _head_fwd,
    "linear_cross_entropy_bwd": _head_bwd,
    "varlen_attn": _attention,
    "varlen_attn_bwd": _attention_bwd,
}

"""Where a training step's time goes: the profiler's operators, summed up in a few groups."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch

LINEAR, DECODE, ATTENTION, HEAD = "linear layers", "4-bit decode", "attention", "head and loss"
ELEMENTS, CASTS, OTHER = "norms, gates, rotary", "casts and copies", "other, and the host"
GROUPS = (LINEAR, DECODE, ATTENTION, HEAD, ELEMENTS, CASTS, OTHER)

# The first that fits counts, of an operator's name or, going up, of what called it.
_PATTERNS = [
    (HEAD, r"cross_entropy|log_softmax|nll_loss|LogProb"),
    (ATTENTION, r"varlen_attn|scaled_dot_product|flash_attention|efficient_attention|_softmax"),
    (DECODE, r"dequantize"),
    (LINEAR, r"lora_|^aten::(mm|addmm|bmm|baddbmm|linear|matmul|addmm_|mv|dot)$|gemm_4bit|gemv_4bit|norm_except_dim"),
    (ELEMENTS, r"pyfinetune::(rms_norm|rope|swiglu|geglu|glu)|silu|gelu"),
    (CASTS, r"^aten::(copy_|_to_copy|clone|contiguous|cat|index_select|embedding)"),
    (
        ELEMENTS,
        r"^aten::(mul|add|sub|neg|pow|mean|rsqrt|div|sum|sqrt|exp|cos|sin|masked_fill|where|tanh|dropout|bernoulli)",
    ),
]


def _fits(name: str) -> str | None:
    return next((group for group, pattern in _PATTERNS if re.search(pattern, name)), None)


def _is_of_head(node: Any, vocabulary: int) -> bool:
    """Whether an operator takes something over the whole vocabulary, and does not look tokens up in it."""
    shapes = [shape for shape in node.input_shapes or [] if isinstance(shape, list | tuple)]
    return any(vocabulary in shape for shape in shapes) and not re.search("embedding|index_select", node.name)


def _group(event: Any, vocabulary: int | None) -> str:
    """The group of an operator: the head's by its shapes, else the kernel's that called it, else by its own name."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    if vocabulary is not None and any(_is_of_head(node, vocabulary) for node in chain):
        return HEAD
    found = [group for group in (_fits(node.name) for node in chain) if group is not None]
    for named in (HEAD, DECODE):  # whatever either of them is made of
        if named in found:
            return named
    kernels = [_fits(node.name) for node in chain if node.name.startswith("pyfinetune::")]
    return next((group for group in reversed(kernels) if group is not None), found[0] if found else OTHER)


def time_by_group(call: Callable[[int], Any], device: torch.device, vocabulary: int | None = None) -> dict[str, float]:
    """Milliseconds of one call by group.

    Args:
        call: a function of the call's number, which has run before.
        device: whose time counts.
        vocabulary: entries of the head, by which its products are known from others.

    Returns:
        By name of `GROUPS`; the last holds what no operator accounts for. They add up to the call's own time under the
        profiler, which is a little longer than without it.

    Example:
        >>> time_by_group(lambda i: torch.mm(a, b), torch.device("cpu"))["linear layers"]  # doctest: +SKIP
        12.3
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        start = time.perf_counter()
        call(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - start)
    taken = dict.fromkeys(GROUPS, 0.0)
    for event in profile.events():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if own:
            taken[_group(event, vocabulary)] += own / 1e3
    taken[OTHER] += max(0.0, whole - sum(taken.values()))
    return taken

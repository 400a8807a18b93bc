"""The door to the native module: torch first, then `_C`, and tensors handed over as DLPack capsules.

torch is imported first on purpose: its wheel carries the OpenMP runtime, and the native module then shares that one
copy instead of mapping a second one that would fight it for the cores.
"""

from __future__ import annotations

import torch
from torch.utils.dlpack import to_dlpack

try:
    from pyfinetune import _C
except ImportError as error:
    raise ImportError(
        f"pyfinetune's native module did not load ({error}). Build it with `pip install .` in a checkout, or install a "
        "wheel for this Python version and platform."
    ) from error

native = _C


def capsule(tensor: torch.Tensor | None):
    """The tensor's memory as a DLPack capsule, which keeps that memory alive; None stays None."""
    if tensor is None:
        return None
    return to_dlpack(tensor.detach() if tensor.requires_grad else tensor)


def threads() -> int:
    """How many threads a kernel may use: what torch itself would."""
    return torch.get_num_threads()


def packed_fields(tensors, block_size: int, nested_block_size: int) -> tuple:
    """What the native module takes as one packed 4-bit weight: six capsules and two sizes."""
    # A capsule holds a reference to its tensor's memory, so the contiguous copies live as long as the tuple.
    capsules = [None if tensor is None else capsule(tensor.contiguous()) for tensor in tensors]
    return (*capsules, block_size, nested_block_size)

"""How tensors lie in memory, for kernels that walk them row by row."""

from __future__ import annotations

import torch


def unit_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where neighbours along its last dimension are neighbours in memory, else a contiguous copy.

    Kernels take any strides of the other dimensions, so that views of a larger projection cost no copy.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows that do not overlap; a copy where it has others."""
    tensor = unit_rows(tensor)
    return tensor if tensor.shape[0] <= 1 or tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()

"""Several products of one input, as one op where there are adapters that it takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn


def shared_input(modules: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What each module makes of x.

    Args:
        modules: linear layers, with adapters or without.
        x: their input.
    """
    # A model without adapters must not import what only they need.
    if "pyfinetune.hf.lora_linear" in sys.modules:
        from pyfinetune.hf import lora_linear

        return lora_linear.shared_input(modules, x)
    return [module(x) for module in modules]

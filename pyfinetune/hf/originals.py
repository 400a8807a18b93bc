"""The unpatched model behind a patched one, as a copy."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn


def unpatched_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model in which every swap is taken back; the model itself is not touched.

    Args:
        model: patched or not.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        original = vars(type(module)).get("original")
        if original is not None:
            module.__class__ = original
    if "transformers" in sys.modules:
        from pyfinetune.hf import attention, causal_lm_loss

        for module in twin.modules():
            attention.restore(module)
            causal_lm_loss.restore(module)
    return twin


def dense_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy of an unpatched model in which 4-bit layers are plain linear layers over the decoded weights.

    Args:
        model: it is not touched.
        dtype: that the weights are decoded to; by default each to the one that it had before it was quantized.
    """
    from pyfinetune.linear4bit import Linear4bit
    from pyfinetune.ops import dequantize_4bit

    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Linear4bit):
            packed = module.packed
        elif type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
            from pyfinetune.hf.lora_bnb import packed_of

            packed = packed_of(module)
        else:
            continue
        dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(dequantize_4bit(packed, dtype), requires_grad=False)
        dense.bias = module.bias
        twin.set_submodule(name, dense)
    if "peft" in sys.modules:
        from peft.tuners.lora.layer import Linear as PeftLinear

        for module in twin.modules():
            # PEFT's and our classes for 4-bit bases differ from its plain one in how they reach the weight.
            if hasattr(module, "lora_A") and hasattr(module, "base_layer") and type(module.base_layer) is nn.Linear:
                module.__class__ = PeftLinear
    return twin

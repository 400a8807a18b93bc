"""Adapters over a 4-bit base merged into a plain model of 16-bit (or 32-bit) weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyfinetune.errors import InvalidInput
from pyfinetune.hf.peft_lora import LoraLinear4bit
from pyfinetune.hf.quantizer import decode_rest, forget_quantization, in_dtype, set_dense

if TYPE_CHECKING:
    from peft import PeftModel


def merge_dense(model: PeftModel, dtype: torch.dtype | None = None) -> nn.Module:
    """Merge a model's active adapters into dense weights, which take the place of its 4-bit ones.

    W = round(decode(W4) + scaling * B A), in float32 and rounded once; with DoRA its rows are scaled before the
    rounding. The result computes what the adapter model computes, but for the rounding to its dtype: nothing is
    quantized again.

    Args:
        model: what `get_peft_model` returned, with adapters from `pf.lora_config`. It is used up.
        dtype: float32, float16 or bfloat16 of the result; by default the dtype of the base model.

    Returns:
        The base model, a plain one: `save_pretrained` writes what any tool loads.

    Raises:
        InvalidInput: not a PEFT model, kernels are still patched in, adapters are already merged, or the adapters over
            4-bit layers were made without `pf.lora_config`. The model is then unchanged.

    Example:
        >>> merge_dense(model, torch.bfloat16).save_pretrained("path/to/merged")
    """
    if not hasattr(model, "merge_and_unload"):
        raise InvalidInput(f"merge_dense: model is {type(model).__name__}, needs a PEFT model")
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        _check(name, layer)
    wanted = dtype or getattr(base, "dtype", None)
    for layer in layers.values():
        if isinstance(layer, LoraLinear4bit):
            _merge_layer(layer, wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged", category=UserWarning)
        merged = model.merge_and_unload()
    decode_rest(merged, wanted)
    forget_quantization(merged)
    return in_dtype(merged, dtype)


def _check(name: str, layer: nn.Module) -> None:
    if isinstance(layer, LoraLinear4bit) and type(layer) is not LoraLinear4bit:
        raise InvalidInput(f"merge_dense: {name} is patched; call report.undo() of pf.patch first")
    if layer.merged:
        raise InvalidInput(f"merge_dense: {name} is merged already; call model.unmerge_adapter() first")
    base = layer.get_base_layer()
    if base.weight.dtype == torch.uint8 and not isinstance(layer, LoraLinear4bit):
        raise InvalidInput(
            f"merge_dense: {name} is a {type(layer).__name__} over a 4-bit layer; make the adapters with pf.lora_config"
        )


def _merge_layer(layer: LoraLinear4bit, dtype: torch.dtype | None) -> None:
    """Put the active adapters of a layer into its base, which becomes dense; PEFT then finds them merged."""
    base = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    weight, bias = layer.merged_weight(base.packed, base.bias, names)
    set_dense(base, weight.to(dtype or base.dtype_of_weight), bias)
    base.requires_grad_(False)
    layer.merged_adapters = names

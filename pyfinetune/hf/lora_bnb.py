"""PEFT's LoRA over bitsandbytes' `Linear4bit`, on `pf.ops.lora_linear`; imported only where a model has such layers."""

from __future__ import annotations

import bitsandbytes
import torch
from peft.tuners.lora.bnb import Linear4bit as PeftBnbLinear4bit
from torch import nn

from pyfinetune.hf.lora_linear import FastLora, compute_dtype_of
from pyfinetune.ops import Packed4bit


def replaces(module: nn.Module, base: nn.Module) -> bool:
    """Whether these are exactly the classes that `FastBnbLinear4bit` stands in for."""
    return type(module) is PeftBnbLinear4bit and type(base) is bitsandbytes.nn.Linear4bit


def packed_of(base: nn.Module) -> Packed4bit | None:
    """The weight of a bitsandbytes layer as the ops take it, nothing copied; None if it is not in the plain layout."""
    state = getattr(base.weight, "quant_state", None)
    # On some CPUs bitsandbytes repacks a weight for inference, in place.
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    codes = base.weight.detach().as_subclass(torch.Tensor)
    if codes.dtype != torch.uint8:
        codes = codes.reshape(-1).view(torch.uint8)
    nested, size = (None, None, None), 0
    if state.nested:
        nested, size = (state.state2.absmax, state.state2.code, state.offset), state.state2.blocksize
    shape = tuple(state.shape)
    return Packed4bit(
        codes, state.absmax, state.code, *nested, state.blocksize, size, state.quant_type, shape, state.dtype
    )


class FastBnbLinear4bit(FastLora, PeftBnbLinear4bit):
    """PEFT's LoRA layer over bitsandbytes' `Linear4bit`, on `pf.ops.lora_linear`."""

    label = "bitsandbytes Linear4bit"
    original = PeftBnbLinear4bit

    def _result(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype)  # bitsandbytes answers in x's dtype, under autocast too

    @staticmethod
    def base_weight(base: nn.Module, x: torch.Tensor) -> Packed4bit | None:
        packed, dtype = packed_of(base), compute_dtype_of(x)
        # bitsandbytes computes in its compute_dtype, and decodes to the dtype that the weight had before it casts.
        if (
            packed is None
            or packed.dtype not in (dtype, torch.float32)
            or base.compute_dtype not in (None, x.dtype, dtype)
        ):
            return None
        return packed

    @staticmethod
    def decoded(base: nn.Module) -> torch.Tensor:
        return bitsandbytes.functional.dequantize_4bit(base.weight.detach(), base.weight.quant_state)

    @staticmethod
    def probe_dtype(base: nn.Module) -> torch.dtype:
        return base.compute_dtype or base.weight.quant_state.dtype

    @staticmethod
    def storage(base: nn.Module) -> tuple:
        state = base.weight.quant_state
        return state.dtype, state.quant_type, state.blocksize, state.nested, base.compute_dtype

    @staticmethod
    def base_why_not(base: nn.Module) -> str | None:
        packed = packed_of(base)
        if packed is None:
            return "the base weight is not quantized yet, or is repacked for inference"
        if packed.dtype not in (base.compute_dtype or packed.dtype, torch.float32):
            return (
                f"bitsandbytes computes in {base.compute_dtype} from values rounded to {packed.dtype}; "
                f"set bnb_4bit_compute_dtype={packed.dtype}"
            )
        return None

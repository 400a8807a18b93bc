"""PEFT's LoRA over `Linear4bit`: the layer, and the registration that makes PEFT use it."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import torch

from pyfinetune.errors import InvalidInput, PyfinetuneError
from pyfinetune.linear4bit import Linear4bit
from pyfinetune.ops import Packed4bit, dequantize_4bit, quantize_4bit

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise PyfinetuneError(f"adapters need peft 0.18 or newer ({error}): pip install 'pyfinetune[hf]'") from error


def _needs_float_base(self, *args, **kwargs):
    raise InvalidInput(
        "init_lora_weights: this initialisation rewrites the base weight, which is 4-bit here; use True, 'gaussian' or "
        "'eva', or create the adapter before the base is quantized"
    )


class LoraLinear4bit(PeftLinear):
    """PEFT's LoRA linear layer over a `Linear4bit`.

    Forward, adapters, saving and switching are PEFT's. Merging decodes the base, adds the update in float32 and
    quantizes the sum, which rounds once more; the base as it was is kept aside until `unmerge`, so unmerging is exact.
    """

    _base_before_merge: tuple[Packed4bit, torch.Tensor | None] | None = None

    pissa_init = corda_init = olora_init = mica_init = loftq_init = lora_ga_init = orthogonal_init = _needs_float_base

    def resolve_lora_variant(self, **kwargs):
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None and type(variant) is not DoraLinearVariant:
            raise InvalidInput(f"{type(variant).__name__} does not work over a 4-bit base; use plain LoRA or DoRA")
        return variant

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the 4-bit base weight.

        Args:
            safe_merge: check that the merged weight is finite before it replaces the base.
            adapter_names: which; by default the active ones.

        Raises:
            InvalidInput: an adapter has a bias and the base has none, or `safe_merge` found NaN.
        """
        wanted = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not wanted:
            return
        base = self.get_base_layer()
        packed, bias = self._base_before_merge or (base.packed, base.bias)
        # Always from the base as it was, all adapters in one rounding: merging one by one would round each time.
        names = [*self.merged_adapters, *wanted]
        weight, new_bias = self.merged_weight(packed, bias, names)
        if safe_merge and not (torch.isfinite(weight).all() and (new_bias is None or torch.isfinite(new_bias).all())):
            raise InvalidInput(f"NaNs detected in the merged weights. The adapter {wanted[-1]} seems to be broken")
        warnings.warn("Merging into a 4-bit weight rounds it again: outputs change slightly", stacklevel=2)
        self._base_before_merge = (packed, None if bias is None else bias.detach())
        merged = quantize_4bit(weight, packed.block_size, packed.quant_type, packed.double_quant)
        base._set_packed(dataclasses.replace(merged, dtype=packed.dtype))
        if new_bias is not None:
            base.bias.data = new_bias.to(base.bias.dtype)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Take all merged adapters out again: the base is bit for bit what it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        packed, bias = self._base_before_merge
        base._set_packed(packed.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self._base_before_merge = None
        self.merged_adapters = []

    def merged_weight(
        self, packed: Packed4bit, bias: torch.Tensor | None, names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [out, in] weight and [out] bias of a base with adapters applied in turn, as `forward` does."""
        base = dequantize_4bit(packed, torch.float32)
        weight, bias = base, None if bias is None else bias.detach().float()
        for name in names:
            lora_a, lora_b, scaling = self.lora_A[name].weight, self.lora_B[name], self.scaling[name]
            delta = scaling * (lora_b.weight.detach().float() @ lora_a.detach().float())
            weight = weight + delta
            if name in self.lora_variant:
                # DoRA's norm is that of the base with this adapter alone, whatever else has been merged.
                magnitude = self.lora_magnitude_vector[name].weight.detach().float()
                weight = (magnitude / (base + delta).norm(dim=1))[:, None] * weight
            if lora_b.bias is not None:
                if bias is None:
                    raise InvalidInput(
                        f"merge: adapter {name!r} has a bias, and the base layer has none to put it into"
                    )
                bias = bias + scaling * lora_b.bias.detach().float()
        return weight, bias


def lora_config(lora_config: LoraConfig) -> LoraConfig:
    """A PEFT `LoraConfig` that knows `Linear4bit`, so that adapters over it merge, unmerge, save and load.

    The registration is not written to disk: a saved adapter is loaded with
    `PeftModel.from_pretrained(model, path, config=pf.lora_config(PeftConfig.from_pretrained(path)))`. Without it the
    adapter runs, and only merging is missing.

    Args:
        lora_config: any LoRA configuration; it is not changed.

    Returns:
        A copy to pass to `get_peft_model` or to a trainer's `peft_config`.

    Raises:
        InvalidInput: not a `LoraConfig`.

    Example:
        >>> model = get_peft_model(pf.quantize(model), pf.lora_config(LoraConfig(target_modules="all-linear")))
    """
    if not isinstance(lora_config, LoraConfig):
        raise InvalidInput(f"lora_config: got {type(lora_config).__name__}, needs a peft.LoraConfig")
    config = copy.copy(lora_config)
    config._custom_modules = dict(config._custom_modules or {})
    config._register_custom_module({Linear4bit: LoraLinear4bit})
    return config

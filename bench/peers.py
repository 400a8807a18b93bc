"""What people would use instead, built as they would build it."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import bitsandbytes
    import peft

PACKAGES = ("bitsandbytes", "peft")


def find(package: str) -> tuple[ModuleType | None, str]:
    """The package and its version, or None and the reason why it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's warnings about its own dependencies are none of ours
            module = importlib.import_module(package)
        return module, importlib.metadata.version(package)
    except ImportError as error:
        return None, f"not installed ({error})"


def why_missing(*packages: str) -> str | None:
    """Why a peer made of these packages cannot run here, or None."""
    found = {package: find(package) for package in packages}
    return "; ".join(f"{package}: {text}" for package, (module, text) in found.items() if module is None) or None


def bnb_linear(weight: torch.Tensor) -> bitsandbytes.nn.Linear4bit:
    """bitsandbytes' 4-bit linear layer with this weight, in training mode."""
    bnb, _ = find("bitsandbytes")
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device).train()


def peft_layer(base: torch.nn.Module, rank: int, dropout: float, dora: bool) -> peft.tuners.lora.LoraLayer:
    """The layer that PEFT makes of `base` in a model of one layer, its adapters randomised, in training mode."""
    peft_, _ = find("peft")
    model = torch.nn.Module()
    model.add_module("linear", base)
    config = peft_.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora, target_modules=["linear"]
    )
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        layer = peft_.get_peft_model(model, config).train().base_model.model.linear
    with torch.no_grad():  # a fresh B is zero, which hides both mistakes and work
        layer.lora_B["default"].weight.normal_(std=0.02)
    return layer


def attention_with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hugging Face's `sdpa` attention over one row of packed documents: a dense mask, K and V repeated.

    Args:
        q, k, v: [tokens, heads, head_dim].
        mask: bool [1, 1, tokens, tokens], which the model makes once for all of its layers.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(1, q.shape[1], *x.shape[2:]) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1).contiguous()


def attention_per_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """One call of torch's causal attention for each document.

    Args:
        q, k, v: [tokens, heads, head_dim].
        bounds: where each document begins, and where the last one ends.
    """
    parts = []
    for start, end in itertools.pairwise(bounds):
        document = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)

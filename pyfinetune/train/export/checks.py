"""What an export's files hold, against what was to be written: every tensor, 4-bit codes, tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyfinetune.errors import NotProved
from pyfinetune.linear4bit import Linear4bit
from pyfinetune.ops import quantize_4bit


def check_tensors(what: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Hold the tensors that were read back against those that were to be written, bit by bit.

    Args:
        what: where they were read from, for the message.
        found: name to tensor.
        expected: the same of what was to be written.

    Returns:
        What was compared, for `export.json`.

    Raises:
        NotProved: a tensor is missing, too many, or differs; names it.

    Example:
        >>> check_tensors("out", load_file("out/model.safetensors"), model.state_dict())  # doctest: +SKIP
    """
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise NotProved(f"{what}: {missing[0]} is missing" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""))
    if surplus:
        raise NotProved(f"{what}: {surplus[0]} is there, and the model has no such tensor")
    for name, want in expected.items():
        have = found[name].detach().cpu()
        want = want.detach().cpu()
        # Some layers of T5 are read to float32 whatever the file has; the values are the same.
        if have.dtype != want.dtype and have.is_floating_point() and want.is_floating_point():
            have, want = have.double(), want.double()
        if have.shape != want.shape or have.dtype != want.dtype:
            raise NotProved(
                f"{what}: {name} is {list(have.shape)} {_name(have.dtype)}, needs {list(want.shape)}"
                f" {_name(want.dtype)}"
            )
        if not torch.equal(have, want):
            differing = int((have != want).sum())
            away = (have.double() - want.double()).abs().max().item()
            raise NotProved(
                f"{what}: {name} differs from what was to be written: {differing:,} of {want.numel():,} values, by"
                f" up to {away:.2e}"
            )
    return {"what": f"tensors of {what}, bit by bit", "tensors": len(expected), "error": 0.0, "allowed": 0.0}


def quantization_of(model: Any) -> dict[str, Any]:
    """How a model is quantized, or would be.

    Args:
        model: with or without adapters, in 4 bits or not.

    Returns:
        Arguments of `pf.quantize`: those of its 4-bit layers, else the default ones.

    Example:
        >>> quantization_of(torch.nn.Linear(4, 4))["block_size"]
        64
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, Linear4bit)}
    if not layers:
        return {"quant_type": "nf4", "double_quant": True, "block_size": 64, "skip": ("lm_head",)}
    first = next(iter(layers.values()))
    own = [name.removesuffix(".base_layer") for name, module in inner.named_modules() if _is_plain(module)]
    parts = ("lora_A", "lora_B", "lora_embedding", "modules_to_save", "lora_magnitude_vector")
    left = [name for name in own if not any(f".{part}." in f".{name}." for part in parts)]
    return {
        "quant_type": first.quant_type,
        "double_quant": first.double_quant,
        "block_size": first.block_size,
        "skip": tuple(dict.fromkeys(["lm_head", *left])),
    }


def _is_plain(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and not isinstance(module, Linear4bit)


def check_codes(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Hold every 4-bit layer that was read back against what the merged weight of its name is quantized to.

    Args:
        model: that was read back.
        weights: name of each linear layer to its merged weight.

    Returns:
        What was compared, for `export.json`.

    Raises:
        NotProved: a code or scale differs; names the layer.

    Example:
        >>> check_codes(torch.nn.Linear(4, 4), {})["tensors"]
        0
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    for name, layer in layers.items():
        have = layer.packed
        want = quantize_4bit(weights[name].to(have.codes.device), have.block_size, have.quant_type, have.double_quant)
        for mine, theirs in zip(have.tensors(), want.tensors(), strict=True):
            equal = mine is theirs is None or (
                mine is not None and theirs is not None and torch.equal(mine.reshape(-1), theirs.reshape(-1))
            )
            if not equal:
                raise NotProved(f"the 4-bit model: {name}.weight is not the merged weight in 4 bits")
    return {"what": "4-bit codes, against the merged weights", "tensors": len(layers), "error": 0.0, "allowed": 0.0}


def check_loading(what: str, loading: dict[str, Any]) -> None:
    """Nothing was missing in the file: what is missing gets fresh values, which may happen to be the right ones.

    Args:
        what: what was loaded, for the message.
        loading: what `from_pretrained` said about it.

    Raises:
        NotProved: a tensor was missing, too many, or of another shape; names it.

    Example:
        >>> check_loading("out", {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []})
    """
    words = {
        "missing_keys": "is missing",
        "unexpected_keys": "is no tensor of the model",
        "mismatched_keys": "has no fit",
    }
    for key, reason in words.items():
        for name in sorted(loading.get(key) or ()):
            raise NotProved(f"{what}: {name[0] if isinstance(name, tuple) else name} {reason}")


def settle_ties(model: Any) -> None:
    """Keep a tied embedding tied where both ends are still equal, and say so in the configuration where they are not.

    Args:
        model: a merged model; its head may have learned apart from its embedding.

    Example:
        >>> settle_ties(merged)  # doctest: +SKIP
    """
    ends = _ends(model)
    if ends is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding, head = ends
    if head.weight is embedding.weight:
        return
    if head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight):
        model.tie_weights()
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def check_ties(found: Any, expected: Any) -> None:
    """The head that was read back is the embedding itself exactly where it was.

    Args:
        found: the model that was read back.
        expected: the model that was written.

    Raises:
        NotProved: one is tied and the other is not.

    Example:
        >>> check_ties(AutoModelForCausalLM.from_pretrained("out"), merged)  # doctest: +SKIP
    """
    tied = [ends is not None and ends[0].weight is ends[1].weight for ends in (_ends(found), _ends(expected))]
    if tied[0] is not tied[1]:
        words = ("tied to", "apart from")
        raise NotProved(
            f"the merged model: its head is {words[not tied[0]]} its embedding, and was {words[not tied[1]]} it before"
        )


def _ends(model: Any) -> tuple[Any, Any] | None:
    """Embedding and head of a language model, where each has a weight."""
    if not hasattr(model, "get_output_embeddings"):
        return None
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return ends if all(getattr(end, "weight", None) is not None for end in ends) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

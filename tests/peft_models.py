"""Tiny models with adapters, and the float64 twin that says what they should compute."""

from __future__ import annotations

import copy

import torch
from oracle import BACKWARD, FORWARD
from torch import nn

import pyfinetune as pf

METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def base_model(arch: str = "llama", dtype: torch.dtype = torch.float32, intermediate_size: int = 128):
    """Two layers of hidden size 64; "qwen2" has biases in q, k and v."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[arch]
    config = kind(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)  # zeros would hide a lost bias
    return model


def to_bitsandbytes(model: nn.Module) -> nn.Module:
    """Every linear layer but the head as bitsandbytes' `Linear4bit`."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        weight, bias = linear.weight, linear.bias
        layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=bias is not None, compute_dtype=weight.dtype)
        layer.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        layer.bias = bias
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True
    return model


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapters as after some training: B is not zero, magnitudes are not the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                parameter.copy_(0.1 * noise)
    return model


def adapted(
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    base: str = "dense",
    *,
    autocast_adapter_dtype: bool = True,
    intermediate_size: int = 128,
    target_modules="all-linear",
    **options,
):
    """A PEFT model with random adapters on every linear layer but the head; base: "dense", "4bit" or "bnb"."""
    from peft import LoraConfig, get_peft_model

    model = base_model(arch, dtype, intermediate_size)
    if base == "4bit":
        pf.quantize(model)
    elif base == "bnb":
        to_bitsandbytes(model)
    config = pf.lora_config(LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, **options))
    return randomise(get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)).train()


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def patch_lora(model: nn.Module):
    """`pf.patch` of the adapter layers alone."""
    return pf.patch(model, kinds=["lora_linear"])


def exact_twin(model: nn.Module) -> nn.Module:
    """The same model in float64, on PEFT's own dense layers over the decoded weights."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    from pyfinetune.hf.lora_bnb import packed_of

    twin = copy.deepcopy(model)
    for layer in lora_layers(twin).values():
        base = layer.base_layer
        if type(base) is nn.Linear:
            continue
        packed = base.packed if isinstance(base, pf.Linear4bit) else packed_of(base)
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        dense.weight = nn.Parameter(pf.ops.dequantize_4bit(packed), requires_grad=False)
        dense.bias = base.bias
        layer.base_layer = dense
        layer.__class__ = PeftLinear
    return twin.double()


def batch(rows: int = 2, length: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 64, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every trainable parameter; `.grad` is left alone."""
    out = model(**inputs)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(out.loss, list(wanted.values()))
    return {"logits": out.logits.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_close(
    ours: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Logits and gradients are as close to the exact ones as eager torch's, in the root mean square.

    Through several layers the largest error is a matter of chance; the norm of the error is not. The factors are the
    oracle's, and so is the ulp.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        factor = FORWARD if name == "logits" else BACKWARD
        error, allowed = ((run[name].double() - truth).norm().item() for run in (ours, eager))
        allowed = factor * allowed + torch.finfo(dtype).eps * truth.norm().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

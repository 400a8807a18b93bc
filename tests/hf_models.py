"""Small random models of many architectures, and what a batch may look like."""

from __future__ import annotations

import contextlib
import copy
import warnings

import torch
from torch import nn

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Class names of configurations, with what makes the model small and its features visible.
CAUSAL = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    | {"experts_implementation": "eager"},  # the grouped product has no float64
    "Gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "Phi3": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Olmo2": {},
    "Granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "GPTNeoX": {"rotary_pct": 0.25},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
ENCODERS = {"Bert": _NO_DROPOUT, "Roberta": _NO_DROPOUT}


def checkpointing() -> str:
    """What transformers calls recomputing activations, in its arguments and methods: the name has changed."""
    from transformers import PreTrainedModel

    newer = "activation_checkpointing"
    return newer if hasattr(PreTrainedModel, f"{newer}_enable") else "gradient_checkpointing"


def enable_checkpointing(model: nn.Module, reentrant: bool) -> None:
    """Recompute activations in the backward pass."""
    getattr(model, f"{checkpointing()}_enable")({"use_reentrant": reentrant})


def disable_checkpointing(model: nn.Module) -> None:
    """Keep activations again."""
    getattr(model, f"{checkpointing()}_disable")()


def make(name: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A model of that architecture with every parameter at random."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **(CAUSAL | ENCODERS)[name], **options})
    torch.manual_seed(0)
    kind = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of one and biases of zero hide mistakes
                parameter.add_(0.2 * torch.randn(parameter.shape).to(dtype))
    return model


def batches(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """A plain batch, a padded one, and for causal models a row of three packed documents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = {"plain": {"input_ids": ids, "labels": ids}, "padded": padded}
    if name in CAUSAL:
        positions = torch.cat([torch.arange(9), torch.arange(1), torch.arange(10)])[None]
        row = ids[:1].clone()
        labels = row.masked_fill(positions == 0, -100)
        found["packed"] = {"input_ids": row, "labels": labels, "position_ids": positions, "use_cache": False}
    return found


def with_lora(model: nn.Module, **options) -> nn.Module:
    """The model with random adapters on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    options = {"fan_in_fan_out": model.config.model_type == "gpt2", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PEFT on a mixture of experts that it knows by another name
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss, the logits of tokens that count, and the gradient of every trainable parameter."""
    out = model(**inputs)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(out.loss, list(wanted.values()), allow_unused=True)
    kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    found = {"loss": out.loss.detach(), "logits": (out.logits + 0).detach()[kept]}
    return found | {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def exact_run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of an unpatched model, in float64 throughout."""
    from pyfinetune.hf.probe import Widened

    with Widened():
        return run(copy.deepcopy(model).double(), inputs)


@contextlib.contextmanager
def no_change_of(model: nn.Module):
    """Parameters, buffers and gradients are the same tensors with the same values afterwards."""
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    yield
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (value, copied) in before.items():
        assert after[name] is value, name
        assert torch.equal(value, copied), name

"""Cases of a whole training step: a small Llama with LoRA, forward and backward, as PEFT runs it and patched."""

from __future__ import annotations

import copy
import functools
import warnings

import torch

import pyfinetune as pf
from pyfinetune.bench import peers
from pyfinetune.bench.harness import OURS, Case, Setup, Target, Verdict

_PEER = "transformers + PEFT"
_RANK = 16
# The shapes of a 135M-parameter Llama, and of one small enough for a quick look.
_FULL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
_QUICK = _FULL | {"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2}
_QUICK |= {"num_attention_heads": 3, "num_key_value_heads": 1}


def _model(shapes: dict[str, int], device: torch.device) -> torch.nn.Module:
    """A random model in bfloat16 with random adapters on every linear layer, as PEFT makes them by default."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shapes, tie_word_embeddings=True, max_position_embeddings=8192)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a fresh B is zero, which hides both mistakes and work
            parameter.normal_(std=0.02)
    return model.train()


def _batch(documents: int, length: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One row of packed documents; a single one needs no positions."""
    ids = torch.randint(vocabulary, (1, documents * length), device=device)
    positions = torch.arange(length, device=device).repeat(documents)[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


def _step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss and every adapter's gradient."""
    with torch.enable_grad():
        loss = model(**batch).loss
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Norm of the difference over all gradients, relative to theirs."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found[1:], exact[1:], strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in exact[1:])) ** 0.5


def build(device: torch.device, shapes: dict[str, int], documents: int, length: int) -> Setup:
    why = peers.why_missing("transformers", "peft")
    if why:
        raise RuntimeError(f"a training step needs transformers and peft: {why}")
    model = _model(shapes, device)
    ours = copy.deepcopy(model)
    report = pf.patch(ours)
    batch = _batch(documents, length, shapes["vocab_size"], device)
    small = _batch(min(documents, 2), min(length, 64), shapes["vocab_size"], device)
    plain = _step(model, small)
    exact = _step(copy.deepcopy(model).float(), small)
    usual = _error(plain, exact)

    def judge(found: list[torch.Tensor]) -> Verdict:
        error, gap = _error(found, exact), abs(float(found[0] - exact[0]))
        allowed = 2 * usual + torch.finfo(torch.bfloat16).eps
        ok = error <= allowed and gap <= 1.5 * abs(float(plain[0] - exact[0])) + torch.finfo(torch.bfloat16).eps
        detail = f"gradients off by {error:.2%} of their norm, {_PEER} by {usual:.2%}; {report.swapped} modules swapped"
        return Verdict(ok, detail)

    calls = {OURS: lambda i: _step(ours, batch), _PEER: lambda i: _step(model, batch)}
    return Setup(calls, {OURS: lambda: judge(_step(ours, small)), _PEER: lambda: judge(plain)})


def _case(documents: int, length: int, target: Target | None, shapes: dict[str, int] = _FULL) -> Case:
    tokens, width = documents * length, shapes["hidden_size"]
    kv = width * shapes["num_key_value_heads"] // shapes["num_attention_heads"]
    layer = 2 * width * (width + kv) + 3 * width * shapes["intermediate_size"]
    products = layer * shapes["num_hidden_layers"] + shapes["vocab_size"] * width
    # Scores and values, once forward and two and a half times backward, half of each masked.
    attention = 7 * length * width * shapes["num_hidden_layers"]
    packed = f"{documents} x {length} tokens packed" if documents > 1 else f"{length} tokens"
    return Case(
        "step",
        f"training step, Llama {'135M' if shapes is _FULL else 'tiny'}, LoRA r {_RANK}, bf16, {packed}",
        functools.partial(build, shapes=shapes, documents=documents, length=length),
        flops=tokens * (4.0 * products + attention),
        target=target,
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows of the table; `quick` is smaller, and without targets, which are stated for the full shapes."""
    if quick:
        return [_case(1, 128, None, _QUICK), _case(4, 64, None, _QUICK)]
    return [
        _case(1, 1024, Target(1.9, 1.7)),
        _case(4, 256, Target(2.2, 1.9)),
        _case(8, 256, Target(3.0, 2.6)),
        _case(16, 256, Target(4.5, 4.0)),
    ]

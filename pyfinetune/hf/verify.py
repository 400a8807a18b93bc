"""`verify`: is a patched model the unpatched one, in numbers?"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.hf.originals import dense_copy, unpatched_copy
from pyfinetune.hf.patch import patch
from pyfinetune.hf.probe import Widened
from pyfinetune.ops._checks import FLOATS
from pyfinetune.parity import Item, Verdict, judge

_FORWARD = ("loss", "logits")
_LEARNING_RATE = 1e-3


def verify(model: nn.Module, batch: Mapping[str, Any] | None = None, steps: int = 3) -> Verdict:
    """Compare a patched model with the unpatched one, and both with the exact result, on copies.

    Logits, loss, every trainable gradient, the losses of a few optimizer steps, and whether a packed document's bits
    move when another document changes. Adapters whose B is still zero are made random first, as they would hide any
    mistake; dropout is off.

    Args:
        model: a Hugging Face model, patched or not; it is not touched.
        batch: what the model is called with, `labels` among it; None for random tokens, two rows of 48.
        steps: number of optimizer steps to compare; 0 for none.

    Returns:
        A verdict: `.ok`, `.items`, `.to_json()`, or print it.

    Raises:
        InvalidInput: not a module, no labels in the batch, or nothing in the model that trains.

    Example:
        >>> verdict = pf.verify(model)
        >>> print(verdict)
        >>> verdict.ok
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"verify: model is {type(model).__name__}, needs an nn.Module")
    batch = _random_batch(model) if batch is None else dict(batch)
    if batch.get("labels") is None:
        raise InvalidInput("verify: batch has no labels, and without a loss there are no gradients to compare")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidInput("verify: no parameter of the model requires a gradient")
    original = unpatched_copy(model).eval()
    _randomise_fresh_adapters(original)
    ours = copy.deepcopy(original)
    report = patch(ours)
    dtype = next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)
    wide = torch.float64 if double_fits(original) else torch.float32
    exact = dense_copy(original).to(wide)
    runs = [_quantities(run, batch) for run in (ours, original)]
    with Widened() if wide is torch.float64 else torch.enable_grad():
        truth = _quantities(exact, batch)
    items = judge(*runs, truth, dtype, _FORWARD)
    notes = [f"{report.swapped} of {len(report.rows)} modules swapped"]
    item, note = _isolation(ours, batch)
    items += [item] if item else []
    notes += [note] if note else []
    if steps:
        runs = [{f"loss after {steps} steps": _train(run, batch, steps)} for run in (ours, original)]
        with Widened() if wide is torch.float64 else torch.enable_grad():
            truth = {f"loss after {steps} steps": _train(exact, batch, steps)}
        items += judge(*runs, truth, dtype)
    return Verdict(tuple(items), str(wide).removeprefix("torch."), str(dtype).removeprefix("torch."), tuple(notes))


def verify_path(name: str, dtype: str = "auto", rank: int = 8, steps: int = 3) -> Verdict:
    """Load a model, give it adapters, and `verify` it.

    Args:
        name: a causal language model's name or folder, or an adapter's of PEFT.
        dtype: to load it in; "auto" for the checkpoint's own.
        rank: of the adapters on every linear layer; 0 for none, so that all parameters train.
        steps: as in `verify`.

    Raises:
        UserError: the model cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if dtype != "auto" and getattr(torch, dtype, None) not in FLOATS:
        raise UserError(f"--dtype {dtype}: needs auto, float32, bfloat16 or float16")
    adapter = os.path.isfile(os.path.join(name, "adapter_config.json"))
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    options = {"is_trainable": True} if adapter else {}
    try:
        model = kind.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"verify: {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if rank and not adapter:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return verify(model, steps=steps)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _random_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    config = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if vocabulary is None:
        raise InvalidInput("verify: the model has no vocabulary; pass a batch")
    ids = torch.randint(vocabulary, (2, 48), generator=torch.Generator().manual_seed(0)).to(_device_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _randomise_fresh_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not bool(parameter.any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def double_fits(model: nn.Module) -> bool:
    """Whether a float64 copy of a model, with its gradients, fits beside it."""
    need = 16 * sum(
        parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1) for parameter in model.parameters()
    )
    device = _device_of(model)
    if device.type == "cuda":
        return need < 0.5 * torch.cuda.mem_get_info(device)[0]
    if not sys.platform.startswith("linux"):
        return need < 2**32
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return need < 0.5 * 1024 * free


def _quantities(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss, logits of tokens that count, and the gradient of each trainable parameter that has one."""
    with torch.enable_grad():
        out = model(**batch)
        wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        grads = torch.autograd.grad(out.loss, list(wanted.values()), allow_unused=True)
    logits = (out.logits + 0).detach()
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool()]
    found = {"loss": out.loss.detach(), "logits": logits}
    return found | {f"grad of {name}": g for name, g in zip(wanted, grads, strict=True) if g is not None}


def _train(model: nn.Module, batch: dict[str, Any], steps: int) -> torch.Tensor:
    """The losses after each of a few optimizer steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=_LEARNING_RATE, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            model(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(model(**batch).loss.double())
    return torch.stack(losses)


def _isolation(model: nn.Module, batch: dict[str, Any]) -> tuple[Item | None, str | None]:
    """Two documents in one row: no bit of the second may move when the first one changes."""
    config = getattr(model, "config", None)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return None, "packed documents not tried: virtual tokens belong to a row, so a row holds one document"
    if getattr(config, "_attn_implementation", None) != "pyfinetune":
        return None, "packed documents not tried: the attention is the model's own"
    ids = batch.get("input_ids")
    if ids is None or ids.shape[1] < 4:
        return None, "packed documents not tried: the batch has no input_ids of four tokens or more"
    half = ids.shape[1] // 2
    row, other = ids[:1], ids[:1].clone()
    other[:, :half] = other[:, :half].flip(1)
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None].to(ids.device)
    with torch.no_grad():
        logits = [model(input_ids=i, position_ids=positions, use_cache=False).logits for i in (row, other)]
    moved = int((logits[0][:, half:] != logits[1][:, half:]).any(dim=-1).sum())
    note = f"{moved} tokens of a packed document moved with another one" if moved else "no bit moved"
    return Item("a packed document beside another", float(moved), 0.0, 0.0, note), None

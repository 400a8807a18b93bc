"""Adapters as a training leaves them, saved beside their tokenizer, for tests of export and chat."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from peft_models import randomise
from tiny_model import CHATML, make_model, make_tokenizer

import pyfinetune as pf

OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "targets": ["q_proj", "v_proj"]},
}


def save_base(folder: str | Path, *, dtype=torch.float32, tied: bool = False, bias: bool = False) -> str:
    """A tiny Llama with a chat template; its biases, where it has them, are not zero."""
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer(chat_template=CHATML)
    config = make_model(len(tokenizer)).config
    config.tie_word_embeddings, config.attention_bias = tied, bias
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapter_model(base: str, *, in_4bit: bool = False, targets="all-linear", task="CAUSAL_LM", kind=None, **options):
    """The PEFT model over a saved base, its adapter random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = pf.load_4bit(base) if in_4bit else (kind or AutoModelForCausalLM).from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task, **options)
    model = randomise(get_peft_model(model, pf.lora_config(config)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.01
    return model.eval()


def save_adapter(folder: str | Path, base: str, **options) -> str:
    """An adapter's folder, with the tokenizer."""
    from transformers import AutoTokenizer

    adapter_model(base, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(name="brief")
def brief_fixture(monkeypatch) -> None:
    """Exports that compare two rows and one short text, which is as telling for a tiny model."""
    from pyfinetune.train.export import proof as export_proof
    from pyfinetune.train.export import rows as export_rows

    monkeypatch.setattr(export_rows, "TEXTS", export_rows.TEXTS[:2])
    monkeypatch.setattr(export_proof, "_PROMPTS", 1)
    monkeypatch.setattr(export_proof, "_NEW_TOKENS", 8)


@contextlib.contextmanager
def changed_weights(path: Path):
    """The tensors of a safetensors file, to be changed in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(path))
    yield tensors
    save_file(tensors, str(path), metadata={"format": "pt"})

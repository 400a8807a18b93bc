"""Tiny models and tokenizers, made in seconds and saved into a folder, for tests of the training layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

TEXTS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did she sell altogether? She sold 48/2 = 24 clips in May, so 48+24 = 72 in all.",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9",
    "def add(a, b):\n    return a + b\n",
]
END = "<|end|>"
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def make_tokenizer(*, end: str | None = END, chat_template: str | None = None, bos: str | None = None):
    """A byte-level BPE tokenizer with 400 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [token for token in (END, "<|im_start|>", "<|im_end|>", bos) if token]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    named = {name: token for name, token in (("eos_token", end), ("bos_token", bos)) if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(vocab_size: int = 400, *, layers: int = 2, positions: int = 512, seed: int = 0):
    """A Llama with hidden size 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def save_tiny(folder: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **tokenizer_options) -> str:
    """Model and tokenizer in one folder, as `save_pretrained` writes them; returns its path."""
    tokenizer = make_tokenizer(**tokenizer_options)
    model = make_model(len(tokenizer), seed=seed).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", name="tiny")
def tiny_fixture(tmp_path_factory) -> str:
    """Folder of a tiny float32 Llama whose tokenizer has no chat template."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))

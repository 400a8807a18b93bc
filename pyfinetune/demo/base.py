"""The model to start from: a byte-level BPE tokenizer and a small Llama with random weights, saved as a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_END = "<|end|>"


@dataclass(frozen=True)
class Size:
    """The size of the small Llama.

    Args:
        vocab_size: tokens.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads: as in
            `LlamaConfig`. Rows of the weights are multiples of 64, so that no quantization block spans two of them.
        max_length: tokens in a row.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_length: int = 256


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer, which can write any text.

    Args:
        texts: what to learn the merges from.
        vocab_size: tokens at most.

    Returns:
        A `PreTrainedTokenizerFast` with an end token and no chat template.

    Example:
        >>> train_tokenizer(["the cat sat on the mat"] * 9, 300).eos_token
        '<|end|>'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_END, pad_token=_END)


def save_untrained(folder: str | Path, tokenizer: Any, size: Size, seed: int) -> int:
    """Save a small Llama with random weights, and its tokenizer, as `from_pretrained` reads them.

    Args:
        folder: where.
        tokenizer: what `train_tokenizer` returned.
        size: the model's size.
        seed: of the weights.

    Returns:
        The number of parameters.

    Example:
        >>> save_untrained("base", tokenizer, Size(), seed=42)  # doctest: +SKIP
        4213248
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_hidden_layers,
            num_attention_heads=size.num_attention_heads,
            num_key_value_heads=size.num_key_value_heads,
            max_position_embeddings=2 * size.max_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms: one optimizer to a `Trainer`.

    A few hundred steps are all that the demo has, and over so few Muon comes much further than AdamW alone.

    Args:
        model: the model, all of it trainable.
        matrix_lr: of Muon.
        other_lr: of AdamW.
    """

    def __init__(self, model: torch.nn.Module, matrix_lr: float, other_lr: float):
        tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        head = model.get_output_embeddings()
        tables |= {id(head.weight)} if head is not None else set()
        matrices = [value for value in model.parameters() if value.dim() == 2 and id(value) not in tables]
        chosen = {id(value) for value in matrices}
        others = [value for value in model.parameters() if id(value) not in chosen]
        self._parts = (
            torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        # The very same groups: a schedule that sets a learning rate here sets it there.
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of both."""
        for part in self._parts:
            part.step(closure)

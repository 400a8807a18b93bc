"""Make a small model with random weights, and a tokenizer trained on your texts, in place of a download.

    python docs/small_model.py encoder --texts reviews.txt --output-dir models/encoder

The folder stands in `model_name_or_path` where the name of a model on the hub would stand. Such a model knows nothing:
what it can do after a run it has learned from your rows alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyfinetune.errors import InvalidInput, UserError

KINDS = ("encoder", "decoder", "encoder-decoder")
# Columns that are answers of one word, file names and the like, and teach a tokenizer nothing.
_NOT_TEXT = {"label", "tags", "ner_tags", "id", "fname", "role", "from"}


@dataclass(frozen=True)
class Shape:
    """How large a small model is.

    Args:
        vocab_size: tokens at most.
        hidden_size: width; a multiple of `heads`.
        layers: of the encoder, and again of the decoder where there are both.
        heads: of the attention.
        positions: tokens that it can read at most.
        dropout: chance of dropping a value while it is trained.
    """

    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 3
    heads: int = 6
    positions: int = 512
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("hidden_size", "layers", "heads", "positions"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, and has to be at least 1")
        if self.vocab_size < 300:
            raise InvalidInput(f"vocab_size is {self.vocab_size}, and has to be at least 300: 256 bytes and some words")
        if self.hidden_size % (2 * self.heads):
            raise InvalidInput(f"hidden_size {self.hidden_size} is no multiple of twice the {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise InvalidInput(f"dropout is {self.dropout}; a chance below 1 is meant")


def read_texts(paths: Sequence[str]) -> list[str]:
    """Read every text in files of any kind that `pyfinetune train` reads.

    Args:
        paths: the files; one of an ending that is not known is read as plain text.

    Returns:
        A text for each text column of each row.

    Raises:
        UserError: a file is missing, empty or broken.

    Example:
        >>> read_texts(["reviews.txt"])[0]  # doctest: +SKIP
        'a fine film .'
    """
    from pyfinetune.train.data.files import load_rows

    return [text for row in load_rows(paths, sample_by="line") for text in _texts(row.fields)]


def make_encoder(texts: Sequence[str], folder: str, shape: Shape, seed: int = 0, lowercase: bool = False) -> int:
    """Save a small BERT with random weights, and a WordPiece tokenizer.

    Args:
        texts: what the tokenizer learns its words from.
        folder: where.
        shape: its size.
        seed: of the weights.
        lowercase: read capitals as small letters.

    Returns:
        The number of parameters.

    Example:
        >>> make_encoder(texts, "models/encoder", Shape())  # doctest: +SKIP
        2305664
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer, set_seed

    core = BertWordPieceTokenizer(lowercase=lowercase, strip_accents=False)
    core.train_from_iterator(texts, vocab_size=shape.vocab_size, min_frequency=2, show_progress=False)
    tokenizer = BertTokenizer(
        core.get_vocab(), do_lower_case=lowercase, strip_accents=False, model_max_length=shape.positions
    )
    set_seed(seed)
    config = BertConfig(
        vocab_size=_rounded(len(tokenizer)),
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _saved(BertForMaskedLM(config), tokenizer, folder)


def make_decoder(texts: Sequence[str], folder: str, shape: Shape, seed: int = 0) -> int:
    """Save a small Llama with random weights, and a byte-level BPE tokenizer.

    Args:
        texts: what the tokenizer learns its words from.
        folder: where.
        shape: its size; a Llama drops attention weights alone.
        seed: of the weights.

    Returns:
        The number of parameters.

    Example:
        >>> make_decoder(texts, "models/decoder", Shape())  # doctest: +SKIP
        2113728
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from pyfinetune.demo.base import train_tokenizer

    tokenizer = train_tokenizer(texts, shape.vocab_size)
    tokenizer.model_max_length = shape.positions
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=_rounded(len(tokenizer)),
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        attention_dropout=shape.dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _saved(LlamaForCausalLM(config), tokenizer, folder)


def make_encoder_decoder(texts: Sequence[str], folder: str, shape: Shape, seed: int = 0) -> int:
    """Save a small T5 with random weights, and a byte-level BPE tokenizer.

    Args:
        texts: what the tokenizer learns its words from, in every language that is read or written.
        folder: where.
        shape: its size; a T5 knows distances, not positions.
        seed: of the weights.

    Returns:
        The number of parameters.

    Example:
        >>> make_encoder_decoder(texts, "models/translator", Shape())  # doctest: +SKIP
        4228992
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", model_max_length=shape.positions
    )
    set_seed(seed)
    config = T5Config(
        vocab_size=_rounded(len(tokenizer)),
        d_model=shape.hidden_size,
        d_kv=shape.hidden_size // shape.heads,
        d_ff=3 * shape.hidden_size,
        num_layers=shape.layers,
        num_heads=shape.heads,
        dropout_rate=shape.dropout,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _saved(T5ForConditionalGeneration(config), tokenizer, folder)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, a list of words as one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(part, str) for part in value):
        yield " ".join(value)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in _NOT_TEXT:
                yield from _texts(part)


def _rounded(tokens: int) -> int:
    """Rows of an embedding: whole quantization blocks."""
    return -(-tokens // 64) * 64


def _saved(model: Any, tokenizer: Any, folder: str) -> int:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model that the arguments describe; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE", help="what the tokenizer learns from")
    parser.add_argument("--output-dir", required=True, metavar="FOLDER")
    parser.add_argument("--vocab-size", type=int, default=Shape.vocab_size)
    parser.add_argument("--hidden-size", type=int, default=Shape.hidden_size)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--positions", type=int, default=Shape.positions, help="tokens that it can read")
    parser.add_argument("--dropout", type=float, default=Shape.dropout)
    parser.add_argument("--lowercase", action="store_true", help="encoder: read capitals as small letters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        shape = Shape(args.vocab_size, args.hidden_size, args.layers, args.heads, args.positions, args.dropout)
        texts = read_texts(args.texts)
        if args.kind == "encoder":
            parameters = make_encoder(texts, args.output_dir, shape, args.seed, args.lowercase)
        elif args.kind == "decoder":
            parameters = make_decoder(texts, args.output_dir, shape, args.seed)
        else:
            parameters = make_encoder_decoder(texts, args.output_dir, shape, args.seed)
    except (UserError, InvalidInput) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {args.kind}, {parameters:,} parameters, random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tiny encoders and encoder-decoders with their tokenizers, and rows of each task that they learn in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

NAMES = ("ann", "bob", "carl", "dora", "emil", "fay")
TEXTS = [
    "a good film that i like . a bad film that i hate . the plot is fine , the end is poor .",
    "then ann ran home and bob saw carl in the park with dora , emil and fay .",
    "who ran home ? who saw the dog ? one two three four five six seven eight nine ten",
    "hund katze haus baum dog cat house tree der die das the",
]


def encoder_tokenizer():
    """A WordPiece tokenizer that knows the words of `TEXTS` whole."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    ends = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **named,
    )


def save_encoder(folder: str | Path, *, seed: int = 0, positions: int = 128, dropout: float = 0.1) -> str:
    """A BERT of two layers, saved for masked words as published ones are, with its tokenizer; returns the folder."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = encoder_tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_encoder_decoder(folder: str | Path, *, seed: int = 0, dropout: float = 0.1) -> str:
    """A T5 of two layers each, with its tokenizer; returns the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        TEXTS, trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _further(number: int) -> list[str]:
    """A few words that differ from number to number, and are more for some."""
    return [_WORDS[number % 12], _WORDS[number // 12 % 12], *["and the plot"] * (number % 4)]


_WORDS = ("park", "dog", "cat", "house", "tree", "one", "two", "three", "four", "five", "six", "seven")


def reviews(count: int = 48) -> list[dict]:
    """Texts of different lengths with a label that one word decides."""
    kinds = (("good", "pos"), ("bad", "neg"))
    return [
        {"text": " ".join(["the film is", kinds[number % 2][0], *_further(number)]), "label": kinds[number % 2][1]}
        for number in range(count)
    ]


def people(count: int = 48) -> list[dict]:
    """Sentences with a name or two, tagged."""
    rows = []
    for number in range(count):
        first, second = NAMES[number % 6], NAMES[(number + 1 + number // 6) % 6]
        tokens = ["then", first, "saw", second, second, *" ".join(_further(number)).split()]
        tags = ["O", "B-per", "O", "B-per", "I-per"]
        rows.append({"tokens": tokens, "tags": tags + ["O"] * (len(tokens) - len(tags))})
    return rows


def questions(count: int = 48) -> list[dict]:
    """Questions whose answer is the name that ran."""
    rows = []
    for number in range(count):
        name, other = NAMES[number % 6], NAMES[(number + 1 + number // 6 % 5) % 6]
        context = f"{other} saw the {' '.join(_further(number))} . then {name} ran home ."
        answers = {"text": [name], "answer_start": [context.index(f"then {name}") + 5]}
        rows.append({"question": "who ran home ?", "context": context, "answers": answers})
    return rows


def translations(count: int = 48) -> list[dict]:
    """Word-for-word translations."""
    pairs = (("hund", "dog"), ("katze", "cat"), ("haus", "house"), ("baum", "tree"))
    rows = []
    for number in range(count):
        chosen = [pairs[number // 4**step % 4] for step in range(2 + number % 3)]
        rows.append({"source": " ".join(a for a, _ in chosen), "target": " ".join(b for _, b in chosen)})
    return rows


def preferences(count: int = 48) -> list[dict]:
    """Pairs of answers of which the kind one is better."""
    return [
        {
            "prompt": f"say {' '.join(_further(number))} : ",
            "chosen": "good fine" + " good" * (number % 2),
            "rejected": "bad poor" + " bad" * (number % 3),
        }
        for number in range(count)
    ]


def write_rows(path: str | Path, rows: list[dict]) -> str:
    """A JSONL file; returns its path."""
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    return str(path)

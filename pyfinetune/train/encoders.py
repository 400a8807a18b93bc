"""Rows for a model with a head of its own: classes of texts and of words, and masked words.

    Example -> text_rows | word_rows | masked_rows -> Part (rows, and what was cut) -> MaskedRows | a collator -> batch

`spans` makes the rows of extractive question answering and `sequences` those of encoder-decoders, both as a `Part`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.formats import Example
from pyfinetune.train.heads import Head, number_labels

IGNORED = -100  # the label that no loss counts
_PAD_TO = 8  # tensor cores want multiples of 8
_BATCH = 1024
_READ = ("input_ids", "chosen_ids", "rejected_ids")


@dataclass
class Part:
    """A part of the data as rows that a collator takes.

    Args:
        examples: what the rows were made of.
        rows: `input_ids`, `attention_mask`, `labels` and what else the model reads, a dictionary each.
        owners: of each row, the index of its example.
        notes: of each row, what its prediction is read back with.
        cut: places of the examples of which `max_length` cut something away.
        lost: how much that is, in words of tokens/tags, else in tokens.
        longest: the longest example, in tokens, before cutting.
        targets: how many labels there are to learn.
        labels: names of the classes.
        dropped: how many examples are left out for their length.
    """

    examples: Sequence[Example]
    rows: list[dict[str, Any]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    lost: int = 0
    longest: int = 0
    targets: int = 0
    labels: tuple[str, ...] = ()
    dropped: int = 0

    def add(self, owner: int, row: dict[str, Any], targets: int, note: Any = None) -> None:
        """Append a row of an example.

        Args:
            owner: the example's index.
            row: what the collator takes.
            targets: how many labels it has to learn.
            note: what its prediction is read back with.
        """
        self.owners.append(owner)
        self.rows.append(row)
        self.notes.append(note)
        self.targets += targets

    def measure(self, owner: int, tokens: int, lost: int) -> None:
        """Take note of an example's length.

        Args:
            owner: the example's index.
            tokens: its length before cutting.
            lost: how much of it was cut away.
        """
        self.longest = max(self.longest, tokens)
        if lost > 0:
            self.lost += lost
            self.cut.append(self.examples[owner].place)

    def first(self, count: int) -> Part:
        """The rows of the first examples.

        Args:
            count: how many examples.

        Returns:
            A part of them alone, without what was cut.
        """
        kept = [index for index, owner in enumerate(self.owners) if owner < count]
        rows, owners, notes = ([values[index] for index in kept] for values in (self.rows, self.owners, self.notes))
        return Part(self.examples[:count], rows, owners, notes, labels=self.labels)

    @property
    def counts(self) -> dict[str, int]:
        """The same keys as for a causal model, for `run.json`."""
        return {
            "examples": len(self.examples),
            "documents": len(self.rows),
            "rows": len(self.rows),
            "tokens": sum(len(row[name]) for row in self.rows for name in _READ if name in row),
            "learned_tokens": self.targets,
            "longest": self.longest,
            "cut_short": len(self.cut),
            "dropped": self.dropped,
            "masked": 0,
            "lost_tokens": self.lost,
            "answers": 0,
            "ended": 0,
        }


def text_rows(examples: Sequence[Example], tokenizer: Any, max_length: int, head: Head, labels: Sequence[str]) -> Part:
    """Texts, or pairs of them, with their class.

    Args:
        examples: rows of text/label, perhaps with `text_pair`.
        tokenizer: the model's.
        max_length: longest row, in tokens; what is beyond it is cut off.
        head: the head, which has labels.
        labels: what `heads.choose_labels` returned.

    Returns:
        One row each.

    Raises:
        UserError: a label is in no training row.

    Example:
        >>> text_rows(examples, tokenizer, 128, head, ["neg", "pos"]).rows[0]["labels"]  # doctest: +SKIP
        1
    """
    part = Part(examples, labels=tuple(labels))
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        pairs = [_text_and_pair(example) for example in batch]
        for index, (pair, ids) in enumerate(zip(pairs, _lengths(pairs, tokenizer), strict=True), start):
            row = _encoded(tokenizer, max_length, *pair)
            row["labels"] = number_labels(examples[index], head, labels)[0]
            part.measure(index, ids, ids - len(row["input_ids"]))
            part.add(index, row, targets=1)
    return part


def word_rows(examples: Sequence[Example], tokenizer: Any, max_length: int, head: Head, labels: Sequence[str]) -> Part:
    """Words with their tags; of a word that becomes several tokens the first is labelled.

    Args:
        examples: rows of tokens/tags.
        tokenizer: the model's, a fast one.
        max_length: longest row, in tokens; the words beyond it are lost.
        head: the head, which has labels.
        labels: what `heads.choose_labels` returned.

    Returns:
        One row each, with the position of each word's first token as its note; -1 for a word that is lost.

    Raises:
        UserError: the tokenizer cannot tell words, or a tag is in no training row.

    Example:
        >>> word_rows(examples, tokenizer, 128, head, ["O", "B-per", "I-per"]).notes[0]  # doctest: +SKIP
        [1, 2, 4]
    """
    require_fast(tokenizer, "tokens/tags")
    part = Part(examples, labels=tuple(labels))
    for index, example in enumerate(examples):
        words = example.fields["tokens"]
        whole = len(tokenizer(words, is_split_into_words=True, verbose=False)["input_ids"])
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        places = [-1] * len(words)
        for position, word in reversed(list(enumerate(encoded.word_ids()))):
            if word is not None:
                places[word] = position
        numbers = number_labels(example, head, labels)
        row = dict(encoded)
        row["labels"] = [IGNORED] * len(row["input_ids"])
        for place, number in zip(places, numbers, strict=True):
            if place >= 0:
                row["labels"][place] = number
        part.measure(index, whole, places.count(-1))
        part.add(index, row, targets=len(places) - places.count(-1), note=places)
    return part


def masked_rows(examples: Sequence[Example], tokenizer: Any, max_length: int, mlm_probability: float) -> Part:
    """Raw texts in pieces of `max_length` tokens, some of which will be masked.

    Args:
        examples: raw texts.
        tokenizer: the model's, a fast one with a mask token.
        max_length: longest piece, in tokens.
        mlm_probability: share of the tokens to mask.

    Returns:
        The pieces; those without a token to mask are left out. `targets` is what is masked on average.

    Raises:
        UserError: the tokenizer has no mask token, or no text has a token to mask.

    Example:
        >>> len(masked_rows(examples, tokenizer, 128, 0.15).rows)  # doctest: +SKIP
        9595
    """
    require_fast(tokenizer, "raw text in pieces")
    if tokenizer.mask_token_id is None:
        raise UserError(
            "head: masked_lm needs a mask token, and the tokenizer has none",
            fix="give a model that was made for it, such as a BERT, or set head: causal_lm",
        )
    part = Part(examples)
    maskable = 0
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        encoded = tokenizer(
            [example.text for example in batch],
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        for piece, owner in enumerate(encoded["overflow_to_sample_mapping"]):
            row = {name: encoded[name][piece] for name in ("input_ids", "special_tokens_mask")}
            free = row["special_tokens_mask"].count(0)
            part.longest = max(part.longest, len(row["input_ids"]))
            if free:
                maskable += free
                part.add(start + owner, row, targets=0)
    if examples and not part.rows:
        raise UserError("no text has a token to mask", fix=f"look at {examples[0].place}")
    part.targets = round(maskable * mlm_probability)
    return part


class HeadRows(torch.utils.data.Dataset):
    """Rows for a `Trainer`; at the index after the last stands one without a label, which fills batches up.

    Args:
        rows: what a collator takes.
    """

    has_filler = True

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index != len(self.rows) else _blank(self.rows[0])


class MaskedRows(torch.utils.data.Dataset):
    """Pieces of text with some tokens masked; which ones follows from the seed, the epoch and the row alone.

    So a run that is resumed masks what it would have masked, whatever was drawn before and in whatever batches.

    Args:
        rows: rows of `masked_rows`.
        tokenizer: the model's.
        mlm_probability: share of the tokens to mask: 80 % of those become the mask, 10 % another token, 10 % stay.
        seed: of the draws.
        fixed: whether each epoch masks the same, as held-out rows need it to be comparable.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], tokenizer: Any, mlm_probability: float, seed: int, fixed: bool):
        from transformers import DataCollatorForLanguageModeling

        self.has_filler = True
        self.rows, self.seed, self.epoch = rows, seed, -1 if fixed else 0
        self.fixed = fixed
        self.masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for an epoch.

        Args:
            epoch: counted from 0.
        """
        if not self.fixed:
            self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == len(self.rows):
            return {"input_ids": self.rows[0]["input_ids"][:1], "attention_mask": [1], "labels": [IGNORED]}
        row = self.rows[index]
        draw = hashlib.blake2b(f"{self.seed} {self.epoch} {index}".encode(), digest_size=8).digest()
        self.masker.generator = torch.Generator().manual_seed(int.from_bytes(draw, "big") >> 1)
        ids, labels = self.masker.torch_mask_tokens(
            torch.tensor([row["input_ids"]]), special_tokens_mask=torch.tensor([row["special_tokens_mask"]])
        )
        return {"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1], "labels": labels[0].tolist()}


class Counted:
    """A collator of transformers that also says how many tokens a batch has without padding.

    Args:
        collator: takes rows, gives a batch with an `attention_mask`.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collator([dict(row) for row in rows]))
        batch["num_tokens"] = int(batch["attention_mask"].sum())
        if "decoder_input_ids" in batch:
            batch["num_tokens"] += int(batch["labels"].ne(IGNORED).sum())
        return batch


def collator_of(head: Head, tokenizer: Any, model: Any = None) -> Counted:
    """What makes batches of a head's rows.

    Args:
        head: the head.
        tokenizer: the model's.
        model: an encoder-decoder, which makes its decoder's inputs from the labels.

    Returns:
        A collator.

    Example:
        >>> collator_of(head, tokenizer)(part.rows[:2])["labels"].shape  # doctest: +SKIP
        torch.Size([2])
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification, DataCollatorWithPadding

    options = {"pad_to_multiple_of": _PAD_TO}
    if head.kind == "seq2seq_lm":
        return Counted(DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED, **options))
    if head.kind in ("token_classification", "masked_lm"):  # a label for each token
        return Counted(DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED, **options))
    return Counted(DataCollatorWithPadding(tokenizer, **options))


def require_fast(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer that cannot tell where its tokens come from.

    Args:
        tokenizer: the model's.
        what: what needs it.

    Raises:
        UserError: it is not a fast one.

    Example:
        >>> require_fast(tokenizer, "tokens/tags")  # doctest: +SKIP
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{what}: {type(tokenizer).__name__} cannot tell which word a token comes from",
            fix="give a model with a tokenizer.json, which a fast tokenizer reads",
        )


def _blank(row: dict[str, Any]) -> dict[str, Any]:
    """A row of one token that teaches nothing."""
    labels = row["labels"]
    if isinstance(labels, list):
        labels = [IGNORED] * (1 if len(labels) == len(row["input_ids"]) else len(labels))
    else:
        labels = IGNORED
    return {name: labels if name == "labels" else values[:1] for name, values in row.items()}


def _text_and_pair(example: Example) -> tuple[str, ...]:
    text = example.fields.get("text")
    pair = example.fields.get("text_pair")
    return (example.fields["sentence"] if text is None else text, *([pair] if pair else []))


def _lengths(pairs: Sequence[tuple[str, ...]], tokenizer: Any) -> list[int]:
    """Lengths in tokens, uncut."""
    return [len(tokenizer(*pair, verbose=False)["input_ids"]) for pair in pairs]


def _encoded(tokenizer: Any, max_length: int, *texts: str) -> dict[str, Any]:
    return dict(tokenizer(*texts, truncation=True, max_length=max_length))

"""Documents into rows and rows into batches, with every document alone in its row as if nothing stood beside it.

`tokenizing.tokenize` -> `pack` or `one_a_row` -> `RowDataset` -> `collate` -> the model. A batch carries position ids
that start again at 0 with each document and no attention mask: from those the model's attention builds a mask in which
documents do not see each other. A mask of ones would undo that, so none is ever passed; `check_isolation` proves on the
model itself that nothing leaks before a run begins.

    row of max_length tokens:   | document a | document b | c |pad|
    position_ids                 0 1 2 3 4 5  0 1 2 3 4 5  0 1 0 1
    labels (first of each -100)  - a a a a a  - b b b b b  - c - -
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyfinetune.errors import UserError
from pyfinetune.train.tokenizing import Document

IGNORED = -100  # the label that no loss counts
_PAD_TO = 8  # tensor cores want multiples of 8


class RowDataset(torch.utils.data.Dataset):
    """Rows of documents, for a `Trainer`.

    At the index after the last stands a row without documents, with which several processes fill up a batch.

    Args:
        rows: documents of each row.
    """

    has_filler = True

    def __init__(self, rows: Sequence[Sequence[Document]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sequence[Document]:
        return self.rows[index] if index != len(self.rows) else ()


def one_a_row(documents: Sequence[Document]) -> list[list[Document]]:
    """Rows of one document each.

    Args:
        documents: the documents.

    Returns:
        As many rows, in order; documents without a learned token are left out.

    Example:
        >>> one_a_row([])
        []
    """
    return [[document] for document in documents if document.learned.any()]


def pack(documents: Sequence[Document], max_length: int) -> list[list[Document]]:
    """Rows of whole documents, filled by best fit: longest first, each into the fullest row that still has room.

    Args:
        documents: documents of at most `max_length` tokens.
        max_length: tokens in a row.

    Returns:
        Rows of documents; the same documents give the same rows. Documents without a learned token are left out.

    Raises:
        UserError: a document is longer than a row.

    Example:
        >>> documents = [Document(np.arange(n), np.arange(n) > 0) for n in (5, 3, 2)]
        >>> [[len(document) for document in row] for row in pack(documents, 5)]
        [[5], [3, 2]]
    """
    documents = [document for document in documents if document.learned.any()]
    rows: list[list[Document]] = []
    spaces: list[int] = []  # the distinct amounts of room left, ascending
    rows_with: dict[int, list[int]] = defaultdict(list)
    for document in sorted(documents, key=len, reverse=True):
        if len(document) > max_length:
            raise UserError(
                f"packing: a document has {len(document)} tokens and a row {max_length}", fix="raise max_length"
            )
        at = bisect.bisect_left(spaces, len(document))
        if at < len(spaces):
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces.pop(at)
        else:
            space, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        left = space - len(document)
        if left > 1:  # no document of one token has a target
            if not rows_with[left]:
                bisect.insort(spaces, left)
            rows_with[left].append(row)
    return rows


def collate(
    rows: Sequence[Sequence[Document]],
    pad_token_id: int,
    max_length: int | None = None,
    flat: bool = False,
    positions: bool = True,
) -> dict[str, Any]:
    """Make one batch of rows.

    Args:
        rows: documents of each row.
        pad_token_id: fills rows up; never a label.
        max_length: rows are filled up to no more than this.
        flat: lay all documents end to end in one row without padding, as flash attention wants them.
        positions: give `position_ids`. A model that puts virtual tokens before its rows counts by itself, and its rows
            hold one document each.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64 [rows, longest], or [1, total] when flat; and `num_tokens`, the
        number of tokens without padding.

    Example:
        >>> row = [Document(np.array([7, 8]), np.array([False, True]))]
        >>> collate([row], pad_token_id=0)["labels"].tolist()[0][:3]
        [-100, 8, -100]
    """
    if flat:
        rows = [[document for row in rows for document in row]]
    lengths = [sum(map(len, row)) for row in rows]
    longest = max(1, *lengths)
    if not flat:
        longest = max(longest, min(-(-longest // _PAD_TO) * _PAD_TO, max_length or longest + _PAD_TO))
    input_ids = np.full((len(rows), longest), pad_token_id, dtype=np.int64)
    position_ids = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    # With one document in every row, positions run on into the padding, which causal attention never looks at: no mask
    # has to be built. Beside packed rows the padding becomes a document of its own.
    alone = all(len(row) <= 1 for row in rows)
    for index, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document)
            input_ids[index, start:end] = document.input_ids
            labels[index, start:end][document.learned] = document.input_ids[document.learned]
            position_ids[index, start:end] = np.arange(len(document))
            start = end
        position_ids[index, start:] = np.arange(start, longest) if alone else np.arange(longest - start)
    return {
        "input_ids": torch.from_numpy(input_ids),
        **({"position_ids": torch.from_numpy(position_ids)} if positions else {}),
        "labels": torch.from_numpy(labels),
        "num_tokens": sum(lengths),
    }


def is_flat(attn_implementation: str | None) -> bool:
    """Whether an attention implementation keeps documents apart only in one long row.

    Args:
        attn_implementation: a name as `transformers` knows it.

    Returns:
        True for the flash attention family, which reads position ids only when there is a single row.

    Example:
        >>> is_flat("flash_attention_2"), is_flat("sdpa")
        (True, False)
    """
    return "flash" in (attn_implementation or "")


@torch.no_grad()
def check_isolation(model: torch.nn.Module, vocab_size: int, flat: bool = False) -> None:
    """Prove on the model itself that a packed document is not touched by its neighbours.

    Two rows of three documents run through the model, then again with every token of the middle document changed; the
    logits of the others must stay as they were.

    Args:
        model: the model as it will be trained.
        vocab_size: token ids below this are used.
        flat: how batches will be laid out.

    Raises:
        UserError: something moved, so that packing would train on foreign context.

    Example:
        >>> check_isolation(model, vocab_size=256)  # doctest: +SKIP
    """
    length, high = 6, min(vocab_size, 1000)
    tokens = np.random.default_rng(0).integers(0, high, size=(2, 3, length))
    changed = tokens.copy()
    changed[:, 1] = (changed[:, 1] + 1 + high // 2) % high
    learned = np.arange(length) > 0
    others = np.repeat([True, False, True], length)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        logits = []
        for ids in (tokens, changed):
            batch = collate([[Document(d, learned) for d in row] for row in ids], 0, 3 * length, flat)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
            out = model(**inputs, use_cache=False).logits
            logits.append(out.reshape(2, -1, out.shape[-1])[:, : 3 * length][:, torch.from_numpy(others)])
    except TypeError as error:
        raise UserError(
            f"packing: {type(model).__name__} cannot keep documents in a row apart by position_ids: {error}",
            fix="set packing: false",
        ) from error
    finally:
        model.train(was_training)
    before, after = logits
    moved = (before - after).abs().max().item()
    # Kernels that group tokens by content (mixture of experts) may round differently; a leak is far larger than that.
    if moved > torch.finfo(before.dtype).eps * before.abs().max().item():
        raise UserError(
            f"packing: this model lets documents in one row see each other (a logit moved by {moved:.3g} when a"
            " neighbour changed)",
            fix="set packing: false, or attn_implementation: sdpa",
        )

"""What a causal or an encoder-decoder model says: greedy answers in batches, and how likely it holds a given text.

Batches are padded on the left (an encoder's on the right) under an attention mask, so that a row's answer is the one
it would get alone. Rows of like length share a batch; results come back in the order of the prompts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyfinetune.errors import InvalidInput
from pyfinetune.train.data.tokenizing import Document

_MOST_LOGITS = 4096  # tokens whose logits over the whole vocabulary are held at once

OnBatch = Callable[[list[int], list[Any]], None]


@dataclass(frozen=True)
class Generated:
    """One answer.

    Args:
        text: without special tokens, and without white space around it.
        tokens: generated, the one that ended it included.
        seconds: of its batch, divided by the rows in it.
    """

    text: str
    tokens: int
    seconds: float


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients and without a trace in the program's randomness.

    Args:
        model: any; as it was afterwards.

    Example:
        >>> with answering(torch.nn.Linear(1, 1)) as _:
        ...     pass
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(was_training)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    stop_ids: Sequence[int] = (),
    on_batch: OnBatch | None = None,
) -> list[Generated]:
    """The most likely answer to each prompt, token by token.

    Args:
        model: a model that can generate.
        tokenizer: its tokenizer.
        prompts: token ids of each.
        max_new_tokens: where an answer ends that does not end by itself.
        batch_size: prompts at a time.
        stop_ids: tokens that end an answer, beside those of the tokenizer and of the model's own settings.
        on_batch: called with the indices of a batch's prompts and their answers as soon as they are there.

    Returns:
        An answer a prompt, in order.

    Raises:
        InvalidInput: a prompt is empty, or a number below 1.

    Example:
        >>> generate_answers(model, tokenizer, [tokenizer("1+1=")["input_ids"]], max_new_tokens=4)  # doctest: +SKIP
        [Generated(text='2', tokens=2, seconds=0.01)]
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InvalidInput(f"generate_answers: {name} is {value}; it has to be 1 or more")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InvalidInput(f"generate_answers: prompt {index + 1} is empty; give it at least one token")
    stops = stopping_tokens(model, tokenizer, stop_ids)
    found: list[Any] = [None] * len(prompts)
    with answering(model):
        for batch in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            begin = time.perf_counter()
            said = _generate(model, tokenizer, [list(prompts[at]) for at in batch], max_new_tokens, stops)
            seconds = (time.perf_counter() - begin) / len(batch)
            answers = [Generated(text, tokens, seconds) for text, tokens in said]
            for at, answer in zip(batch, answers, strict=True):
                found[at] = answer
            if on_batch is not None:
                on_batch(batch, answers)
    return found


def stopping_tokens(model: Any, tokenizer: Any, more: Sequence[int] = ()) -> list[int]:
    """The tokens that end an answer.

    Args:
        model: its generation settings may name some.
        tokenizer: its end token is one.
        more: further ones.

    Returns:
        Token ids, ascending.

    Example:
        >>> stopping_tokens(model, tokenizer)  # doctest: +SKIP
        [0]
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id, *more) if token is not None})


def document_losses(
    model: Any,
    documents: Sequence[Document],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    on_batch: OnBatch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How unlikely a causal model holds the learned tokens of each document.

    Args:
        model: a causal language model.
        documents: what `tokenizing.tokenize` made.
        pad_token_id: fills rows up.
        batch_size: documents at a time.
        on_batch: called with the indices of a batch's documents and their losses as soon as they are there.

    Returns:
        Sum of -log p over the learned tokens, in nats, float64 [documents]; and their number, int64 [documents].

    Raises:
        InvalidInput: `batch_size` is below 1.

    Example:
        >>> losses, targets = document_losses(model, documents, pad_token_id=0)  # doctest: +SKIP
    """
    if batch_size < 1:
        raise InvalidInput(f"document_losses: batch_size is {batch_size}; it has to be 1 or more")
    losses = np.zeros(len(documents))
    targets = np.array([int(document.learned[1:].sum()) for document in documents], dtype=np.int64)
    device = next(model.parameters()).device
    with answering(model):
        for batch in batches_by_length([len(document) for document in documents], batch_size, _MOST_LOGITS):
            ids, mask = _padded([documents[at].input_ids for at in batch], pad_token_id, left=False)
            wanted, _ = _padded([documents[at].learned for at in batch], 0, left=False)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            logits = logits[:, -ids.shape[1] :]  # a method may put virtual tokens before the row
            wanted = wanted[:, 1:].bool().to(device)  # [batch, longest - 1]
            chosen = logits[:, :-1][wanted].float()
            each = torch.nn.functional.cross_entropy(chosen, ids[:, 1:].to(device)[wanted], reduction="none")
            rows = wanted.nonzero()[:, 0].cpu().numpy()
            losses[batch] = np.bincount(rows, weights=each.double().cpu().numpy(), minlength=len(batch))
            if on_batch is not None:
                on_batch(batch, losses[batch].tolist())
    return losses, targets


def batches_by_length(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that what does not fit into memory shows at once.

    Args:
        lengths: of each row, in tokens.
        batch_size: rows in a batch, at most.
        most_tokens: tokens in a batch, padding included, at most; a longer row is alone. None for no limit.

    Returns:
        Batches of indices; each row is in one of them.

    Example:
        >>> batches_by_length([3, 9, 5, 4], 2), batches_by_length([3, 9, 5, 4], 2, most_tokens=10)
        ([[1, 2], [3, 0]], [[1], [2, 3], [0]])
    """
    batches: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        last = batches[-1] if batches else []
        fits = most_tokens is None or (len(last) + 1) * lengths[last[0] if last else at] <= most_tokens
        if last and len(last) < batch_size and fits:
            last.append(at)
        else:
            batches.append([at])
    return batches


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, stops: list[int]
) -> list[tuple[str, int]]:
    """Text and number of tokens of each prompt's answer."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in _padded(prompts, pad, left=not has_encoder))
    # What a checkpoint says of sampling and penalties is for chats; a measurement is of the model itself.
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stops,
        pad_token_id=pad,
        **plain,
    )
    said = []
    for row in out[:, 1 if has_encoder else ids.shape[1] :].tolist():
        end = next((at for at, token in enumerate(row) if token in stops), len(row))
        said.append((tokenizer.decode(row[:end], skip_special_tokens=True).strip(), min(end + 1, len(row))))
    return said


def _padded(rows: Sequence[Sequence[int] | np.ndarray], fill: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of equal length, int64 [rows, longest], and the mask of what was there before."""
    longest = max(map(len, rows))
    values = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(values)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        values[number, place] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[number, place] = 1
    return values, mask

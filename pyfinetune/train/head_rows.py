"""Which tokenizer and which rows a head wants.

RunConfig, Head -> tokenizer_for;  Example, tokenizer, Head -> head_part -> Part
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig
from pyfinetune.train.encoders import Part, masked_rows, text_rows, word_rows
from pyfinetune.train.formats import Example
from pyfinetune.train.heads import Head
from pyfinetune.train.reward import preference_rows
from pyfinetune.train.sequences import pair_rows
from pyfinetune.train.spans import span_rows
from pyfinetune.train.tokenizing import load_head_tokenizer, load_tokenizer


def tokenizer_for(config: RunConfig, data_format: str, head: Head) -> Any:
    """Load the tokenizer of a run.

    Args:
        config: the run's configuration.
        data_format: what `formats.recognise` said of the rows.
        head: the head that is trained.

    Returns:
        A tokenizer that ends answers and writes conversations, or one for a head that needs neither.

    Raises:
        UserError: as `tokenizing.load_tokenizer`.

    Example:
        >>> tokenizer_for(config, data.format, head)  # doctest: +SKIP
    """
    if head.kind in ("causal_lm", "reward"):
        tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template, config.eos_token, data_format)
        if head.kind == "reward" and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    tokenizer = load_head_tokenizer(config.model_name_or_path, split_into_words=head.kind == "token_classification")
    # A RoBERTa's configuration counts two positions that no row can have; its tokenizer knows.
    if head.kind != "seq2seq_lm" and config.max_length > tokenizer.model_max_length:
        raise UserError(
            f"max_length: {config.max_length} is beyond the {tokenizer.model_max_length} tokens that the tokenizer of"
            f" {config.model_name_or_path} allows",
            fix=f"set max_length: {tokenizer.model_max_length} or less",
        )
    return tokenizer


def head_part(
    examples: Sequence[Example], tokenizer: Any, config: RunConfig, head: Head, labels: Sequence[str]
) -> Part:
    """Tokenize examples for a model with a head.

    Args:
        examples: rows of one of the head's tasks.
        tokenizer: the model's.
        config: the run's configuration.
        head: the head.
        labels: names of its classes; none for a head without.

    Returns:
        The rows, with what predictions are read back by.

    Raises:
        UserError: a row does not fit the head.

    Example:
        >>> head_part(data.test, tokenizer, config, head, labels).counts["rows"]  # doctest: +SKIP
        1067
    """
    length = config.max_length
    if head.kind == "sequence_classification":
        return text_rows(examples, tokenizer, length, head, labels)
    if head.kind == "token_classification":
        return word_rows(examples, tokenizer, length, head, labels)
    if head.kind == "question_answering":
        return span_rows(examples, tokenizer, length, config.doc_stride)
    if head.kind == "reward":
        return preference_rows(examples, tokenizer, length)
    if head.kind == "masked_lm":
        return masked_rows(examples, tokenizer, length, config.mlm_probability)
    return pair_rows(examples, tokenizer, length, config.source_prefix)

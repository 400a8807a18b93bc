"""The rows that a model is judged by: read from files or from what a run held out, drawn, and told apart by columns.

files or RunConfig -> read_rows, held_out_examples -> drawn -> task_of, column_of
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig
from pyfinetune.train.data.files import Row, load_aligned_rows, load_labelled_rows, load_rows
from pyfinetune.train.data.formats import Example
from pyfinetune.train.data.reading import read_data
from pyfinetune.train.data.tasks import RENDER
from pyfinetune.train.evaluation import metrics
from pyfinetune.train.heads.kinds import may_be_unanswered

_LONGEST_ANSWER = 512  # tokens


def task_of(examples: Sequence[Example]) -> str:
    """The task of recognised rows, as the metrics name it.

    Args:
        examples: rows of one format.

    Returns:
        A key of `metrics.METRICS`, or `pretrain` for raw text.

    Example:
        >>> task_of([Example("f, row 1", "alpaca")])
        'sft'
    """
    data_format = examples[0].format
    return "pretrain" if data_format == "text" else data_format if data_format in RENDER else "sft"


def column_of(examples: Sequence[Example], name: str) -> list[Any]:
    """The values of a column by which metrics are sliced.

    Args:
        examples: rows.
        name: of the column.

    Returns:
        A value a row; None where a row has none.

    Raises:
        UserError: no row has such a column, or it has too many different values.

    Example:
        >>> column_of([Example("f, row 1", "text", columns={"topic": "war"})], "topic")
        ['war']
    """
    if not any(name in example.columns for example in examples):
        listed = ", ".join(map(repr, examples[0].columns)) or "none"
        raise UserError(f"slice {name}: no row has that column (its columns: {listed})", fix="name one of those")
    values = [example.columns.get(name) for example in examples]
    count = len({str(value) for value in values})
    if count > metrics.MOST_SLICES:  # said before anything is answered, which takes long
        raise UserError(
            f"slice {name}: {count:,} different values make slices too small to tell anything",
            fix=f"name a column with {metrics.MOST_SLICES} or fewer",
        )
    return values


def read_rows(data: Sequence[str], task: str = "auto", sample_by: str = "auto") -> list[Row]:
    """Read the files that a command names.

    Args:
        data: paths; or all of them `name=path`, for files that hold one class or one column each.
        task: with `classification`, names are labels; else they are columns.
        sample_by: as of `data.load_rows`.

    Returns:
        The rows.

    Raises:
        UserError: a file is at fault, or some have names and others not.

    Example:
        >>> len(read_rows(["test.jsonl"]))  # doctest: +SKIP
        500
    """
    named = dict(path.split("=", 1) for path in data if "=" in path and not Path(path).is_file())
    if not named:
        return load_rows(data, sample_by)
    if len(named) != len(data):
        raise UserError(
            f"--data: {len(data)} files, of which {len(named)} have a name of their own",
            fix="write every one as NAME=FILE (a label's or a column's name), or none",
        )
    return load_labelled_rows(named) if task == "classification" else load_aligned_rows(named)


def held_out_examples(config: RunConfig) -> list[Example]:
    """The rows that a run never learned from: its test rows, or else those that it was evaluated on.

    Args:
        config: the run's configuration.

    Returns:
        The examples.

    Raises:
        UserError: the run held nothing out.

    Example:
        >>> len(held_out_examples(config))  # doctest: +SKIP
        374
    """
    data = read_data(config, unanswered=may_be_unanswered(config))
    if not (data.test or data.held_out):
        raise UserError("this run held no rows out", fix="name a file of rows that it has not seen: --data FILE")
    return data.test or data.held_out


def drawn(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """So many of the examples, in their order; the first ones of a sorted file would be all of one kind.

    Args:
        examples: to draw from.
        rows: how many at most; None takes all.
        seed: decides which.

    Returns:
        The examples drawn.

    Raises:
        UserError: `rows` is below 1.

    Example:
        >>> len(drawn([Example("f, row 1", "text")], 5, seed=0))
        1
    """
    if rows is not None and rows < 1:
        raise UserError(f"rows: {rows}: there is nothing to evaluate", fix="give 1 or more")
    if rows is None or rows >= len(examples):
        return list(examples)
    return [examples[at] for at in sorted(random.Random(seed).sample(range(len(examples)), rows))]


def longest_answer(examples: Sequence[Example], tokenizer: Any) -> int:
    """How many tokens an answer may take: an eighth more than the longest right one, and at most 512.

    Args:
        examples: rows with their answers.
        tokenizer: of the model.

    Returns:
        Tokens.

    Example:
        >>> longest_answer(examples, tokenizer)  # doctest: +SKIP
        64
    """
    texts = [example.messages[-1].get("content") for example in examples if example.messages]
    texts = [text for text in texts if isinstance(text, str)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    longest = max(map(len, encoded), default=0)
    return min(_LONGEST_ANSWER, longest + longest // 8 + 2)  # two more for the token that ends it

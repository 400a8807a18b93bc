"""Several sources as one set of rows: by weight for many tasks at once, by share for what must not be forgotten.

Rows are drawn by the seed, and laid so that every stretch of the mixture holds the sources in their proportion.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pyfinetune.errors import InvalidInput

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Use:
    """How much of a source went into the mixture.

    Args:
        name: what the source is called.
        rows: rows that it has to train on.
        used: rows of the mixture that are its own, repeated ones counted each time.
        replayed: whether it is the older source of `replay:`.
        wanted: rows that its share asked for; more than `used` where it has too few.
    """

    name: str
    rows: int
    used: int
    replayed: bool = False
    wanted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values.

        Returns:
            The fields.

        Example:
            >>> Use("a.jsonl", 10, 10).to_dict()["used"]
            10
        """
        return dict(vars(self))


def shares(sizes: Sequence[int], weights: Sequence[float | None], stopping_strategy: str) -> list[int]:
    """Rows that each source gives to the mixture.

    Args:
        sizes: rows of each source.
        weights: its part in the mixture relative to the others; None is its number of rows.
        stopping_strategy: `first_exhausted` repeats no row: the mixture ends with the first source that has no more;
            `all_exhausted` shows every row: the others begin again until the last source has been read.

    Returns:
        Rows of each source, in the weights' proportion, at least one.

    Raises:
        InvalidInput: a source is empty.

    Example:
        >>> shares([100, 1000], [1, 1], "first_exhausted"), shares([100, 1000], [None, None], "first_exhausted")
        ([100, 100], [100, 1000])
    """
    if not all(sizes):
        raise InvalidInput(f"shares: source {list(sizes).index(0) + 1} of {len(sizes)} has no rows")
    parts = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    lengths = [size / part for size, part in zip(sizes, parts, strict=True)]
    length = min(lengths) if stopping_strategy == "first_exhausted" else max(lengths)
    counts = [max(1, round(part * length)) for part in parts]
    if stopping_strategy == "first_exhausted":
        return [min(count, size) for count, size in zip(counts, sizes, strict=True)]
    return [max(count, size) for count, size in zip(counts, sizes, strict=True)]


def interleave(sources: Sequence[Sequence[_Item]], counts: Sequence[int], seed: int) -> list[_Item]:
    """Rows of several sources in one order, spread evenly.

    Args:
        sources: rows of each source.
        counts: how many rows to take of each; with more than it has, it is read again from its beginning.
        seed: draws the rows of a source that is not taken whole, or not a whole number of times.

    Returns:
        The rows. Of a source that is taken whole they keep their order.

    Example:
        >>> interleave(["aaaa", "bb"], [4, 2], seed=0)
        ['a', 'b', 'a', 'a', 'b', 'a']
    """
    streams = [
        _taken(rows, count, seed + number) for number, (rows, count) in enumerate(zip(sources, counts, strict=True))
    ]
    order = sorted(
        ((2 * at + 1) / (2 * len(stream)), number, at)
        for number, stream in enumerate(streams)
        for at in range(len(stream))
    )
    return [streams[number][at] for _, number, at in order]


def replay_count(new_rows: int, share: float) -> int:
    """Rows of an older source that make up a share of the mixture.

    Args:
        new_rows: rows of the other sources.
        share: the older source's part of the whole, between 0 and 1.

    Returns:
        The number, at least one.

    Example:
        >>> replay_count(90, 0.1)
        10
    """
    return max(1, round(new_rows * share / (1 - share)))


def _taken(rows: Sequence[_Item], count: int, seed: int) -> list[_Item]:
    whole, rest = divmod(count, len(rows))
    chosen = sorted(random.Random(seed).sample(range(len(rows)), rest)) if rest else []
    return [*rows] * whole + [rows[index] for index in chosen]

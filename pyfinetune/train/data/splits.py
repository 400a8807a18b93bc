"""Rows into training, validation and test rows: by a seed, or by a column whose values stay together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from pyfinetune.errors import UserError

_Item = TypeVar("_Item")


def split_rows(
    rows: Sequence[_Item],
    size: float | int,
    seed: int,
    groups: Sequence[Any] | None = None,
    key: str = "test_size",
) -> tuple[list[_Item], list[_Item]]:
    """Part rows into training and held-out rows, the same way for the same seed.

    Args:
        rows: the rows to part.
        size: the held-out share (a float below 1) or their number (an int).
        seed: decides which rows are held out.
        groups: a value a row; rows of equal value stay together, and as many whole groups are held out, drawn by the
            seed, as come closest to `size` without passing it, but at least one.
        key: the configuration's key that set `size`, for messages.

    Returns:
        Training rows and held-out rows, each in the original order.

    Raises:
        UserError: the split would leave one of the two empty.

    Example:
        >>> [len(part) for part in split_rows(range(10), 0.2, seed=0)]
        [8, 2]
        >>> split_rows("aabb", 0.5, seed=0, groups="aabb")[1] in (["a", "a"], ["b", "b"])
        True
    """
    held = round(len(rows) * size) if isinstance(size, float) else size
    if isinstance(size, float):
        held = max(held, 1)
    if held >= len(rows):
        raise UserError(
            f"{key}: {size} of {len(rows)} rows leaves none to train on",
            fix=f"lower {key}, add rows, or (for plain text) set sample_by: line or paragraph",
        )
    if groups is None:
        chosen = set(random.Random(seed).sample(range(len(rows)), held))
    else:
        chosen = _whole_groups(groups, held, seed, key)
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def _whole_groups(groups: Sequence[Any], held: int, seed: int, key: str) -> set[int]:
    """Indices of the rows of the held-out groups."""
    members: dict[str, list[int]] = {}
    for index, value in enumerate(groups):
        members.setdefault(f"{type(value).__name__}:{value}", []).append(index)
    if len(members) < 2:
        raise UserError(
            f"group_column: all {len(groups)} rows have the same value, so none of them can be held out",
            fix=f"set group_column to a column with several values, or leave it out and split by {key} alone",
        )
    order = sorted(members)
    random.Random(seed).shuffle(order)
    fitting, total = [], 0
    for name in order:
        if total + len(members[name]) <= held:
            fitting.append(name)
            total += len(members[name])
    # No group is as small as what was asked for: the smallest one comes closest.
    chosen = fitting or [min(order, key=lambda name: len(members[name]))]
    return {index for name in chosen for index in members[name]}

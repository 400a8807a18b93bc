"""Classes made for the modules of a model: an original class with a faster forward in front of its own."""

from __future__ import annotations

import copyreg
import functools
from typing import Any


class Fast:
    """What each of them derives from first; `original` is the class that it takes the place of."""

    original: type
    made_of: tuple

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Copies and pickles make the class anew from its parts: no module has it as an attribute."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:  # the original has a way of its own
            return reduced
        return (_instance, self.made_of, *reduced[2:])


def fast_class(forward: type[Fast], original: type, **members: Any) -> type:
    """The class with `forward`'s methods before `original`'s; the same arguments give the same class.

    Args:
        forward: holds the forward.
        original: the class of the module.
        members: hashable class attributes that the forward reads.
    """
    return _made(forward, original, tuple(sorted(members.items())))


@functools.cache
def _made(forward: type[Fast], original: type, members: tuple) -> type:
    made_of = (forward, original, members)
    return type(
        f"Fast{original.__name__}", (forward, original), {"original": original, "made_of": made_of, **dict(members)}
    )


def _instance(*made_of) -> Fast:
    kind = _made(*made_of)
    return kind.__new__(kind)

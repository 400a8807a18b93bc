"""What a patch changes in a model, each change with its exact way back."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import nn


class Change(Protocol):
    """One change of a model. It holds the model weakly: a report kept for its numbers must not keep a model alive."""

    def apply(self) -> None:
        """Make the change."""

    def revert(self) -> None:
        """Take it back, exactly."""

    def obstacle(self) -> str | None:
        """What somebody else has done to the same thing in the meantime, in words; None if nothing."""


class ClassSwap:
    """A module gets another class; parameters, buffers, hooks and attributes stay.

    Args:
        module: the module.
        after: its new class.
    """

    def __init__(self, module: nn.Module, after: type):
        self._module, self._before, self._after = weakref.ref(module), type(module), after

    def apply(self) -> None:
        """Give the module its new class."""
        self._set(self._after)

    def revert(self) -> None:
        """Give the module its own class back."""
        self._set(self._before)

    def obstacle(self) -> str | None:
        """The class that the module has become, if it is neither of the two."""
        module = self._module()
        if module is None or type(module) in (self._before, self._after):
            return None
        return f"modules have become {type(module).__name__}"

    def _set(self, kind: type) -> None:
        module = self._module()
        if module is not None:
            module.__class__ = kind

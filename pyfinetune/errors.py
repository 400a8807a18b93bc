"""Every error that pyfinetune raises on purpose."""

from __future__ import annotations


class PyfinetuneError(Exception):
    """Base of all errors of this package."""


class InvalidInput(PyfinetuneError, ValueError):
    """An argument has the wrong shape, dtype, device or value; the message names it and what it should be."""


class BackendUnavailable(PyfinetuneError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


class UserError(PyfinetuneError):
    """A mistake in a command, a configuration or a data file.

    Args:
        message: what is wrong, with the file, row or key it was found at.
        fix: the command or edit that mends it; printed on a line of its own.
    """

    def __init__(self, message: str, fix: str | None = None):
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  fix: {self.fix}"


class NotProved(PyfinetuneError):
    """What was written is not what it was made from; the message names the row or tensor, and by how much it is off."""

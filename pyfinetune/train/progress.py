"""A progress bar on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 30.0  # seconds between lines where there is no terminal


class Counter:
    """Counts what is done; to be used in a `with` statement, which takes the bar down also after an error.

    Args:
        console: where to draw.
        what: is counted.
        total: how many there are.

    Example:
        >>> with Counter(Console(quiet=True), "answers", 2) as counter:
        ...     counter.add(2)
    """

    def __init__(self, console: Console, what: str, total: int):
        self.console, self.what, self.total, self.done = console, what, total, 0
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Counter:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(self.what, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int) -> None:
        """Count some more.

        Args:
            count: how many.
        """
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            self.console.print(f"{self.what}: {self.done:,} of {self.total:,}", highlight=False, markup=False)

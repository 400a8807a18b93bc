"""What `patch` did: a row for each module it looked at, and the way back."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterable, Sequence

from pyfinetune.errors import InvalidInput
from pyfinetune.hf.changes import Change

SWAPPED, LEFT = "swapped", "left"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a report.

    Args:
        kind: what the module is, in words.
        name: its path in the model.
        status: "swapped" or "left".
        backend: the backend that its op runs on; None where it was left.
        reason: why it was left; None where it was swapped.
        probe_error: largest error of outputs and gradients in the probe, relative to the largest exact value; None
            where there was no probe.
    """

    kind: str
    name: str
    status: str
    backend: str | None
    reason: str | None
    probe_error: float | None


class Report:
    """What `patch` did: a row for each module it looked at, and the way back.

    Args:
        rows: one for each module.
        changes: what was changed in the model, in order; none of them keeps the model alive.
    """

    def __init__(self, rows: Sequence[Row], changes: Sequence[Change]):
        self.rows = tuple(rows)
        self._changes = list(changes)

    @property
    def swapped(self) -> int:
        """Modules that run on the kernels."""
        return sum(row.status == SWAPPED for row in self.rows)

    @property
    def left(self) -> int:
        """Modules that were looked at and left alone."""
        return len(self.rows) - self.swapped

    def undo(self) -> None:
        """Take every change back; the model is then exactly as before. Safe to call twice.

        Raises:
            InvalidInput: something else has changed the same thing since (FSDP changes a module's class). Nothing is
                undone then.
        """
        obstacles = sorted({obstacle for change in self._changes if (obstacle := change.obstacle()) is not None})
        if obstacles:
            raise InvalidInput(f"undo: {', '.join(obstacles)} since; undo that first")
        for change in reversed(self._changes):
            change.revert()
        self._changes = []

    def to_json(self) -> str:
        """The report as JSON: the two counts and the rows."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"swapped": self.swapped, "left": self.left, "rows": rows}, indent=2)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        if not self.rows:
            return "nothing to patch: the model has no module that a kernel could take over"
        table = Table(box=box.SIMPLE)
        for column in ("kind", "count", "modules", "status", "backend", "probe error"):
            table.add_column(column, no_wrap=column != "modules", justify="right" if column == "count" else "left")
        notes: list[str] = []
        for (kind, status, backend, reason), rows in self._groups().items():
            if reason is not None:
                notes.append(f"({len(notes) + 1}) {reason}")
                status = f"{status} ({len(notes)})"
            errors = [row.probe_error for row in rows if row.probe_error is not None]
            error = f"{max(errors):.1e}" if errors else ""
            table.add_row(kind, str(len(rows)), _endings(row.name for row in rows), status, backend or "", error)
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        lines = [f"{self.swapped} of {len(self.rows)} modules swapped", *text.getvalue().rstrip().splitlines(), *notes]
        return "\n".join(line.rstrip() for line in lines)

    def _groups(self) -> dict[tuple, list[Row]]:
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.status, row.backend, row.reason), []).append(row)
        return groups


def _endings(names: Iterable[str]) -> str:
    """The last parts of paths, each once, numbers as *."""
    ends = list(dict.fromkeys(re.sub(r"\d+", "*", name.rsplit(".", 1)[-1]) for name in names))
    return ", ".join(ends[:7]) + (", ..." if len(ends) > 7 else "")

"""The verdict on two ways to compute the same thing: how far each is from the exact result."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence

import torch

FORWARD, BACKWARD = 1.5, 2.0


@dataclasses.dataclass(frozen=True)
class Item:
    """One quantity.

    Args:
        name: what it is.
        error: of ours, the norm of its difference from the exact one, relative to the exact one's norm.
        usual: the same of the original.
        allowed: the most that ours may be off.
        note: more, in words.
    """

    name: str
    error: float
    usual: float
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether ours is close enough; a NaN is not."""
        return self.error <= self.allowed


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Args:
        items: one for each quantity.
        exact: what the errors are measured against: "float64" or "float32".
        dtype: the dtype that both were run in.
        notes: facts beside the numbers: what was swapped, what could not be tried.
    """

    items: tuple[Item, ...]
    exact: str
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every quantity is close enough."""
        return all(item.ok for item in self.items)

    def to_json(self) -> str:
        """The verdict as JSON."""
        items = [{**dataclasses.asdict(item), "ok": item.ok} for item in self.items]
        facts = {"ok": self.ok, "exact": self.exact, "dtype": self.dtype, "notes": self.notes, "items": items}
        return json.dumps(facts, indent=2)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        for column in ("quantity", "ours", "original", "allowed", ""):
            table.add_column(column, justify="left" if column == "quantity" else "right", overflow="fold")
        shown = [item for item in self.items if not item.ok or not item.name.startswith("grad of ")]
        grads = [item for item in self.items if item.ok and item.name.startswith("grad of ")]
        if grads:
            worst = max(grads, key=lambda item: item.error / item.allowed if item.allowed else 0.0)
            count = f"{len(grads)} gradients, the farthest off" if len(grads) > 1 else worst.name
            shown.append(dataclasses.replace(worst, name=count, note=worst.name.removeprefix("grad of ")))
        for item in shown:
            verdict = ("ok " if item.ok else "TOO FAR OFF ") + item.note
            table.add_row(item.name, f"{item.error:.2e}", f"{item.usual:.2e}", f"{item.allowed:.2e}", verdict)
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        head = f"{'equal' if self.ok else 'NOT EQUAL'} within rounding: errors in {self.dtype}, against {self.exact}"
        return "\n".join([head, *(line.rstrip() for line in text.getvalue().rstrip().splitlines()), *self.notes])


def judge(
    ours: Mapping[str, torch.Tensor],
    original: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    forward: Sequence[str] = (),
) -> list[Item]:
    """How far ours is off in each quantity, and how far it may be.

    Through many layers the largest error is a matter of chance, the norm of the error is not. It may be 1.5 times the
    original's in what is named in `forward`, twice in the rest, plus one ulp of the exact value's norm.

    Args:
        ours, original, exact: quantities by name; those of `exact` count.
        dtype: the dtype of ours and the original, whose ulp it is.
        forward: names of quantities of the forward pass.
    """
    items = []
    for name, truth in exact.items():
        truth = truth.double()
        size = truth.norm().item()
        error, usual = ((run[name].double() - truth).norm().item() for run in (ours, original))
        scale = size or 1.0
        factor = FORWARD if name in forward else BACKWARD
        allowed = factor * usual / scale + torch.finfo(dtype).eps * (size / scale)
        items.append(Item(name, error / scale, usual / scale, allowed))
    return items

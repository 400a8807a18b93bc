"""`patch`: swap the kernels into a Hugging Face model, say what was swapped and what was left, and take it back."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import weakref
from collections.abc import Iterable, Sequence

from torch import nn

from pyfinetune.errors import BackendUnavailable, InvalidInput
from pyfinetune.hf.probe import Candidate, Proof

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
        swaps: module, class before, class after.
    """

    def __init__(self, rows: Sequence[Row], swaps: Sequence[tuple[nn.Module, type, type]]):
        self.rows = tuple(rows)
        # Weak: a report kept for its numbers must not keep the model alive.
        self._swaps = [(weakref.ref(module), before, after) for module, before, after in swaps]

    @property
    def swapped(self) -> int:
        """Modules that run on the kernels."""
        return sum(row.status == SWAPPED for row in self.rows)

    @property
    def left(self) -> int:
        """Modules that were looked at and left alone."""
        return len(self.rows) - self.swapped

    def undo(self) -> None:
        """Give every swapped module its own class back; the model is then exactly as before. Safe to call twice.

        Raises:
            InvalidInput: something else has changed a module's class since (FSDP does). Nothing is undone then.
        """
        alive = [(module, before, after) for ref, before, after in self._swaps if (module := ref()) is not None]
        changed = {type(module).__name__ for module, before, after in alive if type(module) not in (before, after)}
        if changed:
            raise InvalidInput(f"undo: modules have become {', '.join(sorted(changed))} since; undo that first")
        for module, before, _ in alive:
            module.__class__ = before
        self._swaps = []

    def to_json(self) -> str:
        """The report as JSON: the two counts and the rows."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"swapped": self.swapped, "left": self.left, "rows": rows}, indent=2)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        if not self.rows:
            return "nothing to patch: the model has no PEFT adapter layers (patch after get_peft_model)"
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


def _candidates(model: nn.Module) -> list[Candidate]:
    # A model with adapters has loaded peft already; one without must not.
    if "peft" not in sys.modules:
        return []
    from pyfinetune.hf import lora_linear

    return list(lora_linear.candidates(model))


def _proved(candidate: Candidate, proofs: dict[tuple, tuple[Proof, str]]) -> tuple[Proof, str]:
    if candidate.signature not in proofs:
        try:
            proofs[candidate.signature] = candidate.prove(candidate.module, candidate.replacement)
        except BackendUnavailable:
            raise  # the caller forced a backend, and it never falls back silently
        except Exception as error:  # whatever it is, the module stays as it is and the report says so
            reason = f"the probe failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            proofs[candidate.signature] = Proof(None, reason), ""
    return proofs[candidate.signature]


def patch(model: nn.Module) -> Report:
    """Swap the kernels into a model, in place.

    PEFT's LoRA layers over `nn.Linear`, `pf.Linear4bit` and bitsandbytes' `Linear4bit` get a class whose forward is
    one op. Parameters, keys, merging, saving and switching of adapters stay PEFT's. Each distinct layer is first
    proved on random numbers: where outputs or gradients are not as close to the exact ones as the original's, it is
    left alone. Whatever the op does not cover at run time (several active adapters, merged ones, ...) runs on PEFT's
    own forward. Patch after `get_peft_model` and before wrapping the model in FSDP or DDP.

    Args:
        model: a model with PEFT adapters, on its device and in its dtype.

    Returns:
        A report: print it, read `.rows`, or call `.undo()`.

    Raises:
        InvalidInput: not a module.
        BackendUnavailable: a backend is forced that cannot run here; nothing was swapped.

    Example:
        >>> report = pf.patch(model)
        >>> print(report)
        >>> report.undo()
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"patch: model is {type(model).__name__}, needs an nn.Module")
    proofs: dict[tuple, tuple[Proof, str]] = {}
    rows, swaps = [], []
    for item in _candidates(model):
        if item.reason is not None:
            rows.append(Row(item.kind, item.name, LEFT, None, item.reason, None))
            continue
        proof, backend = _proved(item, proofs)
        if proof.reason is not None:
            rows.append(Row(item.kind, item.name, LEFT, None, proof.reason, proof.error))
        else:
            rows.append(Row(item.kind, item.name, SWAPPED, backend, None, proof.error))
            swaps.append((item.module, type(item.module), item.replacement))
    report = Report(rows, swaps)
    try:
        for module, _, after in swaps:
            module.__class__ = after
    except TypeError:
        report.undo()
        raise
    return report

"""What a check found, for a person's screen."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfinetune.train.preflight.checks import Preflight

_PARTS = {"train": "training", "held_out": "held-out"}
_COUNTS = {
    "examples": "rows",
    "tokens": "tokens",
    "learned_tokens": "of them learned",
    "longest": "longest row, tokens",
    "cut_short": "answers cut short",
    "dropped": "answers cut off",
    "lost_tokens": "answer tokens lost",
    "masked": "rows without an answer",
}
_HEAD_COUNTS = {
    "examples": "rows",
    "rows": "as the model reads them",
    "tokens": "tokens",
    "learned_tokens": "labels to learn",
    "longest": "longest row, tokens",
    "cut_short": "rows cut short",
}
_MOST_LABELS = 20


def show(found: Preflight, console: Console, errors: Console) -> None:
    """Print what a check found, the problems last.

    Args:
        found: what `preflight.examine` returned.
        console: where the facts go.
        errors: where the problems go.

    Example:
        >>> show(Preflight(), Console(), Console(stderr=True))
        ready to train
    """
    if found.counts:
        console.print(_table(found), "")
    for line in _lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found.example:
        console.print()
        console.print(_example(found), soft_wrap=True)
        console.print()
    for line in found.prediction:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for problem in found.problems:
        style = "bold red" if problem.severity == "error" else "yellow"
        errors.print(Text(str(problem), style), soft_wrap=True)
    if found.ok:
        warned = len(found.problems)
        console.print("ready to train" + (f", with {warned} warning{'s' * (warned > 1)}" if warned else ""))


def _table(found: Preflight) -> Table:
    parts = {part: count for part, count in found.counts.items() if count["examples"]}
    table = Table(box=None)
    table.add_column("")
    for part in parts:
        table.add_column(_PARTS[part], justify="right")
    names = _COUNTS if found.head == "causal_lm" else _HEAD_COUNTS
    for key, name in names.items():
        table.add_row(name, *(f"{count[key]:,}" for count in parts.values()))
    return table


def _lines(found: Preflight) -> list[str]:
    lines = []
    if found.data:
        kept = f", {found.data['test']:,} kept for afterwards" if found.data["test"] else ""
        lines.append(f"data: {found.data['format']}{kept}")
        for use in found.data["sources"]:
            kind = "replayed" if use["replayed"] else "used"
            lines.append(f"  {use['name']}: {use['used']:,} rows {kind}, of {use['rows']:,}")
        for finding in found.data["findings"]:
            if finding["dropped"]:
                first = finding["rows"][0]["row"]
                lines.append(f"  clean: {finding['count']:,} {finding['kind']} rows dropped, the first {first}")
    if found.head != "causal_lm":
        lines.append(f"head: {found.head}")
    if found.labels:
        total = sum(found.labels.values())
        shown = [f"{name} {100 * count / total:.1f} %" for name, count in list(found.labels.items())[:_MOST_LABELS]]
        rest = len(found.labels) - len(shown)
        lines.append(f"labels: {', '.join(shown)}" + (f" and {rest} more" if rest else ""))
    if found.packing:
        lines.append(f"packing: {_packing(found.packing)}")
    if found.ends:
        listed = ", ".join(f"{end['token']!r} ({end['answers']:,} answers)" for end in found.ends[:3])
        lines.append(f"end token learned: {listed}")
    if found.model:
        trainable, total = found.model["trainable_parameters"], found.model["parameters"]
        lines.append(
            f"model: {found.model['type']}, {total:,} parameters; {found.model['method']} trains {trainable:,}"
            f" ({100 * trainable / total:.2f} %)"
        )
    if found.steps is not None:
        lines.append(f"steps: {found.steps:,}")
    return lines


def _packing(packing: dict) -> str:
    if packing["packing"]:
        return f"{packing['rows']:,} rows of {packing['row_length']:,} tokens, {100 * packing['filled']:.1f} % filled"
    return (
        f"off; {packing['rows']:,} rows of up to {packing['row_length']:,} tokens, on average"
        f" {100 * packing['filled']:.1f} % of that (packing: true would make {packing['rows_if_packed']:,} rows,"
        f" {100 * packing['filled_if_packed']:.1f} % filled)"
    )


def _example(found: Preflight) -> Text:
    """The example with its learned stretches in green, and between brackets where there are no colours."""
    text = Text(f"{found.example_place}, as the model reads it; ")
    text.append("⟦learned⟧", "bold green")
    text.append(" and only read\n")
    for stretch in found.example:
        if stretch["learned"]:
            text.append(f"⟦{stretch['text']}⟧", "bold green")
        else:
            text.append(stretch["text"], "dim")
    return text

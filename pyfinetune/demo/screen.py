"""What a person sees: numbered stages as they come, and a summary at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from pyfinetune.demo.compare import Comparison
    from pyfinetune.demo.stages import Outcome
    from pyfinetune.train.report.answers import Sample

_WIDTH = 100


class Screen:
    """Prints the demo as it goes.

    Args:
        console: where to; the summary is at most 100 columns wide.
    """

    def __init__(self, console: Console):
        self.console = console
        self._stage = 0

    def title(self, text: str, facts: str) -> None:
        """The first lines."""
        self.console.print(f"[bold]{escape(text)}[/bold]", highlight=False)
        self.console.print(f"[dim]{escape(facts)}[/dim]", highlight=False, soft_wrap=True)

    def stage(self, text: str) -> None:
        """The heading of the next stage."""
        self._stage += 1
        self.console.print(f"\n[bold cyan]{self._stage}[/bold cyan]  [bold]{escape(text)}[/bold]", highlight=False)

    def line(self, text: str) -> None:
        """A line below a heading."""
        self.console.print(Padding(escape(text), (0, 0, 0, 3), expand=False), highlight=False, width=self._width)

    def outcome(self, outcome: Outcome) -> None:
        """What a training stage came to."""
        self.line(
            f"held-out loss {outcome.loss_before:.3f} → {outcome.loss:.3f}, perplexity"
            f" {outcome.perplexity_before:,.1f} → {outcome.perplexity:,.1f}; {outcome.steps:,} steps"
            f" ({outcome.epochs:.1f} times through the texts) in {outcome.seconds:.0f} s"
        )

    def summary(
        self,
        pretrain: Outcome | None,
        finetune: Outcome,
        samples: list[Sample],
        comparison: Comparison | str,
        facts: list[tuple[str, str]],
    ) -> None:
        """The end: answers, losses, speed, and what else there is to know."""
        self.console.print()
        self.console.rule("[bold]before and after[/bold]", align="left")
        for sample in samples:
            self._sample(sample)
        self.console.print()
        losses = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("held out", "loss before", "after", "perplexity before", "after", "steps", "tokens/s"):
            losses.add_column(column, justify="left" if column == "held out" else "right", no_wrap=True)
        rows = [("raw text", pretrain)] if pretrain else []
        for name, outcome in [*rows, ("answers", finetune)]:
            losses.add_row(
                name,
                f"{outcome.loss_before:.3f}",
                f"[bold]{outcome.loss:.3f}[/bold]",
                f"{outcome.perplexity_before:,.1f}",
                f"[bold]{outcome.perplexity:,.1f}[/bold]",
                f"{outcome.steps:,}",
                f"{outcome.tokens_per_second:,.0f}",
            )
        self.console.print(losses)
        self._speed(comparison)
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
        for name, value in facts:
            table.add_row(f"[dim]{escape(name)}[/dim]", escape(value))
        self.console.print(table, width=self._width, highlight=False)

    def saved(self, base: str, adapter: str, again: list[str]) -> None:
        """Where the adapter is and how to use it."""
        self.console.print(
            f"\nThe adapter is in [bold]{escape(adapter)}[/bold]. Use it from Python:\n", highlight=False
        )
        for line in loading_lines(base, adapter):
            self.console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
        self.console.print()
        for line in again:
            self.console.print(f"[dim]{escape(line)}[/dim]", highlight=False, soft_wrap=True)

    def _sample(self, sample: Sample) -> None:
        self.console.print(f"\n[bold]{escape(_line(sample.question))}[/bold]", highlight=False)
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        rows = (("before", "red", sample.before), ("after", "green", sample.after), ("true", "", sample.truth))
        for name, style, text in rows:
            table.add_row(f"[dim]{name}[/dim]", escape(_line(text)), style=style)
        self.console.print(Padding(table, (0, 0, 0, 3), expand=False), highlight=False, width=self._width)

    def _speed(self, comparison: Comparison | str) -> None:
        if isinstance(comparison, str):
            self.console.print(f"[dim]not compared: {escape(comparison)}[/dim]\n", highlight=False, soft_wrap=True)
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("the same QLoRA steps")
        table.add_column("tokens/s", justify="right")
        table.add_column("loss of each step")
        for side in (comparison.theirs, comparison.ours):
            table.add_row(side.name, f"{side.tokens_per_second:,.0f}", " ".join(f"{loss:.3f}" for loss in side.losses))
        self.console.print(table, highlight=False)
        self.console.print(verdict(comparison) + "\n", highlight=False, soft_wrap=True)

    @property
    def _width(self) -> int:
        return min(_WIDTH, self.console.width)


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def verdict(comparison: Comparison) -> str:
    """The comparison in one sentence, whichever way it went.

    Args:
        comparison: what `compare.compare` returned.

    Returns:
        The sentence.

    Example:
        >>> verdict(comparison)  # doctest: +SKIP
        'pyfinetune is 1.62 times as fast; the losses agree to 0.05 %.'
    """
    if not comparison.equal:
        return f"The losses differ by {comparison.difference:.1%}, so the rates are not to be compared."
    agree = f"the losses agree to {max(comparison.difference, 1e-4):.2%}"
    if comparison.ratio < 1:
        return f"pyfinetune is not faster here: {comparison.ratio:.2f} times their rate; {agree}."
    return f"pyfinetune is {comparison.ratio:.2f} times as fast; {agree}."


def loading_lines(base: str, adapter: str) -> list[str]:
    """Python that loads the fine-tuned model.

    Args:
        base: the model's name or folder.
        adapter: the adapter's folder.

    Returns:
        Three lines.

    Example:
        >>> len(loading_lines("base", "adapter"))
        3
    """
    base = str(Path(base)) if Path(base).exists() else base
    return [
        "import peft, transformers, pyfinetune as pf",
        f'model = transformers.AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")',
        f'model = peft.PeftModel.from_pretrained(pf.quantize(model), "{adapter}")',
    ]

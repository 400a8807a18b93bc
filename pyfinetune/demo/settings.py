"""What the demo is asked to do, and how its time is shared out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from pyfinetune.demo.base import Size
from pyfinetune.errors import UserError

MARK = "demo.json"  # tells a folder of ours from anybody else's


@dataclass(frozen=True)
class Settings:
    """The demo's settings.

    Args:
        model: a causal language model's name or folder; None trains a small one first.
        data: a file that `pyfinetune train` accepts; None asks about the standard library.
        output_dir: where everything goes.
        seed: of everything drawn.
        minutes: how long it may take, about.
        device: `auto`, `cpu` or `cuda`.
        pretrain_steps, steps: of the two stages, instead of as many as fit the time.
        size: of the small model.
    """

    model: str | None = None
    data: str | None = None
    output_dir: str = "demo-output"
    seed: int = 42
    minutes: float = 3.0
    device: str = "auto"
    pretrain_steps: int | None = None
    steps: int | None = None
    size: Size = field(default_factory=Size)

    @property
    def base(self) -> str:
        """The model that is fine-tuned."""
        return self.model or str(Path(self.output_dir) / "base")

    @property
    def adapter(self) -> str:
        """Where the adapter is saved."""
        return str(Path(self.output_dir) / "adapter")


def check(settings: Settings) -> None:
    """Check settings before anything is written.

    Args:
        settings: what the user asked for.

    Raises:
        UserError: a value is out of range, or the output folder holds something else.

    Example:
        >>> check(Settings(output_dir="no-such-folder"))
    """
    if not (math.isfinite(settings.minutes) and settings.minutes > 0):
        raise UserError(f"--minutes: {settings.minutes} is no length of time", fix="--minutes 3")
    if settings.seed < 0:
        raise UserError(f"--seed: {settings.seed} is below 0", fix="--seed 42")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: {settings.device!r} is unknown", fix="--device auto, cpu or cuda")
    for name, value in (("--pretrain-steps", settings.pretrain_steps), ("--steps", settings.steps)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} trains nothing", fix=f"{name} 100, or leave it out")
    if settings.model is not None and settings.pretrain_steps is not None:
        raise UserError("--pretrain-steps: a given --model is not trained on raw text", fix="leave out one of the two")
    if settings.data is not None and not Path(settings.data).is_file():
        raise UserError(f"--data: {settings.data}: no such file", fix="give a JSON, JSONL, CSV, Parquet or text file")
    out = Path(settings.output_dir)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output-dir: {out} is a file", fix="give the path of a folder, existing or not")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UserError(
            f"--output-dir: {out} holds files that are not an earlier demo's", fix="give another folder, or empty it"
        )


class Clock:
    """The time there is.

    Args:
        seconds: for everything.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def share(self, part: float) -> float:
        """A part of the seconds that are left, or of a third of all: a stage after a slow one is not starved."""
        return part * max(self.seconds - self.elapsed, self.seconds / 3)

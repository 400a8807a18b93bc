"""What a run leaves for people beside its weights: answers before and after, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyfinetune.train import answers, html_report
from pyfinetune.train.config import RunConfig
from pyfinetune.train.methods import before_training


def answer_before(config: RunConfig, model: Any, tokenizer: Any, rows: Sequence[Any], anew: bool) -> None:
    """Let the model answer a few questions before its first step.

    Args:
        config: the run's configuration; nothing happens without `report` and `report_examples`.
        model: the model as it will be trained.
        tokenizer: its tokenizer.
        rows: held-out rows of documents.
        anew: whether the run starts from the beginning; one that goes on has its answers in a file.

    Example:
        >>> answer_before(config, model, tokenizer, rows.held_out, anew=True)  # doctest: +SKIP
    """
    if not (anew and config.report and config.report_examples and model.can_generate()):
        return
    samples = answers.choose(rows, tokenizer, config.seed, config.report_examples)
    with before_training(model):
        answers.answer_all(samples, "before", model, tokenizer)
    answers.save_samples(samples, config.output_dir)


def finish_report(config: RunConfig, model: Any, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Let the trained model answer the same questions, and write `report.html`.

    Args:
        config: the run's configuration.
        model: the trained model; None where it is spread over processes and cannot answer alone.
        tokenizer: its tokenizer.
        say: called with a message for the person at the screen.

    Example:
        >>> finish_report(config, model, tokenizer, print)  # doctest: +SKIP
        report: out/report.html
    """
    samples = answers.read_samples(config.output_dir)
    if samples and model is None:
        say("the questions are not asked again: the model is spread over the processes; the saved one answers alone")
    elif samples:
        answers.answer_all(samples, "after", model, tokenizer)
        answers.save_samples(samples, config.output_dir)
    if not html_report.can_draw():
        say("warning: report.html has no curves without matplotlib: pip install matplotlib")
    say(f"report: {html_report.write_report(config.output_dir)}")


def complete_report(config: RunConfig) -> None:
    """Write the report of a run that was stopped while it wrote it.

    Args:
        config: the configuration of a run that is complete.

    Example:
        >>> complete_report(config)  # doctest: +SKIP
    """
    if config.report and not (Path(config.output_dir) / "report.html").is_file():
        html_report.write_report(config.output_dir)

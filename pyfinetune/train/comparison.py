"""`pyfinetune compare`: was fine-tuning worth it? The tuned model against prompts of its base, and against others.

    CompareConfig -> asking -> records of answers -> compare -> Comparison -> compare_view

Every system answers the same held-out rows. Answers are kept as they come, so that the same command goes on after an
interruption and asks only what is new.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pyfinetune.errors import UserError
from pyfinetune.train import manifest, metrics
from pyfinetune.train.asking import Questions, answer_questions, read_questions
from pyfinetune.train.compare_config import CompareConfig
from pyfinetune.train.evaluating import column_of
from pyfinetune.train.forgetting import Forgetting, measure_forgetting
from pyfinetune.train.metrics import Score
from pyfinetune.train.model import choose_device
from pyfinetune.train.prompts import Asked
from pyfinetune.train.systems import LoadedModel, System, systems_of
from pyfinetune.train.using import Found, find_model
from pyfinetune.train.verdicts import Verdict, verdict_on_other, verdict_on_tuning


@dataclass
class SystemResult:
    """What one system did.

    Args:
        name: of the system.
        kind: `base`, `tuned` or `other`.
        prompted: whether it is a model that no run has tuned.
        scores: metric to score.
        slices: column to value to metric to score.
        against_tuned: the headline metric minus the tuned model's, on the same rows; None for the tuned model.
        latency: seconds an answer takes alone, median; `latency_p90`, the 90th percentile.
        tokens_in, tokens_out: per answer, on average.
        cost: of 1,000 answers in the price's currency; None without a price.
        dropped: rows whose prompt had no room for all its examples.
        unanswered: rows whose question is too long for the model.
        answers: the file of its answers.
    """

    name: str
    kind: str
    prompted: bool
    scores: dict[str, Score]
    slices: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)
    against_tuned: Score | None = None
    latency: float | None = None
    latency_p90: float | None = None
    tokens_in: float = 0.0
    tokens_out: float = 0.0
    cost: float | None = None
    dropped: int = 0
    unanswered: int = 0
    answers: str = ""


@dataclass
class Comparison:
    """A whole comparison.

    Args:
        run: the folder of the fine-tuned run.
        task: of the rows.
        metric: the one that the verdict goes by.
        rows: how many were answered.
        answered_by: how the predictions came about, in words.
        systems: each system's result, the tuned model last but for the others.
        verdict: whether fine-tuning was worth it.
        others: the tuned model against each system of another model.
        forgetting: loss on general text before and after, or None.
        notes: what a reader has to know.
        output_dir: where answers and report are.
        seconds: of this session.
    """

    run: str
    task: str
    metric: str
    rows: int
    answered_by: str
    systems: list[SystemResult]
    verdict: Verdict
    others: list[Verdict] = field(default_factory=list)
    forgetting: Forgetting | None = None
    notes: list[str] = field(default_factory=list)
    output_dir: str = ""
    seconds: float = 0.0


def compare(config: CompareConfig, console: Console | None = None) -> Comparison:
    """Let every system answer the held-out rows, and judge.

    Args:
        config: what `compare_config.load_compare` returned.
        console: where progress goes; standard error by default.

    Returns:
        Scores, latencies, tokens, costs and the verdict. Answers are in `answers/` of the configuration's folder.

    Raises:
        UserError: a model, a file, a row, a column or a template is at fault; names it and the mend.

    Example:
        >>> compare(load_compare("runs/first")).verdict.decision  # doctest: +SKIP
        'worth it'
    """
    begin, console = time.monotonic(), console or Console(stderr=True)
    tuned = find_model(config.run)
    if tuned.run is None:
        raise UserError(f"run: {config.run} is no run of `pyfinetune train`", fix="give the output_dir of a run")
    rows = read_questions(config, tuned)
    metric = config.metric or metrics.METRICS[rows.task][0]
    if metric not in metrics.METRICS[rows.task]:
        raise UserError(
            f"metric: {metric!r} is none of {rows.task}", fix=f"one of {', '.join(metrics.METRICS[rows.task])}"
        )
    columns = {name: column_of(rows.examples, name) for name in config.slices}
    systems = systems_of(config, tuned, rows.task, rows.examples)
    _check_general(config, systems)
    results, predictions = [], {}
    forgetting = None
    for found, members in _by_model(systems):
        loaded = LoadedModel(found, members[0], choose_device(config.device))
        for system in members:
            asked, answers, path = answer_questions(config, rows, system, loaded, console)
            predictions[system.name] = [answer["prediction"] for answer in answers]
            results.append(_result(config, rows, system, asked, answers, columns))
            results[-1].answers = str(path)
        if config.general_file is not None and members[0].kind in ("base", "tuned"):
            forgetting = measure_forgetting(config, members[0].kind, loaded, forgetting, console)
        loaded.release()
    verdict, others = _judge(config, rows, metric, results, predictions)
    return Comparison(
        config.run,
        rows.task,
        metric,
        len(rows.examples),
        "the most likely of the labels" if rows.choices else "greedy generation",
        results,
        verdict,
        others,
        forgetting,
        rows.notes + _notes(results),
        str(config.folder),
        time.monotonic() - begin,
    )


def _check_general(config: CompareConfig, systems: Sequence[System]) -> None:
    tuned = next(system for system in systems if system.kind == "tuned")
    if config.general_file is not None and tuned.head.kind != "causal_lm":
        raise UserError(
            f"general_file: the loss on general text is a language model's, and {config.run} has a head of its own",
            fix="leave general_file out",
        )


def _by_model(systems: Sequence[System]) -> list[tuple[Found, list[System]]]:
    """Systems of one model together, so that each is loaded once."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(system.model, []).append(system)
    return [(members[0].found, members) for members in groups.values()]


def _result(
    config: CompareConfig,
    rows: Questions,
    system: System,
    asked: Sequence[Asked],
    answers: Sequence[dict[str, Any]],
    columns: dict[str, list[Any]],
) -> SystemResult:
    said = [answer["prediction"] for answer in answers]
    options: dict[str, Any] = {"labels": rows.labels or None, "seed": config.seed, "resamples": config.resamples}
    scores = metrics.score(rows.task, said, rows.references, **options)
    result = SystemResult(system.name, system.kind, system.is_prompted, scores)
    for name, values in columns.items():
        result.slices[name] = metrics.score_slices(rows.task, said, rows.references, values, **options)
    alone = [answer["seconds"] for answer in answers if answer["alone"] and answer["fits"]]
    batched = [answer["seconds"] for answer in answers if not answer["alone"] and answer["fits"]]
    if alone:
        result.latency, result.latency_p90 = (float(np.percentile(alone, part)) for part in (50, 90))
    result.tokens_in = float(np.mean([answer["tokens_in"] for answer in answers]))
    result.tokens_out = float(np.mean([answer["tokens_out"] for answer in answers]))
    if system.price is not None:
        busy = float(np.mean(batched or alone or [0.0]))
        result.cost = 1000 * system.price.of(result.tokens_in, result.tokens_out, busy)
    result.dropped = sum(row.dropped > 0 for row in asked)
    result.unanswered = sum(not answer["fits"] for answer in answers)
    return result


def _judge(
    config: CompareConfig,
    rows: Questions,
    metric: str,
    results: Sequence[SystemResult],
    predictions: dict[str, list[Any]],
) -> tuple[Verdict, list[Verdict]]:
    options: dict[str, Any] = {"labels": rows.labels or None, "seed": config.seed, "resamples": config.resamples}
    tuned = next(result for result in results if result.kind == "tuned")
    tuned_less: dict[str, Score] = {}
    for result in results:
        if result is not tuned:
            pair = (predictions[tuned.name], predictions[result.name])
            less = metrics.score_difference(rows.task, metric, *pair, rows.references, **options)
            tuned_less[result.name] = less
            result.against_tuned = Score(0 - less.value, 0 - less.high, 0 - less.low, less.rows)
    # Prompting one's own base is the alternative to tuning it; another model is, where the base cannot be prompted.
    rivals = [r for r in results if r.kind == "base"] or [r for r in results if r.prompted]
    best = max(rivals, key=lambda result: result.scores[metric].value)
    prompt = best.name.removeprefix("base, ")
    scores = (tuned.scores[metric], best.scores[metric])
    verdict = verdict_on_tuning(metric, *scores, prompt, tuned_less[best.name], config.worth)
    others = [
        verdict_on_other(metric, result.name, result.scores[metric], tuned_less[result.name])
        for result in results
        if result.kind == "other"
    ]
    return verdict, others


def _notes(results: Sequence[SystemResult]) -> list[str]:
    notes = []
    for result in results:
        if result.dropped:
            notes.append(f"{result.name}: {result.dropped:,} prompts had no room for all their examples")
        if result.unanswered:
            notes.append(
                f"{result.name}: {result.unanswered:,} questions are too long for the model: unanswered, wrong"
            )
    prompted = [result for result in results if result.kind == "base"]
    if len(prompted) > 1:
        notes.append(
            f"the best of {len(prompted)} prompts was chosen on the very rows it is judged by, which favours prompting"
        )
    return notes


def save_comparison(result: Comparison) -> None:
    """Write a comparison as `compare.json` in its folder.

    Args:
        result: what `compare` returned.

    Example:
        >>> save_comparison(result)  # doctest: +SKIP
    """
    manifest.write_manifest(Path(result.output_dir) / "compare.json", dataclasses.asdict(result))

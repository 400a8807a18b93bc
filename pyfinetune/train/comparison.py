"""`pyfinetune compare`: was fine-tuning worth it? The tuned model against prompts of its base, and against others.

    CompareConfig -> compare -> Comparison -> compare_view

Every system answers the same held-out rows. Answers are kept as they come (`answers/*.jsonl`), keyed by what decides
them, so that the same command goes on after an interruption and asks only what is new. The first rows are answered
one at a time, which is where latencies come from; the others in batches.
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
from pyfinetune.train.answer_cache import AnswerCache, digest, file_name
from pyfinetune.train.compare_config import CompareConfig
from pyfinetune.train.evaluating import column_of, drawn, longest_answer, task_of
from pyfinetune.train.forgetting import Forgetting, measure_forgetting
from pyfinetune.train.formats import Example, to_examples
from pyfinetune.train.metrics import Score
from pyfinetune.train.model import choose_device
from pyfinetune.train.predicting import Answer, CausalPredictor, reference_of
from pyfinetune.train.progress import Counter
from pyfinetune.train.prompts import Asked, PromptMaker, repeated_questions
from pyfinetune.train.reading import file_rows, read_data
from pyfinetune.train.systems import LoadedModel, System, systems_of
from pyfinetune.train.using import Found, find_model
from pyfinetune.train.verdicts import Verdict, verdict_on_other, verdict_on_tuning


@dataclass
class SystemResult:
    """What one system did.

    Args:
        name: of the system.
        kind: `base`, `tuned` or `other`.
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


@dataclass
class _Rows:
    """What is asked of every system."""

    examples: list[Example]
    references: list[Any]
    task: str
    labels: list[str]
    maker: PromptMaker
    notes: list[str]


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
    rows = _rows(config, tuned)
    metric = config.metric or metrics.METRICS[rows.task][0]
    if metric not in metrics.METRICS[rows.task]:
        raise UserError(
            f"metric: {metric!r} is none of {rows.task}", fix=f"one of {', '.join(metrics.METRICS[rows.task])}"
        )
    columns = {name: column_of(rows.examples, name) for name in config.slices}
    systems = systems_of(config, tuned, rows.task)
    results, predictions = [], {}
    forgetting = None
    for found, members in _by_model(systems):
        loaded = LoadedModel(found, members[0], choose_device(config.device))
        for system in members:
            asked, answers, path = _answers(config, rows, system, loaded, console)
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
        "the most likely of the labels" if _labels(config, rows) else "greedy generation",
        results,
        verdict,
        others,
        forgetting,
        rows.notes + _notes(results),
        str(config.folder),
        time.monotonic() - begin,
    )


def _rows(config: CompareConfig, tuned: Found) -> _Rows:
    """The held-out rows, what is right to answer, and the training rows that prompts may show."""
    run = tuned.run
    data = read_data(run)
    if config.test_file is not None:
        source = run.model_copy(update={"task": config.task if config.task != "auto" else run.task})
        examples = to_examples(file_rows(config.test_file, source), run.columns, source.task)
    else:
        examples = data.test or data.held_out
    if not examples:
        raise UserError(f"run: {config.run} held no rows out", fix="name a file of rows it has not seen: test_file:")
    examples = drawn(examples, config.rows, config.seed)
    task = task_of(examples)
    if task == "pretrain":
        raise UserError(
            f"{examples[0].place}: is raw text, which asks nothing that answers could be compared on",
            fix="name rows with questions and answers under test_file:",
        )
    references = [reference_of(example, task) for example in examples]
    pool = [example for example in data.train if example.messages]
    labels = []
    if task == "classification":
        trained = (e.messages[-1]["content"] for e in pool if e.format == "classification")
        labels = sorted({*trained, *references})
    notes = []
    repeated = repeated_questions(examples, pool)
    if repeated:
        notes.append(
            f"{repeated:,} of the {len(examples):,} rows ask what a training row asks (clean: [leak] drops it)"
        )
    return _Rows(examples, references, task, labels, PromptMaker(pool, labels, config.seed), notes)


def _by_model(systems: Sequence[System]) -> list[tuple[Found, list[System]]]:
    """Systems of one model together, so that each is loaded once."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(system.model, []).append(system)
    return [(members[0].found, members) for members in groups.values()]


def _labels(config: CompareConfig, rows: _Rows) -> list[str] | None:
    return rows.labels if rows.task == "classification" and config.classify_by == "likelihood" else None


def _answers(
    config: CompareConfig, rows: _Rows, system: System, loaded: LoadedModel, console: Console
) -> tuple[list[Asked], list[dict[str, Any]], Path]:
    """Every answer of a system, those of an earlier session included."""
    tokenizer = loaded.tokenizer(rows.examples[0].format)
    longest = config.max_new_tokens or longest_answer(rows.examples, tokenizer)
    predictor = CausalPredictor(
        None, tokenizer, rows.task, _labels(config, rows), longest, config.batch_size, loaded.found.positions
    )
    room = predictor.room(rows.examples)
    asked = [rows.maker.ask(system.style, e, tokenizer, predictor.positions, room) for e in rows.examples]
    path = config.folder / "answers" / f"{file_name(system.name)}.jsonl"
    cache = AnswerCache(path)
    settings = [loaded.identity, str(loaded.device), predictor.labels, longest, rows.task]
    keys = [digest(settings, row.prompt, row.stops) for row in asked]
    missing = [at for at, key in enumerate(keys) if cache.get(key) is None]
    if missing:
        predictor.model = loaded.model
        alone = [at for at in missing if at < config.latency_rows]
        rest = [at for at in missing if at >= config.latency_rows]
        if alone:  # the first answer of a model pays for what every later one finds ready
            dataclasses.replace(predictor, max_new_tokens=2).predict([asked[alone[0]].example])
        with Counter(console, system.name, len(keys)) as counter:
            counter.add(len(keys) - len(missing))
            for part, is_alone in ((alone, True), (rest, False)):

                def keep(indices: list[int], said: list[Answer], part: list = part, is_alone: bool = is_alone) -> None:
                    found = {}
                    for index, answer in zip(indices, said, strict=True):
                        at = part[index]
                        found[keys[at]] = _record(rows, asked[at], at, answer, is_alone, tokenizer)
                    cache.add(found)
                    counter.add(len(indices))

                size = 1 if is_alone else config.batch_size
                if predictor.labels is not None and is_alone:
                    size = len(predictor.labels)
                dataclasses.replace(predictor, batch_size=size).predict([asked[at].example for at in part], keep)
    return asked, [cache.get(key) for key in keys], path


def _record(rows: _Rows, asked: Asked, at: int, answer: Answer, alone: bool, tokenizer: Any) -> dict[str, Any]:
    """What is kept of an answer, for a person to read too."""
    return {
        "row": rows.examples[at].place,
        "prompt": tokenizer.decode(asked.prompt),
        "answer": answer.text,
        "reference": rows.references[at],
        "prediction": answer.prediction,
        "tokens_in": answer.tokens_in,
        "tokens_out": answer.tokens_out,
        "seconds": round(answer.seconds, 6),
        "alone": alone,
    }


def _result(
    config: CompareConfig,
    rows: _Rows,
    system: System,
    asked: Sequence[Asked],
    answers: Sequence[dict[str, Any]],
    columns: dict[str, list[Any]],
) -> SystemResult:
    said = [answer["prediction"] for answer in answers]
    options: dict[str, Any] = {"labels": rows.labels or None, "seed": config.seed, "resamples": config.resamples}
    scores = metrics.score(rows.task, said, rows.references, **options)
    result = SystemResult(system.name, system.kind, scores)
    for name, values in columns.items():
        result.slices[name] = metrics.score_slices(rows.task, said, rows.references, values, **options)
    alone = [answer["seconds"] for answer in answers if answer["alone"] and answer["tokens_out"]]
    batched = [answer["seconds"] for answer in answers if not answer["alone"] and answer["tokens_out"]]
    if alone:
        result.latency, result.latency_p90 = (float(np.percentile(alone, part)) for part in (50, 90))
    result.tokens_in = float(np.mean([answer["tokens_in"] for answer in answers]))
    result.tokens_out = float(np.mean([answer["tokens_out"] for answer in answers]))
    if system.price is not None:
        busy = float(np.mean(batched or alone or [0.0]))
        result.cost = 1000 * system.price.of(result.tokens_in, result.tokens_out, busy)
    result.dropped = sum(row.dropped > 0 for row in asked)
    result.unanswered = sum(not answer["tokens_out"] for answer in answers)
    return result


def _judge(
    config: CompareConfig,
    rows: _Rows,
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
            result.against_tuned = Score(-less.value, -less.high, -less.low, less.rows)
    best = max((r for r in results if r.kind == "base"), key=lambda result: result.scores[metric].value)
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

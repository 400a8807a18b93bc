"""The questions of a comparison, and every system's answers to them, kept as they come.

    CompareConfig, run -> read_questions -> Questions;  System -> answer_questions -> records of answers/*.jsonl

A record is kept under a digest of what decides it: the weights, the prompt's tokens and the settings. The first rows
are answered one at a time, which is where latencies come from; the others in batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pyfinetune.errors import UserError
from pyfinetune.train.answer_cache import AnswerCache, digest, file_name
from pyfinetune.train.compare_config import CompareConfig
from pyfinetune.train.evaluating import drawn, longest_answer, task_of
from pyfinetune.train.formats import Example, to_examples
from pyfinetune.train.head_predicting import HeadPredictor, settings_of
from pyfinetune.train.heads import may_be_unanswered
from pyfinetune.train.predicting import Answer, CausalPredictor, Predictor, reference_of
from pyfinetune.train.progress import Counter
from pyfinetune.train.prompts import Asked, PromptMaker, question_of, repeated_questions
from pyfinetune.train.reading import file_rows, read_data
from pyfinetune.train.systems import LoadedModel, System
from pyfinetune.train.using import Found


@dataclass
class Questions:
    """What is asked of every system.

    Args:
        examples: the held-out rows.
        references: what is right to answer, a row each.
        task: as `metrics.score` names it.
        labels: of a classification, those of the training rows and of these; empty otherwise.
        choices: the labels where the most likely one is the answer; None where answers are written.
        maker: of the prompts.
        notes: what a reader has to know of the rows.
    """

    examples: list[Example]
    references: list[Any]
    task: str
    labels: list[str]
    choices: list[str] | None
    maker: PromptMaker
    notes: list[str]


def read_questions(config: CompareConfig, tuned: Found) -> Questions:
    """The held-out rows, what is right to answer, and the training rows that prompts may show.

    Args:
        config: of the comparison.
        tuned: the fine-tuned run.

    Returns:
        The questions.

    Raises:
        UserError: the run held nothing out, the rows are raw text, or a file is at fault.

    Example:
        >>> read_questions(config, find_model("runs/first")).task  # doctest: +SKIP
        'classification'
    """
    run = tuned.run
    data = read_data(run, unanswered=may_be_unanswered(run))
    if config.test_file is not None:
        source = run.model_copy(update={"task": config.task if config.task != "auto" else run.task})
        examples = to_examples(
            file_rows(config.test_file, source), run.columns, source.task, unanswered=may_be_unanswered(run)
        )
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
    labels: list[str] = []
    if task == "classification":
        trained = (e.messages[-1]["content"] for e in pool if e.format == "classification")
        labels = sorted({*trained, *references})
    notes = []
    repeated = repeated_questions(examples, pool)
    if repeated:
        notes.append(
            f"{repeated:,} of the {len(examples):,} rows ask what a training row asks (clean: [leak] drops it)"
        )
    choices = labels if labels and config.classify_by == "likelihood" else None
    return Questions(examples, references, task, labels, choices, PromptMaker(pool, labels, config.seed), notes)


def answer_questions(
    config: CompareConfig, questions: Questions, system: System, loaded: LoadedModel, console: Console
) -> tuple[list[Asked], list[dict[str, Any]], Path]:
    """Every answer of a system, those of an earlier session included.

    Args:
        config: of the comparison.
        questions: what is asked.
        system: who is asked.
        loaded: its model, whose weights are loaded only where an answer is missing.
        console: where the progress bar goes.

    Returns:
        How each question was asked, the record of each answer, and the file of the records.

    Raises:
        UserError: the model cannot be loaded, or a prompt not be made.

    Example:
        >>> asked, records, path = answer_questions(config, questions, system, loaded, console)  # doctest: +SKIP
    """
    asked, prompts, keys, predictor = _prepared(config, questions, system, loaded)
    path = config.folder / "answers" / f"{file_name(system.name)}.jsonl"
    cache = AnswerCache(path)
    missing = [at for at, key in enumerate(keys) if cache.get(key) is None]
    if missing:
        predictor.model = loaded.model
        if isinstance(predictor, HeadPredictor):
            predictor.labels = loaded.labels
        parts = [
            [at for at in missing if at < config.latency_rows],
            [at for at in missing if at >= config.latency_rows],
        ]
        if parts[0]:  # the first answer of a model pays for what every later one finds ready
            dataclasses.replace(predictor, max_new_tokens=2).predict([asked[parts[0][0]].example])
        is_scored = isinstance(predictor, CausalPredictor) and predictor.labels is not None
        alone = dataclasses.replace(predictor, batch_size=len(predictor.labels) if is_scored else 1)
        with Counter(console, system.name, len(keys)) as counter:
            counter.add(len(keys) - len(missing))
            for part, who in zip(parts, (alone, predictor), strict=True):
                facts = [
                    {"row": questions.examples[at].place, "prompt": prompts[at], "reference": questions.references[at]}
                    | {"alone": who is alone}
                    for at in part
                ]
                examples = [asked[at].example for at in part]
                _keep_answers(who, examples, facts, [keys[at] for at in part], cache, counter)
    return asked, [cache.get(key) for key in keys], path


def _prepared(
    config: CompareConfig, questions: Questions, system: System, loaded: LoadedModel
) -> tuple[list[Asked], list[str], list[str], CausalPredictor | HeadPredictor]:
    """How each question is asked, what is read, the key of each answer, and who answers, still without weights."""
    tokenizer = loaded.tokenizer(questions.examples[0].format)
    longest = config.max_new_tokens or longest_answer(questions.examples, tokenizer)
    decides = [loaded.identity, str(loaded.device), longest, questions.task, system.head.kind]
    if system.head.kind != "causal_lm":
        settings = settings_of(loaded.found)
        asked = [Asked(example, [], 0, 0, []) for example in questions.examples]
        prompts = [question_of(example) for example in questions.examples]
        decides.append(settings.max_length)
        # Beside the question, what the model reads may stand in columns; what is right to answer is among them.
        keys = [digest(decides, e.messages, dict(e.fields)) for e in questions.examples]
        head = HeadPredictor(None, tokenizer, (), system.head, settings, config.batch_size, longest)
        return asked, prompts, keys, head
    positions = loaded.found.positions
    causal = CausalPredictor(None, tokenizer, questions.task, questions.choices, longest, config.batch_size, positions)
    room = causal.room(questions.examples)
    asked = [questions.maker.ask(system.style, e, tokenizer, positions, room) for e in questions.examples]
    keys = [digest(decides, questions.choices, row.prompt, row.stops) for row in asked]
    return asked, [tokenizer.decode(row.prompt) for row in asked], keys, causal


def _keep_answers(
    predictor: Predictor,
    examples: Sequence[Example],
    facts: Sequence[dict[str, Any]],
    keys: Sequence[str],
    cache: AnswerCache,
    counter: Counter,
) -> None:
    """Answer, and write each answer down with its facts as soon as it is there."""

    def keep(indices: list[int], said: list[Answer]) -> None:
        cache.add({keys[at]: facts[at] | dataclasses.asdict(answer) for at, answer in zip(indices, said, strict=True)})
        counter.add(len(indices))

    predictor.predict(examples, keep)

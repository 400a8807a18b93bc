"""`pyfinetune eval`: a trained model on rows that it has not seen.

    EvalRequest -> evaluate -> Evaluation (loss, perplexity, the task's metrics, slices)

The rows are read, recognised and written as tokens by what `train` uses; what answers them is a `Predictor`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from pyfinetune.errors import UserError
from pyfinetune.train import metrics
from pyfinetune.train.checked_yaml import nearest
from pyfinetune.train.config import RunConfig
from pyfinetune.train.data import Row, load_aligned_rows, load_labelled_rows, load_rows
from pyfinetune.train.formats import Example, to_examples
from pyfinetune.train.generating import document_losses
from pyfinetune.train.head_predicting import HeadPredictor, head_of, load_head, settings_of
from pyfinetune.train.heads import Head, may_be_unanswered
from pyfinetune.train.metrics import Score
from pyfinetune.train.model import choose_device
from pyfinetune.train.predicting import Answer, CausalPredictor, Predictor, reference_of
from pyfinetune.train.progress import Counter
from pyfinetune.train.reading import read_data
from pyfinetune.train.sources import Task
from pyfinetune.train.tasks import RENDER
from pyfinetune.train.tokenizing import tokenize
from pyfinetune.train.using import Found, find_model, load_for_use, tokenizer_of

_LONGEST_ANSWER = 512  # tokens


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of `pyfinetune eval`.

    Args:
        model: the output folder of a run, of an adapter or of a model, or a name on the hub.
        data: files as `train_file` takes them, `name=path` for one that belongs to a label or a column; none for the
            rows that the run held out.
        task: what the rows are for; `auto` takes the run's task, or what their columns say.
        rows: at most so many, drawn by `seed`; None takes all.
        slices: columns by which the metrics are given too.
        classify_by: how a causal model gives a label: `likelihood`, the most likely of those that it was trained on
            (or, where no run tells, of those in the data), or `generation`, what it writes.
        max_new_tokens: of an answer; None takes the longest right one and an eighth more.
        batch_size: rows at a time.
        device: auto, cpu or cuda.
        seed: of the draw of rows and of the intervals.
        answers: a file to write every answer to, or None.
    """

    model: str
    data: tuple[str, ...] = ()
    task: str = "auto"
    rows: int | None = None
    slices: tuple[str, ...] = ()
    classify_by: str = "likelihood"
    max_new_tokens: int | None = None
    batch_size: int = 8
    device: str = "auto"
    seed: int = 0
    answers: str | None = None


@dataclass
class Evaluation:
    """How good a model is on some rows.

    Args:
        model: as it was asked for.
        task: of the rows; `pretrain` for raw text, of which there is the loss alone.
        rows: how many.
        answered_by: how the predictions came about, in words.
        scores: metric to score; `loss` (per learned token) and `perplexity` among them where there is a loss.
        slices: column to value to metric to score.
        seconds: all told.
        notes: what a reader has to know of the rows.
    """

    model: str
    task: str
    rows: int
    answered_by: str
    scores: dict[str, Score]
    slices: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def evaluate(request: EvalRequest, console: Console | None = None) -> Evaluation:
    """Evaluate a model on rows of a file, or on those that its run held out.

    Args:
        request: what is asked.
        console: where the progress bar goes; standard error by default.

    Returns:
        Loss, perplexity and the task's metrics with intervals, over all rows and by slice.

    Raises:
        UserError: the model, a file, a row or a column is at fault; names it and the mend.

    Example:
        >>> evaluate(EvalRequest("runs/first", ("test.jsonl",))).scores["accuracy"]  # doctest: +SKIP
        Score(value=0.81, low=0.78, high=0.84, rows=500)
    """
    begin, console = time.monotonic(), console or Console(stderr=True)
    found = find_model(request.model)
    examples = _examples(request, found)
    columns = {name: column_of(examples, name) for name in request.slices}
    head = head_of(found, examples)
    result = Evaluation(request.model, task_of(examples), len(examples), "", {})
    if head.kind == "causal_lm":
        right, answers, labels = _ask_causal(request, found, examples, result, console)
    else:
        right, answers, labels = _ask_head(request, found, head, examples, result, console)
    if answers:
        _score(request, result, right, answers, labels, columns)
        if request.answers is not None:
            write_answers(request.answers, examples, answers, right)
    result.seconds = time.monotonic() - begin
    return result


def _ask_causal(
    request: EvalRequest, found: Found, examples: Sequence[Example], result: Evaluation, console: Console
) -> tuple[list[Any], list[Answer], Sequence[str] | None]:
    """What is right, what a causal language model answers, and the labels there are; sets the loss."""
    tokenizer = tokenizer_of(found, examples[0].format)
    model = load_for_use(found, choose_device(request.device))
    losses, targets = _losses(request, found, model, tokenizer, examples, result, console)
    result.scores = metrics.perplexity(losses, targets, seed=request.seed)
    if result.task == "pretrain":
        result.answered_by = "nothing: raw text has a loss alone"
        return [], [], None
    labels = labels_of(found, examples, request.classify_by, result.notes) if result.task == "classification" else None
    predictor = causal_predictor(request, found, model, tokenizer, examples, labels)
    result.answered_by = "the most likely of the labels" if predictor.labels else "greedy generation"
    right = [reference_of(example, result.task) for example in examples]
    return right, answer_all(predictor, examples, console, "answers"), labels


def _ask_head(
    request: EvalRequest, found: Found, head: Head, examples: Sequence[Example], result: Evaluation, console: Console
) -> tuple[list[Any], list[Answer], Sequence[str] | None]:
    """The same of a model with a head of its own."""
    model, tokenizer, labels = load_head(found, head, choose_device(request.device))
    longest = request.max_new_tokens or longest_answer(examples, tokenizer)
    settings = settings_of(found)
    predictor = HeadPredictor(model, tokenizer, labels, head, settings, request.batch_size, longest)
    result.scores = metrics.perplexity(*predictor.losses(examples, settings.seed), seed=request.seed)
    if not head.has_perplexity:
        del result.scores["perplexity"]
    if head.kind == "masked_lm":
        result.answered_by = "nothing: the loss is of masked words"
        return [], [], None
    right = [reference_of(example, result.task) for example in examples]
    result.answered_by = "greedy generation" if head.kind == "seq2seq_lm" else f"its head ({head.kind})"
    return right, answer_all(predictor, examples, console, "answers"), labels or None


def task_of(examples: Sequence[Example]) -> str:
    """The task of recognised rows, as the metrics name it.

    Args:
        examples: rows of one format.

    Returns:
        A key of `metrics.METRICS`, or `pretrain` for raw text.

    Example:
        >>> task_of([Example("f, row 1", "alpaca")])
        'sft'
    """
    data_format = examples[0].format
    return "pretrain" if data_format == "text" else data_format if data_format in RENDER else "sft"


def column_of(examples: Sequence[Example], name: str) -> list[Any]:
    """The values of a column by which metrics are sliced.

    Args:
        examples: rows.
        name: of the column.

    Returns:
        A value a row; None where a row has none.

    Raises:
        UserError: no row has such a column.

    Example:
        >>> column_of([Example("f, row 1", "text", columns={"topic": "war"})], "topic")
        ['war']
    """
    if not any(name in example.columns for example in examples):
        listed = ", ".join(map(repr, examples[0].columns)) or "none"
        raise UserError(f"--slice {name}: no row has that column (its columns: {listed})", fix="name one of those")
    return [example.columns.get(name) for example in examples]


def read_rows(data: Sequence[str], task: str = "auto", sample_by: str = "auto") -> list[Row]:
    """Read the files that a command names.

    Args:
        data: paths; or all of them `name=path`, for files that hold one class or one column each.
        task: with `classification`, names are labels; else they are columns.
        sample_by: as of `data.load_rows`.

    Returns:
        The rows.

    Raises:
        UserError: a file is at fault, or some have names and others not.

    Example:
        >>> len(read_rows(["test.jsonl"]))  # doctest: +SKIP
        500
    """
    named = dict(path.split("=", 1) for path in data if "=" in path and not Path(path).is_file())
    if not named:
        return load_rows(data, sample_by)
    if len(named) != len(data):
        raise UserError(
            f"--data: {len(data)} files, of which {len(named)} have a name of their own",
            fix="write every one as NAME=FILE (a label's or a column's name), or none",
        )
    return load_labelled_rows(named) if task == "classification" else load_aligned_rows(named)


def held_out_examples(config: RunConfig) -> list[Example]:
    """The rows that a run never learned from: its test rows, or else those that it was evaluated on.

    Args:
        config: the run's configuration.

    Returns:
        The examples.

    Raises:
        UserError: the run held nothing out.

    Example:
        >>> len(held_out_examples(config))  # doctest: +SKIP
        374
    """
    data = read_data(config, unanswered=may_be_unanswered(config))
    if not (data.test or data.held_out):
        raise UserError("this run held no rows out", fix="name a file of rows that it has not seen: --data FILE")
    return data.test or data.held_out


def drawn(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """So many of the examples, in their order; the first ones of a sorted file would be all of one kind.

    Args:
        examples: to draw from.
        rows: how many at most; None takes all.
        seed: decides which.

    Returns:
        The examples drawn.

    Raises:
        UserError: `rows` is below 1.

    Example:
        >>> len(drawn([Example("f, row 1", "text")], 5, seed=0))
        1
    """
    if rows is not None and rows < 1:
        raise UserError(f"rows: {rows}: there is nothing to evaluate", fix="give 1 or more")
    if rows is None or rows >= len(examples):
        return list(examples)
    return [examples[at] for at in sorted(random.Random(seed).sample(range(len(examples)), rows))]


def labels_of(found: Found, examples: Sequence[Example], classify_by: str, notes: list[str]) -> list[str]:
    """The labels of a classification: those of the run's training rows, or else those of the rows at hand.

    Args:
        found: the model.
        examples: rows to evaluate.
        classify_by: `likelihood` or `generation`; where the labels of the rows decide the answers, a note says so.
        notes: are added to.

    Returns:
        The labels, sorted.

    Example:
        >>> labels_of(find_model("runs/first"), examples, "likelihood", [])  # doctest: +SKIP
        ['neg', 'pos']
    """
    there = {str(reference_of(example, "classification")) for example in examples}
    if found.run is not None:
        try:
            trained = [e for e in read_data(found.run).train if e.format == "classification"]
        except UserError as error:
            notes.append(f"the labels are those of the evaluated rows, as the training rows are gone: {error.message}")
            return sorted(there)
        learned = {str(reference_of(example, "classification")) for example in trained}
        if learned:
            if there - learned:
                notes.append(f"labels that no training row has: {', '.join(sorted(there - learned))}")
            return sorted(learned)
    if classify_by == "likelihood":
        notes.append("the labels to choose from are those of the evaluated rows")
    return sorted(there)


def causal_predictor(
    request: EvalRequest,
    found: Found,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: Sequence[str] | None,
) -> CausalPredictor:
    """The predictor of a causal language model.

    Args:
        request: what is asked.
        found: the model's place.
        model: it, loaded.
        tokenizer: its tokenizer.
        examples: rows to evaluate, from which the length of answers follows.
        labels: of a classification, or None.

    Returns:
        The predictor.

    Raises:
        UserError: `classify_by` is unknown.

    Example:
        >>> causal_predictor(request, found, model, tokenizer, examples, None).labels  # doctest: +SKIP
    """
    if request.classify_by not in ("likelihood", "generation"):
        raise UserError(
            f"classify_by: {request.classify_by!r} is not known", fix="set classify_by to likelihood or generation"
        )
    longest = request.max_new_tokens or longest_answer(examples, tokenizer)
    chosen = labels if request.classify_by == "likelihood" else None
    return CausalPredictor(model, tokenizer, task_of(examples), chosen, longest, request.batch_size, found.positions)


def longest_answer(examples: Sequence[Example], tokenizer: Any) -> int:
    """How many tokens an answer may take: an eighth more than the longest right one, and at most 512.

    Args:
        examples: rows with their answers.
        tokenizer: of the model.

    Returns:
        Tokens.

    Example:
        >>> longest_answer(examples, tokenizer)  # doctest: +SKIP
        64
    """
    texts = [example.messages[-1].get("content") for example in examples if example.messages]
    texts = [text for text in texts if isinstance(text, str)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    longest = max(map(len, encoded), default=0)
    return min(_LONGEST_ANSWER, longest + longest // 8 + 2)  # two more for the token that ends it


def answer_all(predictor: Predictor, examples: Sequence[Example], console: Console, what: str) -> list[Answer]:
    """Let a predictor answer, under a progress bar.

    Args:
        predictor: any.
        examples: what to answer.
        console: where the bar goes.
        what: the bar's label.

    Returns:
        An answer an example, in order.

    Example:
        >>> answer_all(predictor, examples, Console(), "answers")  # doctest: +SKIP
    """
    with Counter(console, what, len(examples)) as counter:
        return predictor.predict(examples, lambda indices, _: counter.add(len(indices)))


def _examples(request: EvalRequest, found: Found) -> list[Example]:
    if request.task not in get_args(Task):
        hint = nearest(request.task, get_args(Task)) or f"one of {', '.join(get_args(Task))}"
        raise UserError(f"--task {request.task}: no such task", fix=hint)
    run = found.run
    task = run.task if request.task == "auto" and run is not None else request.task
    if request.data:
        own = run or RunConfig(model_name_or_path="-", train_file="-", output_dir="-")
        rows = read_rows(request.data, task, own.sample_by)
        examples = to_examples(rows, own.columns, task, unanswered=may_be_unanswered(settings_of(found)))
    elif run is None:
        raise UserError(f"{request.model}: is no run that held rows out", fix="name a file of rows: --data FILE")
    else:
        examples = held_out_examples(run)
    return drawn(examples, request.rows, request.seed)


def _losses(
    request: EvalRequest,
    found: Found,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    result: Evaluation,
    console: Console,
) -> tuple[Any, Any]:
    """Sum of losses and number of learned tokens of each document, as in training."""
    run = found.run
    longest = run.max_length if run is not None else min(found.positions or 1024, 1024)
    tokenized = tokenize(examples, tokenizer, longest, run.completion_only_loss if run else None)
    if tokenized.cut_short or tokenized.dropped:
        result.notes.append(
            f"the loss leaves out what lies beyond {longest:,} tokens: {tokenized.cut_short:,} answers are cut, and"
            f" {len(tokenized.dropped):,} are left out"
        )
    documents = tokenized.documents
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with Counter(console, "loss", len(documents)) as counter:
        return document_losses(
            model,
            documents,
            pad_token_id=pad,
            batch_size=request.batch_size,
            on_batch=lambda batch, _: counter.add(len(batch)),
        )


def _score(
    request: EvalRequest,
    result: Evaluation,
    right: Sequence[Any],
    answers: Sequence[Answer],
    labels: Sequence[str] | None,
    columns: dict[str, list[Any]],
) -> None:
    """Fill in the metrics of the answers."""
    said = [answer.prediction for answer in answers]
    silent = sum(not answer.fits for answer in answers)
    if silent:
        result.notes.append(f"{silent:,} rows are too long for the model and are answered by nothing")
    options: dict[str, Any] = {"labels": labels, "seed": request.seed}
    result.scores |= metrics.score(result.task, said, right, **options)
    for name, values in columns.items():
        result.slices[name] = metrics.score_slices(result.task, said, right, values, **options)


def write_answers(path: str, examples: Sequence[Example], answers: Sequence[Answer], right: Sequence[Any]) -> None:
    """Write every answer beside what would have been right, an object a line.

    Args:
        path: the file.
        examples: what was asked.
        answers: what was said.
        right: what would have been right.

    Example:
        >>> write_answers("answers.jsonl", examples, answers, right)  # doctest: +SKIP
    """
    lines = [
        json.dumps({"row": e.place, "reference": r, **dataclasses.asdict(a)}, ensure_ascii=False, default=str)
        for e, a, r in zip(examples, answers, right, strict=True)
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

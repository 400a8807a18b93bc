"""The mistakes that silently spoil a fine-tune, found before the first step and without the model's weights.

    RunConfig -> examine -> Preflight (facts, problems, one example)      pyfinetune check
    Data, Rows -> require -> the errors raised, the warnings said         pyfinetune train

A problem is an `error` when training would teach nothing, or nothing that could be measured; else a `warning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyfinetune.errors import UserError
from pyfinetune.train.cleaning import Finding
from pyfinetune.train.config import RunConfig, load_config
from pyfinetune.train.head_checks import head_problems, label_counts, shown_row
from pyfinetune.train.head_rows import tokenizer_for
from pyfinetune.train.heads import choose_head, may_be_unanswered
from pyfinetune.train.methods import add_method
from pyfinetune.train.model import check_length, choose_device, load_skeleton
from pyfinetune.train.packing import pack
from pyfinetune.train.reading import Data, Rows, prepare_rows, read_data
from pyfinetune.train.report import listed_rows
from pyfinetune.train.tokenizing import Document, Tokenized

_LEAKED = 0.25  # from this share of held-out rows on, their loss says nothing about rows that the model has not seen
_IDS = ("input_ids", "chosen_ids", "rejected_ids")
_SHOWN_TOKENS = 400
_WORDS = {
    "missing": ("lack a field", "missing"),
    "empty": ("have an empty field", "empty"),
    "roles": ("have their roles out of order", "roles"),
    "mojibake": ("hold text that was decoded with the wrong encoding", "mojibake"),
    "duplicate": ("are duplicates", "duplicate"),
    "near_duplicate": ("are near-duplicates", "near_duplicate"),
    "leak": ("are also in the training set", "leak"),
}


@dataclass(frozen=True)
class Problem:
    """Something that will not do, or that a person should know of.

    Args:
        severity: `error` or `warning`.
        message: what is wrong, with the file, row or key it was found at.
        fix: the key or command that mends it.
    """

    severity: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {UserError(self.message, self.fix)}"


@dataclass
class Preflight:
    """What a run would train on, and what is wrong with it.

    Args:
        problems: errors first.
        model: type, parameters and trainable parameters; empty when it was not got to.
        data: format, sources, findings, and rows of each part.
        counts: rows, tokens and answers of the parts `train` and `held_out`, as `run.json` has them.
        packing: rows and how full they are, as the run lays them and as packing would.
        ends: the tokens that close answers, each with the number of answers and whether generation stops at it.
        steps: optimizer steps of the run.
        example: stretches of the first training document: text, tokens, and whether they are learned.
        example_place: file and row of that document.
        head: the head that is trained.
        labels: its classes, each with the number of training rows (or words) that have it.
        prediction: lines about memory and time, where they were asked for.
    """

    problems: list[Problem] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)
    steps: int | None = None
    example: list[dict[str, Any]] = field(default_factory=list)
    example_place: str = ""
    prediction: list[str] = field(default_factory=list)
    head: str = "causal_lm"
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the run can be started."""
        return not any(problem.severity == "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of everything found.

        Returns:
            The fields, and `ok`.

        Example:
            >>> Preflight().to_dict()["ok"]
            True
        """
        return {"ok": self.ok, **asdict(self)}


def examine_file(path: str, predict: Callable[[RunConfig, Preflight], list[str]] | None = None) -> Preflight:
    """Check a run's YAML file and everything it names; see `examine`.

    Args:
        path: the YAML file.
        predict: as for `examine`.

    Returns:
        What was found; a mistake in the file itself is its only problem.

    Example:
        >>> examine_file("run.yaml").ok  # doctest: +SKIP
        True
    """
    try:
        config = load_config(path)
    except UserError as error:
        return Preflight(problems=[Problem("error", error.message, error.fix)])
    return examine(config, predict)


def examine(config: RunConfig, predict: Callable[[RunConfig, Preflight], list[str]] | None = None) -> Preflight:
    """Resolve a run up to its first step, without loading weights, and say what is wrong with it.

    Args:
        config: the run's configuration.
        predict: given the configuration and what was found, returns lines about memory and time; called when there is
            no error.

    Returns:
        What was found. The first mistake in a file or a row ends the search, and is among the problems.

    Example:
        >>> examine(parse_config({"model_name_or_path": "m", "train_file": "a.json", "output_dir": "o"})).ok
        ... # doctest: +SKIP
        False
    """
    found = Preflight()
    try:
        _resolve(config, found)
        if predict is not None and found.ok:
            found.prediction = predict(config, found)
    except UserError as error:
        found.problems.append(Problem("error", error.message, error.fix))
    found.problems.sort(key=lambda problem: problem.severity != "error")
    return found


def require(config: RunConfig, data: Data, rows: Rows, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Refuse a run that would teach nothing, and say what else is wrong with its data.

    Args:
        config: the run's configuration.
        data: what `reading.read_data` returned.
        rows: what `reading.prepare_rows` returned.
        tokenizer: what `tokenizing.load_tokenizer` returned.
        say: called with each warning.

    Raises:
        UserError: the first error.

    Example:
        >>> require(config, data, rows, tokenizer, print)  # doctest: +SKIP
    """
    ends = _ends(rows, tokenizer, config.model_name_or_path)
    for problem in sorted(_judged(config, data, rows, ends), key=lambda problem: problem.severity != "error"):
        if problem.severity == "error":
            raise UserError(problem.message, problem.fix)
        say(str(problem))


def _resolve(config: RunConfig, found: Preflight) -> None:
    from pyfinetune.train.loop import total_steps, training_arguments

    if Path(config.output_dir).is_file():
        raise UserError(f"output_dir: {config.output_dir} is a file", fix="give the path of a folder, existing or not")
    choose_device(config.device)
    data = read_data(config, near=True, unanswered=may_be_unanswered(config))
    found.data = _data_facts(data)
    head = choose_head(config, data.train)
    tokenizer = tokenizer_for(config, data.format, head)
    rows = prepare_rows(data, tokenizer, config, head)
    found.head, found.counts = head.kind, rows.counts
    if head.kind == "causal_lm":
        found.packing = _packing(rows, config)
        found.ends = _ends(rows, tokenizer, config.model_name_or_path)
        cut = set(rows.tokenized["train"].cut)
        documents = sorted(rows.tokenized["train"].documents, key=lambda document: document.place in cut)
        shown = next(document for document in documents if document.learned.any())
        found.example, found.example_place = _stretches(shown, tokenizer), shown.place
    else:
        found.labels = label_counts(head, rows.parts["train"])
        found.example, found.example_place = shown_row(rows, tokenizer)
    found.problems += _judged(config, data, rows, found.ends)
    found.model = _model_facts(config, rows)
    arguments = training_arguments(config, train_rows=len(rows.train), held_out=bool(rows.held_out))
    found.steps = total_steps(arguments, len(rows.train))


def _data_facts(data: Data) -> dict[str, Any]:
    return {
        "format": data.format,
        "train": len(data.train),
        "held_out": len(data.held_out),
        "test": len(data.test),
        "sources": [use.to_dict() for use in data.mixture],
        "findings": [finding.to_dict() for finding in data.findings],
    }


def _model_facts(config: RunConfig, rows: Rows) -> dict[str, Any]:
    """The model as it would be trained, by its shapes alone."""
    folder = Path(config.model_name_or_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model_name_or_path: {config.model_name_or_path!r} has no .safetensors weights",
            fix="save the model again with a current transformers, which writes them",
        )
    head = rows.head
    options = {"auto_class": head.auto_class, "labels": rows.labels, "outputs": head.outputs}
    model = load_skeleton(config.model_name_or_path, **options)
    check_length(model.config, config.max_length + config.virtual_tokens, config.model_name_or_path)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    highest, place = max(_highest_tokens(rows))
    if highest >= vocabulary:
        raise UserError(
            f"{place}: token {highest} is beyond the {vocabulary:,} embeddings of {config.model_name_or_path}",
            fix="give the model the tokenizer it was trained with, or resize its embeddings and save it again",
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = add_method(model, config, head.task_type)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "name_or_path": config.model_name_or_path,
        "type": model.config.model_type,
        "method": config.method,
        "parameters": parameters,
        "trainable_parameters": trainable,
    }


def _highest_tokens(rows: Rows) -> Iterator[tuple[int, str]]:
    """The highest token of each document or row, with its place."""
    for row in [*rows.train, *rows.held_out] if not rows.parts else []:
        for document in row:
            yield int(document.input_ids.max()), document.place
    for part in rows.parts.values():
        for row, owner in zip(part.rows, part.owners, strict=True):
            yield max(max(ids) for name, ids in row.items() if name in _IDS), part.examples[owner].place


def _packing(rows: Rows, config: RunConfig) -> dict[str, Any]:
    documents = [document for row in rows.train for document in row]
    tokens = sum(map(len, documents))
    packed = rows.train if config.packing else pack(documents, config.max_length)
    laid = config.max_length if config.packing else max(map(len, documents))
    return {
        "packing": config.packing,
        "rows": len(rows.train),
        "filled": tokens / (len(rows.train) * laid),
        "row_length": laid,
        "rows_if_packed": len(packed),
        "filled_if_packed": tokens / (len(packed) * config.max_length),
    }


def _ends(rows: Rows, tokenizer: Any, name_or_path: str) -> list[dict[str, Any]]:
    """The tokens that close training answers, the most frequent first; none where nothing is written."""
    if rows.head.kind != "causal_lm":
        return []
    stops = _stops(tokenizer, name_or_path)
    return [
        {"token": tokenizer.convert_ids_to_tokens(token), "answers": count, "stops": token in stops}
        for token, count in rows.tokenized["train"].ends.most_common()
    ]


def _stops(tokenizer: Any, name_or_path: str) -> set[int]:
    """Tokens at which generation stops: the tokenizer's end token, and what the model says."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    try:
        given = GenerationConfig.from_pretrained(name_or_path).eos_token_id
    except (OSError, ValueError):  # most models have none of their own
        given = None
    if given is not None:
        stops |= set(given) if isinstance(given, list) else {given}
    return stops


def _stretches(document: Document, tokenizer: Any) -> list[dict[str, Any]]:
    """A document's beginning in stretches of tokens that are all learned, or all only read."""
    ids, learned = document.input_ids[:_SHOWN_TOKENS], document.learned[:_SHOWN_TOKENS]
    borders = np.flatnonzero(np.diff(learned)) + 1
    return [
        {"text": tokenizer.decode(part), "tokens": len(part), "learned": bool(mask[0])}
        for part, mask in zip(np.split(ids, borders), np.split(learned, borders), strict=True)
    ]


def _judged(config: RunConfig, data: Data, rows: Rows, ends: list[dict[str, Any]]) -> list[Problem]:
    """Everything that can be told from the configuration, the examples and their tokens."""
    problems = _still(config)
    if rows.head.kind == "causal_lm":
        train = rows.tokenized["train"]
        problems += _cut(train, config.max_length, "")
        problems += _cut(rows.tokenized["held_out"], config.max_length, "held-out ")
        problems += _endless(config, train, ends)
    else:
        problems += [Problem(*problem) for problem in head_problems(rows, config.max_length)]
    for finding in data.findings:
        if not finding.dropped:
            problems.append(_faulty(finding, data))
    for use in data.mixture:
        if use.used < use.wanted:
            problems.append(
                Problem(
                    "warning",
                    f"replay: {use.name} has {use.rows:,} rows, and its share asks for {use.wanted:,}",
                    "lower share under replay:, or give more of the older rows",
                )
            )
    return problems


def _still(config: RunConfig) -> list[Problem]:
    """Settings under which no weight moves."""
    section = config.trainer
    problems = []
    if section.get("learning_rate") == 0:
        problems.append(Problem("error", "trainer: learning_rate: 0 trains nothing", "set learning_rate, such as 2e-4"))
    if section.get("num_train_epochs", 1) <= 0 and section.get("max_steps", -1) <= 0:
        message = f"trainer: num_train_epochs: {section['num_train_epochs']} trains nothing"
        problems.append(Problem("error", message, "set num_train_epochs: 1, or max_steps"))
    return problems


def _cut(tokenized: Tokenized, max_length: int, which: str) -> list[Problem]:
    problems = []
    longest = f"max_length {max_length:,} (longest: {tokenized.longest:,} tokens)"
    if tokenized.cut:
        problems.append(
            Problem(
                "warning",
                f"{len(tokenized.cut):,} {which}answers are cut short, without their end, by {longest}:"
                f" {listed_rows(tokenized.cut)}",
                "raise max_length, or shorten or remove these rows",
            )
        )
    if tokenized.dropped:
        problems.append(
            Problem(
                "warning",
                f"{len(tokenized.dropped):,} {which}rows are left out, their whole answer cut off by {longest}:"
                f" {listed_rows(tokenized.dropped)}",
                "raise max_length, or shorten or remove these rows",
            )
        )
    if tokenized.masked:
        problems.append(
            Problem(
                "warning",
                f"{len(tokenized.masked):,} {which}rows are left out, because the chat template writes nothing of their"
                f" answers: {listed_rows(tokenized.masked)}",
                "set chat_template: plain, or the path of a template that writes the assistant's messages",
            )
        )
    return problems


def _endless(config: RunConfig, train: Tokenized, ends: list[dict[str, Any]]) -> list[Problem]:
    """Answers whose end is not learned: the model would not stop after them."""
    ended = sum(end["answers"] for end in ends)
    if not train.answers:
        return []
    if not ended:
        why, fix = "no answer is followed by an end token", "set chat_template: plain, or one that ends each answer"
        if train.cut:
            why = f"max_length {config.max_length:,} cuts every one of the {train.answers:,} answers short"
            fix = f"raise max_length; the longest row has {train.longest:,} tokens"
        return [Problem("error", f"the end token is never learned, so the model would never stop: {why}", fix)]
    if not any(end["stops"] for end in ends):
        token = ends[0]["token"]
        return [
            Problem(
                "warning",
                f"the end token is never learned: {ends[0]['answers']:,} answers end with {token!r}, at which"
                " generation does not stop",
                f"set eos_token: {token!r}, or tell what generates to stop at it",
            )
        ]
    open_ended = train.answers - ended - len(train.cut)
    if open_ended > 0:
        return [
            Problem(
                "warning",
                f"{open_ended:,} of {train.answers:,} answers are not followed by an end token: the chat template"
                " writes none between turns",
                "set chat_template: plain, or the path of a template that ends each assistant's message",
            )
        ]
    return []


def _faulty(finding: Finding, data: Data) -> Problem:
    words, key = _WORDS[finding.kind]
    places = [place for place, _ in finding.rows]
    detail = finding.rows[0][1]
    where = f"{words}: {listed_rows(places)} ({detail})"
    if finding.kind != "leak":
        return Problem("warning", f"{len(places):,} rows {where}", f"correct them, or drop them with clean: [{key}]")
    whose, total = ("test", len(data.test)) if finding.part == "test" else ("held-out", len(data.held_out))
    return Problem(
        "error" if len(places) >= _LEAKED * total else "warning",
        f"{len(places):,} of {total:,} {whose} rows {where}",
        f"drop them from the training set with clean: [{key}], or hold other rows out",
    )

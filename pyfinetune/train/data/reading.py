"""A run's data, from its configuration to rows of tokens: read, recognised, cleaned, split, mixed, tokenized, packed.

    RunConfig -> read_data -> Data -> prepare_rows -> Rows

Rows are cleaned before they are split, so that no copy of a training row is held out; sources are mixed last, so that
a row that is repeated on purpose is in the training set only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig
from pyfinetune.train.data import cleaning, mixing
from pyfinetune.train.data.cleaning import Finding
from pyfinetune.train.data.files import (
    Row,
    hash_files,
    hash_rows,
    load_aligned_rows,
    load_dataset_rows,
    load_labelled_rows,
    load_rows,
)
from pyfinetune.train.data.formats import Example, RowFault, to_examples
from pyfinetune.train.data.packing import one_a_row, pack
from pyfinetune.train.data.sources import Files, Source, as_paths
from pyfinetune.train.data.splits import split_rows
from pyfinetune.train.data.tokenizing import Document, Tokenized, tokenize
from pyfinetune.train.heads.encoders import Part
from pyfinetune.train.heads.kinds import HEADS, Head, choose_labels, saved_labels
from pyfinetune.train.heads.rows import head_part
from pyfinetune.train.model import read_config


@dataclass
class Data:
    """A run's examples, before any tokenizer.

    Args:
        train: examples to learn from.
        held_out: examples to evaluate on; empty when nothing is held out.
        sha256: digest of the training data's contents.
        format: what `formats.recognise` said of the rows; of several, one that needs a chat template.
        test: examples that the run never sees, for afterwards; empty without a test set of its own.
        findings: what was wrong with rows.
        mixture: what each source gave.
    """

    train: list[Example]
    held_out: list[Example]
    sha256: str
    format: str
    test: list[Example] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    mixture: list[mixing.Use] = field(default_factory=list)


@dataclass
class Rows:
    """A run's token rows.

    Args:
        train: rows to learn from.
        held_out: rows to evaluate on, or empty.
        counts: rows, documents, tokens and what was cut, for `run.json`.
        tokenized: what became of the examples of each part, `train` and `held_out`; for a causal model.
        parts: the same for a model with a head, whose rows are dictionaries.
        labels: names of the head's classes.
        head: the head that is trained.
    """

    train: list[Any]
    held_out: list[Any]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    tokenized: dict[str, Tokenized] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    head: Head = HEADS["causal_lm"]


@dataclass
class _Part:
    """Examples that stay together on their way, with the value of `group_column` that each row has."""

    examples: list[Example] = field(default_factory=list)
    groups: list[Any] | None = None

    def without(self, dropped: set[int]) -> _Part:
        kept = [index for index in range(len(self.examples)) if index not in dropped]
        groups = None if self.groups is None else [self.groups[index] for index in kept]
        return _Part([self.examples[index] for index in kept], groups)


def read_data(config: RunConfig, near: bool = False, unanswered: bool = False) -> Data:
    """Read, recognise, clean, split and mix a run's data.

    Args:
        config: the run's configuration.
        near: look for near-duplicates also where `clean:` does not ask for it; takes a while on large sets.
        unanswered: whether a question may have no answer; see `heads.may_be_unanswered`.

    Returns:
        The examples, with what was found wrong with their rows.

    Raises:
        UserError: a file, a row or the split is at fault.

    Example:
        >>> len(read_data(config).train)  # doctest: +SKIP
        7473
    """
    findings: dict[tuple[str, str], Finding] = {}
    origins = [*config.origins, *([config.replay] if config.replay else [])]
    parts, held, digests = [], [], []
    for origin in origins:
        source = _with_task(origin, config)
        rows = _training_rows(source)
        # A dataset has no files to hash; one source keeps the digest that it would have without the others.
        digests.append(hash_files(source.train_files) if source.train_file is not None else hash_rows(rows))
        parts.append(_examples(rows, source, config, "train", findings, unanswered))
        given = _held_out_rows(source)
        held.append(_examples(given, source, config, "validation", findings, unanswered).examples)
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    parts = _cleaned(parts, config, near, findings)
    train, held_out, test = _split(parts, held, config)
    if config.test_file is not None:
        source = _with_task(origins[0], config)
        rows = file_rows(config.test_file, source)
        test = _examples(rows, source, config, "test", findings, unanswered).examples
    _check_formats(train, held_out, config)
    train = _without_leaks(train, held_out, test, config, near, findings)
    formats = [examples[0].format for examples in train]
    # The one that decides how rows are written: a chat needs a template, and what comes beside it can be written by it.
    data_format = next((name for name in formats if name not in ("text", "prompt_completion")), formats[0])
    mixed, mixture = _mixed(train, origins, config)
    return Data(mixed, held_out, digest, data_format, test, [*findings.values()], mixture)


def prepare_rows(data: Data, tokenizer: Any, config: RunConfig, head: Head | None = None) -> Rows:
    """Tokenize a run's examples and lay them in rows.

    Args:
        data: what `read_data` returned.
        tokenizer: what `tokenizing.load_tokenizer` returned.
        config: the run's configuration.
        head: the head that is trained; None for that of a causal model.

    Returns:
        The rows, with their counts.

    Raises:
        UserError: nothing would be learned, or the chat template refuses a row.

    Example:
        >>> prepare_rows(data, tokenizer, config).counts["train"]["learned_tokens"]  # doctest: +SKIP
        893211
    """
    if head is not None and head.kind != "causal_lm":
        return _head_rows(data, tokenizer, config, head)
    result = Rows([], [])
    for name, examples in (("train", data.train), ("held_out", data.held_out)):
        tokenized = tokenize(examples, tokenizer, config.max_length, config.completion_only_loss)
        documents = tokenized.documents
        rows = pack(documents, config.max_length) if config.packing else one_a_row(documents)
        setattr(result, name, rows)
        result.tokenized[name] = tokenized
        result.counts[name] = _counts(tokenized, rows)
    return result


def _head_rows(data: Data, tokenizer: Any, config: RunConfig, head: Head) -> Rows:
    labels: tuple[str, ...] = ()
    if head.has_labels:
        labels = choose_labels(data.train, head, saved_labels(read_config(config.model_name_or_path)))
    result = Rows([], [], labels=labels, head=head)
    for name, examples in (("train", data.train), ("held_out", data.held_out)):
        part = head_part(examples, tokenizer, config, head, labels)
        setattr(result, name, part.rows)
        result.parts[name] = part
        result.counts[name] = part.counts
    return result


def _counts(tokenized: Tokenized, rows: list[list[Document]]) -> dict[str, int]:
    return {
        "examples": tokenized.rows,
        "documents": len(tokenized.documents),
        "rows": len(rows),
        "tokens": tokenized.tokens,
        "learned_tokens": tokenized.learned_tokens,
        "longest": tokenized.longest,
        "cut_short": tokenized.cut_short,
        "dropped": len(tokenized.dropped),
        "masked": len(tokenized.masked),
        "lost_tokens": tokenized.lost_tokens,
        "answers": tokenized.answers,
        "ended": sum(tokenized.ends.values()),
    }


def _with_task(source: Source, config: RunConfig) -> Source:
    """A source that leaves its task to the run's."""
    return source.model_copy(update={"task": config.task}) if source.task == "auto" else source


def file_rows(files: Files, source: Source) -> list[Row]:
    """The rows of files, as a source has them read.

    Args:
        files: a path, several, or a name to a path.
        source: its task says whether names are labels or columns.

    Returns:
        The rows.

    Raises:
        UserError: a file is at fault.

    Example:
        >>> len(file_rows("test.jsonl", source))  # doctest: +SKIP
        500
    """
    if isinstance(files, dict):
        return load_labelled_rows(files) if source.task == "classification" else load_aligned_rows(files)
    return load_rows(as_paths(files), source.sample_by)


def _training_rows(source: Source) -> list[Row]:
    if source.dataset_name is not None:
        return load_dataset_rows(source.dataset_name, source.dataset_config_name, source.dataset_train_split)
    return file_rows(source.train_file, source)


def _held_out_rows(source: Source) -> list[Row]:
    if source.dataset_test_split is not None:
        return load_dataset_rows(source.dataset_name, source.dataset_config_name, source.dataset_test_split)
    return file_rows(source.validation_file, source) if source.validation_file is not None else []


def _examples(
    rows: list[Row],
    source: Source,
    config: RunConfig,
    part: str,
    findings: dict[tuple[str, str], Finding],
    unanswered: bool,
) -> _Part:
    """Rows as examples; those at fault raise, or are left out where `clean:` says so."""
    left_out: set[int] = set()

    def on_fault(index: int, fault: RowFault) -> None:
        if fault.kind not in config.clean:
            raise fault
        left_out.add(index)
        _find(findings, fault.kind, part, (rows[index].place, fault.message.partition(": ")[2]), dropped=True)

    examples = to_examples(rows, source.columns, source.task, on_fault if config.clean else None, unanswered)
    if rows and not examples:
        raise UserError(
            f"{source.label}: no row is left: clean: drops all {len(rows)} of them",
            fix="look at what is wrong with the rows (leave clean: out to see the first), or give another file",
        )
    groups = None
    if config.group_column is not None and part == "train":
        kept = [row for index, row in enumerate(rows) if index not in left_out]
        groups = [_group(row, config.group_column) for row in kept]
    return _Part(examples, groups)


def _group(row: Row, column: str) -> Any:
    if row.fields.get(column) is None:
        raise UserError(
            f"{row.place}: has no '{column}', which group_column splits by (its columns: "
            f"{', '.join(map(repr, row.fields))})",
            fix="correct group_column, or fill in the value",
        )
    return row.fields[column]


def _find(findings: dict[tuple[str, str], Finding], kind: str, part: str, row: tuple[str, str], dropped: bool) -> None:
    findings.setdefault((kind, part), Finding(kind, part, dropped=dropped)).rows.append(row)


def _cleaned(
    parts: list[_Part], config: RunConfig, near: bool, findings: dict[tuple[str, str], Finding]
) -> list[_Part]:
    """The sources' examples without what `clean:` drops; wrong texts and repetitions are found over all of them."""
    examples = [example for part in parts for example in part.examples]
    contents = [cleaning.content_of(example) for example in examples]
    dropped: set[int] = set()

    def found(kind: str, index: int, detail: str) -> None:
        _find(findings, kind, "train", (examples[index].place, detail), dropped=kind in config.clean)
        if kind in config.clean:
            dropped.add(index)

    for index, content in enumerate(contents):
        stretch = cleaning.mojibake(content)
        if stretch is not None:
            found("mojibake", index, repr(stretch))
    exact = cleaning.exact_duplicates(contents)
    for index, first in exact.items():
        found("duplicate", index, f"repeats {examples[first].place}")
    if near or "near_duplicate" in config.clean:
        for index, first in cleaning.near_duplicates(contents).items():
            if index not in exact:
                found("near_duplicate", index, f"resembles {examples[first].place}")
    kept, start = [], 0
    for part in parts:
        end = start + len(part.examples)
        kept.append(part.without({index - start for index in dropped if start <= index < end}))
        start = end
    for part, before in zip(kept, parts, strict=True):
        if not part.examples:
            raise UserError(
                f"{before.examples[0].place.rpartition(', row')[0]}: no row is left: clean: drops all of them",
                fix="take this source out, or drop less under clean:",
            )
    return kept


def _split(
    parts: list[_Part], held: list[list[Example]], config: RunConfig
) -> tuple[list[list[Example]], list[Example], list[Example]]:
    """Training examples of each source, and the held-out and test examples of all of them; sizes are a source's own.

    The older source of `replay:` is not split: what is held out tells how well the new rows are learned.
    """
    train, held_out, test = [], [example for examples in held for example in examples], []
    for number, part in enumerate(parts):
        replayed = config.replay is not None and number == len(parts) - 1
        if not replayed and config.test_size is not None:
            part, taken = _parted(part, config.test_size, config.seed, "test_size")
            # The only held-out rows are those to evaluate on; with rows of both kinds these are kept for afterwards.
            (held_out if config.validation_size is None else test).extend(taken)
        if not replayed and config.validation_size is not None:
            part, taken = _parted(part, config.validation_size, config.seed + 1, "validation_size")
            held_out.extend(taken)
        train.append(part.examples)
    return train, held_out, test


def _parted(part: _Part, size: float | int, seed: int, key: str) -> tuple[_Part, list[Example]]:
    _, taken = split_rows(range(len(part.examples)), size, seed, part.groups, key)
    return part.without(set(taken)), [part.examples[index] for index in taken]


def _check_formats(train: list[list[Example]], held_out: list[Example], config: RunConfig) -> None:
    """Refuse held-out rows of another kind than the training rows, and a loss on completions that are not there."""
    formats = {examples[0].format for examples in train}
    is_text = formats == {"text"}
    if held_out and len(formats) == 1 and (held_out[0].format == "text") != is_text:
        raise UserError(
            f"{held_out[0].place}: is {held_out[0].format}, but the training rows are {formats.pop()}",
            fix="give validation rows of the training rows' format",
        )
    if is_text and config.completion_only_loss:
        raise UserError(
            f"completion_only_loss: {train[0][0].place} is raw text, which has no completion",
            fix="leave completion_only_loss out, or give prompt/completion rows",
        )


def _without_leaks(
    train: list[list[Example]],
    held_out: list[Example],
    test: list[Example],
    config: RunConfig,
    near: bool,
    findings: dict[tuple[str, str], Finding],
) -> list[list[Example]]:
    """The training examples, without those that are also held out where `clean:` drops them."""
    if not held_out and not test:
        return train
    examples = [example for part in train for example in part]
    others = [(example, "validation") for example in held_out] + [(example, "test") for example in test]
    unseen = [example for example, _ in others]
    drop = "leak" in config.clean
    for index, first in _matches(unseen, examples, near or drop).items():
        row = (unseen[index].place, f"as {examples[first].place}")
        _find(findings, "leak", others[index][1], row, dropped=drop)
    if not drop:
        return train
    gone = {id(examples[index]) for index in _matches(examples, unseen, near=True)}
    kept = [[example for example in part if id(example) not in gone] for part in train]
    for part, before in zip(kept, train, strict=True):
        if not part:
            raise UserError(
                f"{before[0].place}: every training row is also held out, and clean: [leak] drops them all",
                fix="hold other rows out: give another validation_file, or test_size",
            )
    return kept


def _matches(rows: list[Example], against: list[Example], near: bool) -> dict[int, int]:
    """Index of each row that says or asks the same as one of the others, or nearly so, to that one's index."""
    found: dict[int, int] = {}
    for key in (cleaning.content_of, cleaning.question_of):
        first: dict[str, int] = {}
        for index, example in enumerate(against):
            first.setdefault(" ".join(key(example).split()), index)
        for index, example in enumerate(rows):
            text = " ".join(key(example).split())
            if text and text in first:
                found.setdefault(index, first[text])
    if near:
        contents = [cleaning.content_of(example) for example in (*against, *rows)]
        for index, earlier in cleaning.near_duplicates(contents, since=len(against)).items():
            found.setdefault(index - len(against), earlier)
    return dict(sorted(found.items()))


def _mixed(train: list[list[Example]], origins: list[Any], config: RunConfig) -> tuple[list[Example], list[mixing.Use]]:
    """The training examples of all sources in one order, and what each gave."""
    if len(train) == 1:
        return train[0], []
    new = train[: len(config.origins)]
    weights = [getattr(origin, "weight", None) for origin in origins[: len(new)]]
    counts = mixing.shares([len(part) for part in new], weights, config.stopping_strategy)
    uses = [mixing.Use(o.label, len(p), n) for o, p, n in zip(origins, new, counts, strict=False)]
    if config.replay is not None:
        wanted = mixing.replay_count(sum(counts), config.replay.share)
        counts = [*counts, min(wanted, len(train[-1]))]
        uses.append(mixing.Use(config.replay.label, len(train[-1]), counts[-1], replayed=True, wanted=wanted))
    return mixing.interleave(train, counts, config.seed), uses

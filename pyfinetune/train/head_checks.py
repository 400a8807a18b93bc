"""What would spoil the training of a model with a head, told from its rows: labels, and what `max_length` cuts away."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pyfinetune.train.encoders import IGNORED, Part
from pyfinetune.train.heads import Head, labels_of
from pyfinetune.train.report import listed_rows
from pyfinetune.train.reward import SIDES

if TYPE_CHECKING:
    from pyfinetune.train.reading import Rows

_LOPSIDED = 0.95  # from this share of one label on, always saying it looks good and is useless
_RARE = 8  # rows of a label below which it can hardly be learned


def label_counts(head: Head, part: Part) -> dict[str, int]:
    """How often each label stands in a part's rows.

    Args:
        head: a head with labels; of another, there are none.
        part: its rows.

    Returns:
        Label to count, the most frequent first; those of the head that do not occur have 0.

    Example:
        >>> label_counts(head, rows.parts["train"])  # doctest: +SKIP
        {'neg': 4801, 'pos': 4794}
    """
    if not head.has_labels:
        return {}
    found = Counter(dict.fromkeys(part.labels, 0))
    for example in part.examples:
        found.update(labels_of(example, head))
    return dict(found.most_common())


def head_problems(rows: Rows, max_length: int) -> list[tuple[str, str, str]]:
    """Everything that will not do, or that a person should know of.

    Args:
        rows: what `reading.prepare_rows` returned.
        max_length: longest row, in tokens.

    Returns:
        Of each `error` or `warning`, what is wrong, and what mends it.

    Example:
        >>> head_problems(rows, 128)  # doctest: +SKIP
        []
    """
    head, train = rows.head, rows.parts["train"]
    problems = _of_labels(label_counts(head, train), head)
    if head.kind == "question_answering" and all(set(row["labels"]) == {0} for row in train.rows):
        message = "no training row has its answer in a window, so there is nothing to learn"
        problems.append(("error", message, "raise max_length, or give rows with answers"))
    for name, which in (("train", ""), ("held_out", "held-out ")):
        problems += _of_length(rows.parts[name], head, max_length, which)
    return problems


def shown_row(rows: Rows, tokenizer: Any) -> tuple[list[dict[str, Any]], str]:
    """The first training row as the model reads it, and what it learns from it.

    Args:
        rows: what `reading.prepare_rows` returned.
        tokenizer: the model's.

    Returns:
        Stretches of text, as `preflight.Preflight.example` has them, and file and row.

    Example:
        >>> shown_row(rows, tokenizer)[1]  # doctest: +SKIP
        'reviews.jsonl, row 1'
    """
    part = rows.parts["train"]
    row, example = part.rows[0], part.examples[part.owners[0]]
    if rows.head.kind == "reward":
        chosen, rejected = (tokenizer.decode(row[f"{side}_ids"]) for side in SIDES)
        return [
            {"text": f"better: {chosen}\n", "tokens": len(row["chosen_ids"]), "learned": True},
            {"text": f"worse: {rejected}", "tokens": len(row["rejected_ids"]), "learned": False},
        ], example.place
    ids = row["input_ids"]
    stretches = [{"text": tokenizer.decode(ids), "tokens": len(ids), "learned": False}]
    learned = _learned_text(rows.head, part, row, tokenizer)
    if learned:
        stretches.append({"text": learned, "tokens": 0, "learned": True})
    return stretches, example.place


def _learned_text(head: Head, part: Part, row: dict[str, Any], tokenizer: Any) -> str:
    if head.kind == "sequence_classification":
        return f" → {part.labels[row['labels']]}"
    if head.kind == "token_classification":
        return " → " + " ".join(part.labels[label] for label in row["labels"] if label != IGNORED)
    if head.kind == "question_answering":
        first, last = row["labels"]
        return " → " + tokenizer.decode(row["input_ids"][first : last + 1])
    if head.kind == "seq2seq_lm":
        return " → " + tokenizer.decode(row["labels"])
    return ""


def _of_labels(counts: dict[str, int], head: Head) -> list[tuple[str, str, str]]:
    total = sum(counts.values())
    if not total:
        return []
    (most, number), *others = counts.items()
    what = "word" if head.kind == "token_classification" else "row"
    if number == total:
        message = f"every training {what} has the label {most!r}, so there is nothing to tell apart"
        return [("error", message, f"give rows with other labels, or check which column is the {what}s' label")]
    problems = []
    # Most words of a text are outside of every span; that is no fault of the data.
    if what == "row" and number > _LOPSIDED * total:
        message = f"{number / total:.1%} of the training rows have the label {most!r}: always saying it would be right"
        message += " as often, so look at macro_f1 and not at accuracy"
        problems.append(("warning", message, "add rows of the other labels, or leave out some of these"))
    rare = [label for label, count in others if 0 < count < _RARE and what == "row"]
    if rare:
        shown = ", ".join(f"{label!r} ({counts[label]})" for label in rare[:5])
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        message = f"labels with fewer than {_RARE} training rows can hardly be learned: {shown}{more}"
        problems.append(("warning", message, "add rows of them, or merge them into another label"))
    return problems


def _of_length(part: Part, head: Head, max_length: int, which: str) -> list[tuple[str, str, str]]:
    if not part.cut:
        return []
    where = f"max_length {max_length:,} (longest: {part.longest:,} tokens): {listed_rows(part.cut)}"
    if head.kind == "token_classification":
        after = "count as wrong" if which else "are not learned"
        message = f"{part.lost:,} words of {len(part.cut):,} {which}rows get no tag and {after}, cut off by {where}"
        return [("warning", message, "raise max_length, or split these rows into sentences")]
    if head.kind == "reward":
        message = f"{part.dropped:,} {which}pairs are left out, longer than {where}"
        return [("warning", message, "raise max_length, or shorten these rows")]
    message = f"{len(part.cut):,} {which}rows lose {part.lost:,} tokens to {where}"
    return [("warning", message, "raise max_length, or shorten these rows")]

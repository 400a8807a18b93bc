"""Rows into examples: Alpaca, prompt/completion, chat messages and raw text, told apart by their columns.

`data.load_rows` -> `to_examples` -> list of `Example` -> `tokenizing.tokenize`. The first row decides the format; a
later row that lacks its fields, leaves its answer empty, or has another format is an error naming the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.data import Row

Message = dict[str, Any]

# The columns that make a format, the richest first: a row with several is read as the first that fits.
_FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_NAMES = {
    "messages": "chat messages",
    "conversations": "chat messages (ShareGPT)",
    "prompt_completion": "prompt/completion",
    "alpaca": "Alpaca",
    "text": "raw text",
}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_HOW = (
    "name columns as instruction/output (Alpaca), prompt/completion, messages, or text; "
    "or map yours, for example `columns: {prompt: question, completion: answer}`"
)


@dataclass(frozen=True)
class Example:
    """One row in the form the tokenizer takes: either a conversation or a text.

    Args:
        place: file and row number.
        format: `alpaca`, `prompt_completion`, `messages`, `conversations` or `text`.
        messages: the conversation, with roles `system`, `user`, `assistant`, ...; empty for raw text.
        text: the raw text; empty for a conversation.
        tools: tool descriptions handed to the chat template, or None.
    """

    place: str
    format: str
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    tools: list[Any] | None = None


def to_examples(rows: Sequence[Row], columns: dict[str, str] | None = None) -> list[Example]:
    """Recognise the rows' format and bring each row into it.

    Args:
        rows: the rows, all of one format.
        columns: known column name to the name it has in the file, for files that use other names.

    Returns:
        One example a row, in order.

    Raises:
        UserError: no format fits, a row lacks a field or has another format, an answer is empty, or a value has the
            wrong type; names file, row and mend.

    Example:
        >>> row = Row({"prompt": "1+1=", "completion": "2"}, "a.jsonl", 1)
        >>> to_examples([row])[0].messages[1]["content"]
        '2'
    """
    if not rows:
        return []
    rows = [_renamed(row, columns or {}) for row in rows]
    expected = recognise(rows[0])
    examples = []
    for row in rows:
        missing = [name for name in _FORMATS[expected] if row.fields.get(name) is None]
        if missing:
            other = _format_of(row)
            if other is not None and other != expected:
                raise UserError(
                    f"{row.place}: is {_NAMES[other]}, but {rows[0].place} is {_NAMES[expected]}",
                    fix="give one format in one run: convert these rows, or train on them separately",
                )
            raise UserError(
                f"{row.place}: has no '{missing[0]}' (its columns: {_listed(row)})",
                fix=f"every {_NAMES[expected]} row needs {' and '.join(_FORMATS[expected])}; fill in or remove the row",
            )
        examples.append(_CONVERT[expected](row))
    return examples


def recognise(row: Row) -> str:
    """The format of a row, by its columns.

    Args:
        row: any row of the file.

    Returns:
        `alpaca`, `prompt_completion`, `messages`, `conversations` or `text`.

    Raises:
        UserError: no format fits.

    Example:
        >>> recognise(Row({"text": "once upon a time"}, "a.txt", 1))
        'text'
    """
    found = _format_of(row)
    if found is None:
        partly = [
            (name, [c for c in wanted if c not in row.fields])
            for name, wanted in _FORMATS.items()
            if any(c in row.fields for c in wanted)
        ]
        hint = f" ({_NAMES[partly[0][0]]} but for '{partly[0][1][0]}')" if partly and partly[0][1] else ""
        raise UserError(f"{row.place}: no known format has the columns {_listed(row)}{hint}", fix=_HOW)
    return found


def _format_of(row: Row) -> str | None:
    return next((name for name, wanted in _FORMATS.items() if all(row.fields.get(c) is not None for c in wanted)), None)


def _listed(row: Row) -> str:
    return ", ".join(map(repr, row.fields)) or "none"


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    if not columns:
        return row
    for known, theirs in columns.items():
        if theirs not in row.fields:
            raise UserError(
                f"{row.place}: columns: maps {known} to '{theirs}', which is not there (its columns: {_listed(row)})",
                fix="correct the name under columns:",
            )
    taken = set(columns.values()) | set(columns)
    fields = {known: row.fields[theirs] for known, theirs in columns.items()}
    return Row(fields | {k: v for k, v in row.fields.items() if k not in taken}, row.file, row.number)


def _string(row: Row, name: str, value: Any, *, filled: bool) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{row.place}: {name} is {type(value).__name__}, not text", fix=f"write the value of {name} in quotes"
        )
    if filled and not value.strip():
        what = "leaves nothing to learn" if name != "instruction" else "asks nothing"
        raise UserError(f"{row.place}: {name} is empty and {what}", fix="fill it in or remove the row")
    return value


def _from_alpaca(row: Row) -> Example:
    question = _string(row, "instruction", row.fields["instruction"], filled=True)
    context = row.fields.get("input")
    if context is not None and _string(row, "input", context, filled=False).strip():
        question = f"{question}\n\n{context}"
    answer = _string(row, "output", row.fields["output"], filled=True)
    system = row.fields.get("system")
    head = [{"role": "system", "content": _string(row, "system", system, filled=False)}] if system else []
    return Example(row.place, "alpaca", [*head, *_pair(question, answer)])


def _from_prompt_completion(row: Row) -> Example:
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _checked(row, [*prompt, *completion], "prompt and completion")
        return Example(row.place, "messages", messages, tools=row.fields.get("tools"))
    prompt = _string(row, "prompt", prompt, filled=False)
    return Example(row.place, "prompt_completion", _pair(prompt, _string(row, "completion", completion, filled=True)))


def _from_messages(row: Row) -> Example:
    return Example(
        row.place, "messages", _checked(row, row.fields["messages"], "messages"), tools=row.fields.get("tools")
    )


def _from_conversations(row: Row) -> Example:
    turns = row.fields["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        converted = []
        for turn in turns:
            speaker = turn.get("from") if isinstance(turn, dict) else None
            if speaker not in _SHAREGPT_ROLES or "value" not in turn:
                raise UserError(
                    f"{row.place}: conversations: a turn is from {speaker!r}",
                    fix=f"each turn needs a value and a from among {', '.join(_SHAREGPT_ROLES)}",
                )
            converted.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]})
        turns = converted
    return Example(row.place, "conversations", _checked(row, turns, "conversations"))


def _from_text(row: Row) -> Example:
    return Example(row.place, "text", text=_string(row, "text", row.fields["text"], filled=True))


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _checked(row: Row, messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{row.place}: {name} is not a list of messages",
            fix='write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    cleaned = []
    for number, message in enumerate(messages, start=1):
        where = f"{name}: message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{row.place}: {where} has no role", fix='each message needs "role" and "content"')
        # Parquet fills absent keys with None, which chat templates would print.
        message = {key: value for key, value in message.items() if value is not None}
        if message["role"] == "assistant" and not message.get("tool_calls"):
            _string(row, f"{where}: content", message.get("content"), filled=True)
        elif "content" in message:
            if not isinstance(message["content"], (str, list)):
                _string(row, f"{where}: content", message["content"], filled=False)
        elif not message.get("tool_calls"):
            raise UserError(f"{row.place}: {where} has no content", fix='each message needs "role" and "content"')
        cleaned.append(message)
    if not any(message["role"] == "assistant" for message in cleaned):
        raise UserError(
            f"{row.place}: {name} has no assistant message, so nothing in it is learned",
            fix="add the answer or remove the row",
        )
    return cleaned


_CONVERT = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "text": _from_text,
}

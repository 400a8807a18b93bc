"""Rows into examples: instructions, chats, texts and the tasks' rows, told apart by their columns.

`data.load_rows` -> `to_examples` -> list of `Example` -> `tokenizing.tokenize`. The first row decides the format; a
later row that lacks its fields, leaves its answer empty, or has another format is an error naming the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.data import Row
from pyfinetune.train.tasks import RENDER, Unfit, with_context

Message = dict[str, Any]

# The columns that make a format, the richest first: a row with several is read as the first that fits.
_FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "conversations": (("conversations",),),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "dolly": (("instruction", "response"),),
    "gpt4all": (("prompt", "response"),),
    "preference": (("chosen", "rejected"),),
    "question_answering": (("question", "answer"), ("question", "answers")),
    "summarization": (
        ("dialogue", "summary"),
        ("document", "summary"),
        ("article", "highlights"),
        ("article", "summary"),
        ("text", "summary"),
    ),
    "translation": (("translation",), ("source", "target")),
    "token_classification": (("tokens", "tags"), ("tokens", "ner_tags")),
    "classification": (("text", "label"), ("sentence", "label")),
    "text": (("text",),),
}
_NAMES = {
    "messages": "chat messages",
    "conversations": "chat messages (ShareGPT)",
    "prompt_completion": "prompt/completion",
    "alpaca": "Alpaca",
    "dolly": "instruction/response (Dolly)",
    "gpt4all": "prompt/response (GPT4All)",
    "preference": "chosen/rejected",
    "question_answering": "question/answer",
    "summarization": "text/summary",
    "translation": "source/target",
    "token_classification": "tokens/tags",
    "classification": "text/label",
    "text": "raw text",
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_HOW = (
    "name columns as instruction/output (Alpaca), prompt/completion, messages, or text; "
    "or map yours, for example `columns: {prompt: question, completion: answer}`"
)


class RowFault(UserError):
    """One row that cannot be learned from.

    Args:
        kind: `missing`, `empty`, `roles` or `mojibake`, which `clean:` can drop, or `wrong`, which it cannot.
        message: what is wrong, with file and row.
        fix: what mends it.
    """

    def __init__(self, kind: str, message: str, fix: str):
        drop = "" if kind == "wrong" else f", or leave such rows out with clean: [{kind}]"
        super().__init__(message, f"{fix}{drop}")
        self.kind = kind


@dataclass(frozen=True)
class Example:
    """One row in the form the tokenizer takes: either a conversation or a text.

    Args:
        place: file and row number.
        format: what `recognise` said of the row.
        messages: the conversation, with roles `system`, `user`, `assistant`, ...; empty for raw text.
        text: the raw text; empty for a conversation.
        tools: tool descriptions handed to the chat template, or None.
        fields: of a task's row its columns, for a model with a head of its own; empty for the other formats.
        columns: all columns of the row, whatever its format.
    """

    place: str
    format: str
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    tools: list[Any] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)


def to_examples(
    rows: Sequence[Row],
    columns: dict[str, str] | None = None,
    task: str = "auto",
    on_fault: Callable[[int, RowFault], None] | None = None,
    unanswered: bool = False,
) -> list[Example]:
    """Recognise the rows' format and bring each row into it.

    Args:
        rows: the rows, all of one format.
        columns: known column name to the name it has in the file, for files that use other names.
        task: `auto`, or the task that the rows have to fit; `pretrain` reads only the column `text`.
        on_fault: called with the index and the fault of each row that is left out; None raises the first.
        unanswered: whether a question may have no answer, `answers` being empty.

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
    first = next((row for row in rows if _format_of(row, task)), rows[0]) if on_fault else rows[0]
    expected = recognise(first, task)
    examples = []
    for index, row in enumerate(rows):
        try:
            examples.append(_unanswered(row, expected, unanswered) or _converted(row, expected, first, task))
        except RowFault as fault:
            if on_fault is None:
                raise
            on_fault(index, fault)
    return examples


def recognise(row: Row, task: str = "auto") -> str:
    """The format of a row, by its columns.

    Args:
        row: any row of the file.
        task: `auto`, or the task that the row has to fit.

    Returns:
        `alpaca`, `prompt_completion`, `messages`, `classification`, `text`, ...

    Raises:
        UserError: no format fits, or not the task's.

    Example:
        >>> recognise(Row({"text": "once upon a time"}, "a.txt", 1))
        'text'
    """
    found = _format_of(row, task)
    if found is not None:
        return found
    other = _format_of(row)
    if other is not None:
        fitting = {"text": "pretrain"}.get(other, other if other in (*RENDER, "preference") else "sft")
        kind = "raw text" if other == "text" else f"{_NAMES[other]}: prompts with answers"
        raise UserError(
            f"task: {task} does not fit {row.place}, which is {kind}", fix=f"set task: {fitting}, or leave it out"
        )
    partly = [
        (name, [c for c in wanted if c not in row.fields])
        for name, alternatives in _FORMATS.items()
        for wanted in alternatives
        if any(c in row.fields for c in wanted)
    ]
    hint = f" ({_NAMES[partly[0][0]]} but for '{partly[0][1][0]}')" if partly and partly[0][1] else ""
    raise UserError(f"{row.place}: no known format has the columns {_listed(row)}{hint}", fix=_HOW)


def _fits(name: str, task: str) -> bool:
    if task == "sft":
        return name not in ("text", "preference")
    return task == "auto" or name == ("text" if task == "pretrain" else task)


def _format_of(row: Row, task: str = "auto") -> str | None:
    return next((name for name in _FORMATS if _fits(name, task) and _columns_of(row, name)), None)


def _columns_of(row: Row, name: str) -> tuple[str, ...] | None:
    """The columns by which a row has a format, filled; None where it has not."""
    return next((c for c in _FORMATS[name] if all(row.fields.get(column) is not None for column in c)), None)


def _converted(row: Row, expected: str, first: Row, task: str) -> Example:
    if _columns_of(row, expected) is None:
        wanted = _columns_of(first, expected) or _FORMATS[expected][0]
        other = _format_of(row, task)
        # A text whose label is missing is no raw text, though it has the columns of one.
        if other is not None and not set(_columns_of(row, other) or ()) <= set(wanted):
            raise RowFault(
                "wrong",
                f"{row.place}: is {_NAMES[other]}, but {first.place} is {_NAMES[expected]}",
                "give one format in one file: convert these rows, or name two files under sources:",
            )
        missing = next(name for name in wanted if row.fields.get(name) is None)
        raise RowFault(
            "missing",
            f"{row.place}: has no '{missing}' (its columns: {_listed(row)})",
            f"every {_NAMES[expected]} row needs {' and '.join(wanted)}; fill in or remove the row",
        )
    return replace(_CONVERT[expected](row), columns=row.fields)


def _unanswered(row: Row, expected: str, allowed: bool) -> Example | None:
    """A question whose answers are given as none, where that is allowed."""
    answers = row.fields.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not allowed or expected != "question_answering" or row.fields.get("answer") is not None or texts != []:
        return None
    question = _string(row, "question", row.fields.get("question"), filled=True)
    return Example(row.place, expected, _pair(question, ""), fields=row.fields, columns=row.fields)


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
        raise RowFault(
            "wrong",
            f"{row.place}: {name} is {type(value).__name__}, not text",
            f"write the value of {name} in quotes",
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowFault(
                "mojibake",
                f"{row.place}: {name} holds half a character ({value[error.start]!r}), which no text can",
                "write the file as UTF-8",
            ) from None
    if filled and not value.strip():
        what = "asks nothing" if name in _QUESTIONS else "leaves nothing to learn"
        raise RowFault("empty", f"{row.place}: {name} is empty and {what}", "fill it in or remove the row")
    return value


# Columns that hold what is asked, not what is learned.
_QUESTIONS = {"instruction", "question", "source", "sentence", "dialogue", "document", "article", "tokens"}


def _instruction(answer_column: str, context_column: str, name: str) -> Callable[[Row], Example]:
    def convert(row: Row) -> Example:
        question = _string(row, "instruction", row.fields["instruction"], filled=True)
        context = row.fields.get(context_column)
        if context is not None:
            question = with_context(question, _string(row, context_column, context, filled=False))
        answer = _string(row, answer_column, row.fields[answer_column], filled=True)
        return Example(row.place, name, [*_system(row), *_pair(question, answer)])

    return convert


def _from_gpt4all(row: Row) -> Example:
    prompt = _string(row, "prompt", row.fields["prompt"], filled=False)
    return Example(row.place, "gpt4all", _pair(prompt, _string(row, "response", row.fields["response"], filled=True)))


def _task(name: str) -> Callable[[Row], Example]:
    def convert(row: Row) -> Example:
        columns = _columns_of(row, name) or _FORMATS[name][0]
        try:
            question, answer = RENDER[name](row.fields)
        except Unfit as unfit:
            raise RowFault("wrong", f"{row.place}: {unfit.reason}", unfit.fix) from None
        question = _string(row, columns[0], question, filled=True)
        answer = _string(row, columns[-1], answer, filled=True)
        return Example(row.place, name, _pair(question, answer), fields=row.fields)

    return convert


def _system(row: Row) -> list[Message]:
    system = row.fields.get("system")
    return [{"role": "system", "content": _string(row, "system", system, filled=False)}] if system else []


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
                raise RowFault(
                    "roles",
                    f"{row.place}: conversations: a turn is from {speaker!r}",
                    f"each turn needs a value and a from among {', '.join(_SHAREGPT_ROLES)}",
                )
            converted.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]})
        turns = converted
        if turns[0]["role"] != "system":
            turns = [*_system(row), *turns]
    return Example(row.place, "conversations", _checked(row, turns, "conversations"))


def _from_text(row: Row) -> Example:
    return Example(row.place, "text", text=_string(row, "text", row.fields["text"], filled=True))


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _checked(row: Row, messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise RowFault(
            "empty" if messages == [] else "wrong",
            f"{row.place}: {name} is not a list of messages",
            'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    cleaned = []
    for number, message in enumerate(messages, start=1):
        where = f"{name}: message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowFault("roles", f"{row.place}: {where} has no role", 'each message needs "role" and "content"')
        # Parquet fills absent keys with None, which chat templates would print.
        message = {key: value for key, value in message.items() if value is not None}
        if message["role"] == "assistant" and not message.get("tool_calls"):
            _string(row, f"{where}: content", message.get("content"), filled=True)
        elif "content" in message:
            if not isinstance(message["content"], list):
                _string(row, f"{where}: content", message["content"], filled=False)
        elif not message.get("tool_calls"):
            raise RowFault("missing", f"{row.place}: {where} has no content", 'each message needs "role" and "content"')
        cleaned.append(message)
    _check_roles(row, [message["role"] for message in cleaned], name)
    return cleaned


def _check_roles(row: Row, roles: list[str], name: str) -> None:
    """Refuse a conversation that no chat could have had: its answers would be learned without their questions."""
    mend = "put the messages in order (system, then user and assistant in turn), or remove the row"
    for number, role in enumerate(roles, start=1):
        where = f"{row.place}: {name}: message {number} is from {role!r}"
        before = roles[number - 2] if number > 1 else None
        if role not in ROLES:
            raise RowFault("roles", f"{where}, a role that is not known", f"use {', '.join(ROLES)}")
        if role in ("system", "developer") and number > 1:
            raise RowFault("roles", f"{where}, which can only come first", mend)
        if role == before and role in ("user", "assistant"):
            raise RowFault("roles", f"{where}, and so is the one before it", mend)
        if role == "assistant" and before in (None, "system", "developer"):
            raise RowFault("roles", f"{where}, but nothing was asked before it", mend)
        if role in ("tool", "function") and before not in ("assistant", "tool", "function"):
            raise RowFault("roles", f"{where}, but no assistant called it", mend)
    if "assistant" not in roles:
        raise RowFault(
            "empty",
            f"{row.place}: {name} has no assistant message, so nothing in it is learned",
            "add the answer or remove the row",
        )


def _from_preference(row: Row) -> Example:
    """Two answers to one prompt, as texts or as the ends of one conversation."""
    prompt, answers = row.fields.get("prompt"), {side: row.fields[side] for side in ("chosen", "rejected")}
    if prompt is not None and not isinstance(prompt, list):
        prompt = _string(row, "prompt", prompt, filled=False)
    for side, answer in answers.items():
        if isinstance(answer, list):
            asked = prompt if isinstance(prompt, list) else _pair(prompt, "")[:1] if prompt else []
            answers[side] = _checked(row, [*asked, *answer], side)
        else:
            _string(row, side, answer, filled=True)
            if isinstance(prompt, list):
                raise RowFault(
                    "wrong", f"{row.place}: prompt holds messages, but {side} is a text", "write both in one way"
                )
    chosen, rejected = answers.values()
    if type(chosen) is not type(rejected):
        raise RowFault("wrong", f"{row.place}: of chosen and rejected one is a text", "write both in one way")
    if chosen == rejected:
        raise RowFault("wrong", f"{row.place}: chosen and rejected are the same", "remove the row")
    fields = {"prompt": prompt if isinstance(chosen, str) else None, **answers}
    text = f"{fields['prompt'] or ''}\n\n{chosen}\n\n{rejected}"
    return Example(row.place, "preference", text=text, fields=fields, tools=row.fields.get("tools"))


_CONVERT: dict[str, Callable[[Row], Example]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _instruction("output", "input", "alpaca"),
    "dolly": _instruction("response", "context", "dolly"),
    "gpt4all": _from_gpt4all,
    "preference": _from_preference,
    "text": _from_text,
    **{name: _task(name) for name in RENDER},
}

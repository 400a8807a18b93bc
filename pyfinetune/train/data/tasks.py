"""Tasks as plain questions with plain answers, so that a causal language model can be trained on their rows.

Each function takes a row's columns and gives (question, answer); `formats.to_examples` checks what they return. The
columns themselves stay on the example for models with a head of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Unfit(Exception):
    """A row's values do not make a question with an answer.

    Args:
        reason: what is wrong, beginning with the column's name.
        fix: what mends it.
    """

    def __init__(self, reason: str, fix: str):
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


def with_context(instruction: str, context: str | None) -> str:
    """An instruction and what it is about, as one question.

    Args:
        instruction: what is asked.
        context: what it is asked of; empty or None where there is nothing.

    Returns:
        The two with an empty line between them.

    Example:
        >>> with_context("Add.", "1 1")
        'Add.\\n\\n1 1'
    """
    return f"{instruction}\n\n{context}" if context and context.strip() else instruction


def classification(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """A text and its class.

    Args:
        fields: `text` (or `sentence`), `label` (a name or a whole number), and perhaps `text_pair`.

    Returns:
        Question and answer.

    Raises:
        Unfit: the label is neither a name nor a whole number.

    Example:
        >>> classification({"text": "A fine film.", "label": "pos"})
        ('Classify the text.\\n\\nA fine film.', 'pos')
    """
    label = fields["label"]
    if isinstance(label, int):
        label = str(label)
    elif not isinstance(label, str):
        raise Unfit(f"label is {type(label).__name__}, not a class", "write a name or a whole number")
    text = _first(fields, "text", "sentence")
    if isinstance(text, str) and text.strip():
        text = with_context(f"Classify the text.\n\n{text}", fields.get("text_pair"))
    return text, label


def token_classification(fields: Mapping[str, Any]) -> tuple[str, str]:
    """A text's tokens and their tags (BIO), asked as a list of the tagged spans.

    Args:
        fields: `tokens` and, of the same length, `tags` or `ner_tags`.

    Returns:
        Question and answer: a line `type: words` for each span, or `none`.

    Raises:
        Unfit: there are no tokens, they are not texts, or there is another number of tags.

    Example:
        >>> token_classification({"tokens": ["In", "New", "York"], "tags": ["O", "B-place", "I-place"]})[1]
        'place: New York'
    """
    tokens, tags = fields["tokens"], _first(fields, "tags", "ner_tags")
    for name, values in (("tokens", tokens), ("tags", tags)):
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise Unfit(f"{name} is {type(values).__name__}, not a list", "give a list of words and a list of tags")
    if len(tokens) != len(tags):
        raise Unfit(f"tokens has {len(tokens)} entries, but tags has {len(tags)}", "give each token one tag")
    if not all(isinstance(token, str) for token in tokens):
        raise Unfit("tokens holds something that is not text", "write every token in quotes")
    spans: list[tuple[str, list[str]]] = []
    previous = "O"
    for token, tag in zip(tokens, map(str, tags), strict=True):
        kind = tag.partition("-")[2] or tag
        if tag != "O":
            if tag.startswith("B-") or previous == "O" or spans[-1][0] != kind:
                spans.append((kind, []))
            spans[-1][1].append(token)
        previous = tag
    answer = "\n".join(f"{kind}: {' '.join(words)}" for kind, words in spans) or "none"
    question = " ".join(tokens)
    return (f"List the named entities of the text.\n\n{question}" if question.strip() else ""), answer


def question_answering(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """A question, with or without a text that answers it.

    Args:
        fields: `question`; `answer`, or `answers` as SQuAD has them (`{"text": [...]}`); and perhaps `context`.

    Returns:
        Question and answer; of several right answers the first.

    Raises:
        Unfit: `answers` is neither a list nor `{"text": [...]}`.

    Example:
        >>> question_answering({"question": "Who?", "context": "Ann ran.", "answers": {"text": ["Ann"]}})
        ('Ann ran.\\n\\nWho?', 'Ann')
    """
    answer = fields.get("answer")
    if answer is None:
        found = fields["answers"]
        texts = found.get("text") if isinstance(found, Mapping) else found
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, Sequence):
            raise Unfit(f"answers is {type(found).__name__}, not a list", 'write {"text": ["..."]}')
        answer = texts[0] if texts else ""
    question, context = fields["question"], fields.get("context")
    if isinstance(context, str) and context.strip() and isinstance(question, str) and question.strip():
        question = f"{context}\n\n{question}"
    return question, answer


def summarization(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """A text and its summary.

    Args:
        fields: `dialogue`, `document`, `article` or `text`; and `summary` or `highlights`.

    Returns:
        Question and answer.

    Example:
        >>> summarization({"dialogue": "A: Hi.", "summary": "A greets."})
        ('Summarize the text.\\n\\nA: Hi.', 'A greets.')
    """
    text = _first(fields, "dialogue", "document", "article", "text")
    return _asked("Summarize the text.", text), _first(fields, "summary", "highlights")


def translation(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """A text and its translation.

    Args:
        fields: `source` and `target`, or `translation` with two languages, from the first into the second.

    Returns:
        Question and answer.

    Raises:
        Unfit: `translation` does not hold two languages.

    Example:
        >>> translation({"translation": {"de": "Hund", "en": "dog"}})
        ('Translate from de to en.\\n\\nHund', 'dog')
    """
    pair = fields.get("translation")
    if pair is None:
        return _asked("Translate the text.", fields["source"]), fields["target"]
    if not isinstance(pair, Mapping) or len(pair) != 2:
        raise Unfit("translation does not hold two languages", 'write {"de": "...", "en": "..."}')
    (first, source), (second, target) = pair.items()
    return _asked(f"Translate from {first} to {second}.", source), target


def right_answers(task: str, fields: Mapping[str, Any], answer: str) -> Any:
    """What would be right to answer, in the form that `metrics.score` takes it.

    Args:
        task: a key of `RENDER`, or any other.
        fields: the row's columns.
        answer: the answer that the row is learned with.

    Returns:
        For token_classification the tags; for question_answering every right answer; else `answer`.

    Example:
        >>> right_answers("question_answering", {"question": "Who?", "answers": {"text": ["Ann", "she"]}}, "Ann")
        ['Ann', 'she']
    """
    if task == "token_classification":
        return [str(tag) for tag in _first(fields, "tags", "ner_tags")]
    if task == "question_answering" and fields.get("answer") is None:
        found = fields["answers"]
        texts = found.get("text") if isinstance(found, Mapping) else found
        return [texts] if isinstance(texts, str) else list(texts)
    return answer


def tags_of_answer(tokens: Sequence[str], answer: str) -> list[str]:
    """The tags that an answer to `token_classification`'s question gives a text's tokens.

    Args:
        tokens: of the text.
        answer: lines `type: words`.

    Returns:
        A tag a token (BIO). Each line marks the first place of its words that comes after the line before it, or else
        the first that is free; words that are not in the text mark nothing.

    Example:
        >>> tags_of_answer(["In", "New", "York"], "place: New York")
        ['O', 'B-place', 'I-place']
    """
    tags, after = ["O"] * len(tokens), 0
    for line in answer.splitlines():
        kind, colon, text = line.partition(":")
        kind, words = kind.strip(), text.split()
        if not (colon and kind and words):
            continue
        # A token may hold a space of its own, and the answer joins tokens by spaces.
        places = [at for at in range(len(tokens)) if _joined_until(tokens, at, words) is not None]
        free = [at for at in places if all(tag == "O" for tag in tags[at : _joined_until(tokens, at, words)])]
        if not free:
            continue
        start = next((at for at in free if at >= after), free[0])
        after = _joined_until(tokens, start, words)
        tags[start:after] = [f"B-{kind}"] + [f"I-{kind}"] * (after - start - 1)
    return tags


def _joined_until(tokens: Sequence[str], start: int, words: list[str]) -> int | None:
    """The token after those from `start` on that make the words; None where they do not."""
    end, made = start, []
    while end < len(tokens) and len(made) < len(words):
        made += tokens[end].split()
        end += 1
    return end if made == words else None


RENDER: dict[str, Callable[[Mapping[str, Any]], tuple[Any, Any]]] = {
    "classification": classification,
    "token_classification": token_classification,
    "question_answering": question_answering,
    "summarization": summarization,
    "translation": translation,
}


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _asked(instruction: str, text: Any) -> Any:
    """The question about a text; what is no text, or empty, stays as it is and is found at fault later."""
    return f"{instruction}\n\n{text}" if isinstance(text, str) and text.strip() else text

"""Examples into token documents, each token marked as learned or only read.

`formats.to_examples` -> `tokenize` -> `Tokenized` (a list of `Document` and the counts of what was cut) -> `packing`.
Conversations are written by the tokenizer's own chat template. What a model will have to produce is learned: every
assistant turn and the token that ends it; the rest is context. Raw text is learned whole, in pieces of `max_length`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfinetune.errors import UserError
from pyfinetune.train.data.formats import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers without a template: headings that any text model can read, each answer closed by the end token.
_PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}"
)
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Document:
    """One stretch of tokens that is read from its start and never sees another.

    Args:
        input_ids: int32 [length].
        learned: bool [length]; True where the token is a target. The first is always False: nothing precedes it.
        place: file and row it came from.
    """

    input_ids: np.ndarray
    learned: np.ndarray
    place: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Tokenized:
    """Documents and what became of the rows on the way.

    Args:
        documents: what is trained on.
        rows: rows that came in.
        cut: places of rows whose answer was cut by `max_length`, so that they never show its end.
        dropped: places of rows whose answer was cut off entirely.
        masked: places of rows of which the chat template writes no answer; they are left out too.
        lost_tokens: tokens of answers that `max_length` cut away, those of the dropped rows included.
        longest: the longest row, in tokens, before cutting.
        answers: stretches of learned tokens, each of which should teach its end.
        ends: token id to the number of answers that it closes and in which it is learned.
    """

    documents: list[Document] = field(default_factory=list)
    rows: int = 0
    cut: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)
    lost_tokens: int = 0
    longest: int = 0
    answers: int = 0
    ends: Counter[int] = field(default_factory=Counter)

    @property
    def cut_short(self) -> int:
        """Rows whose answer was cut by `max_length`."""
        return len(self.cut)

    @property
    def learned_tokens(self) -> int:
        """Tokens that are targets of the loss."""
        return int(sum(document.learned.sum() for document in self.documents))

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(map(len, self.documents))


def load_tokenizer(
    name_or_path: str, chat_template: str = "auto", eos_token: str | None = None, data_format: str = "alpaca"
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an end token and, where conversations are to be written, a chat template.

    Args:
        name_or_path: a model's name on the hub or its folder.
        chat_template: `auto` (the tokenizer's own; without one, prompt/completion is joined as it stands and other
            conversations get headings), `plain` (headings), `none` (joined as it stands), or the path of a Jinja file.
        eos_token: the token that ends an answer, where the tokenizer names none; it must be in the vocabulary.
        data_format: what `formats.recognise` said of the data.

    Returns:
        A tokenizer whose `chat_template` is what conversations will be written with; None joins them as they stand.

    Raises:
        UserError: there is no tokenizer, no end token, or no such template.

    Example:
        >>> load_tokenizer("Qwen/Qwen2.5-0.5B-Instruct").eos_token  # doctest: +SKIP
        '<|im_end|>'
    """
    tokenizer = _from_pretrained(name_or_path)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"eos_token: {eos_token!r} is not in the vocabulary of {name_or_path}",
                fix=f"choose an existing token, for example {_end_candidates(tokenizer)}",
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model_name_or_path: the tokenizer of {name_or_path} has no end token: the model could not learn to stop",
            fix=f"set eos_token to a token of its vocabulary, for example {_end_candidates(tokenizer)}",
        )
    if chat_template == "none":
        tokenizer.chat_template = None
    elif chat_template == "plain" or (
        chat_template == "auto" and not tokenizer.chat_template and data_format not in ("text", "prompt_completion")
    ):
        # A tokenizer that opens every text with its start token needs it in the template, which is encoded as it is.
        tokenizer.chat_template = ("{{- bos_token -}}" if _adds_bos(tokenizer) else "") + _PLAIN_TEMPLATE
    elif chat_template != "auto":
        if not os.path.isfile(chat_template):
            raise UserError(
                f"chat_template: {chat_template}: no such file",
                fix="set auto, plain, none, or the path of a Jinja file",
            )
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_head_tokenizer(name_or_path: str, split_into_words: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer for a model with a head, which ends nothing and writes no conversation.

    Args:
        name_or_path: a model's name on the hub or its folder.
        split_into_words: whether it will be given words; one of bytes then has to put a space before each.

    Returns:
        A tokenizer with a token to fill rows up with: its end token where it has none for that.

    Raises:
        UserError: there is no tokenizer, or it has neither token.

    Example:
        >>> load_head_tokenizer("bert-base-cased").pad_token  # doctest: +SKIP
        '[PAD]'
    """
    tokenizer = _from_pretrained(name_or_path)
    if split_into_words and tokenizer.is_fast and '"ByteLevel"' in tokenizer.backend_tokenizer.to_str():
        tokenizer = _from_pretrained(name_or_path, add_prefix_space=True)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model_name_or_path: the tokenizer of {name_or_path} has no token to fill rows up with",
                fix="save it again with a pad_token",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model_name_or_path: no tokenizer can be loaded from {name_or_path!r}: {_first_line(error)}",
            fix="give a folder with tokenizer.json, or a model's name on the hub",
        ) from error


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    completion_only_loss: bool | None = None,
) -> Tokenized:
    """Turn examples into token documents of at most `max_length` tokens.

    Args:
        examples: what `formats.to_examples` returned.
        tokenizer: what `load_tokenizer` returned.
        max_length: longest document, in tokens. Raw text is cut into pieces; a conversation loses its end.
        completion_only_loss: learn only the answers (the default for conversations), or, when False, the whole text.

    Returns:
        The documents with their counts.

    Raises:
        UserError: the chat template refuses a row, or no token of the whole set would be learned.

    Example:
        >>> tokenize(to_examples(rows), tokenizer, max_length=512).learned_tokens  # doctest: +SKIP
        81920
    """
    result = Tokenized(rows=len(examples))
    marks = _Marks(tokenizer)
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        texts = [index for index, example in enumerate(batch) if example.format == "text"]
        chats = [index for index, example in enumerate(batch) if example.format != "text"]
        found = _texts(result, [batch[i] for i in texts], tokenizer, max_length) if texts else []
        if chats:
            answers_only = completion_only_loss is not False
            found += _conversations(result, [batch[i] for i in chats], marks, max_length, answers_only)
        order = {id(batch[index]): index for index in range(len(batch))}
        result.documents += [document for _, document in sorted(found, key=lambda pair: order[pair[0]])]
    if examples and not any(document.learned.any() for document in result.documents):
        raise _nothing_learned(result, examples, max_length)
    return result


def _nothing_learned(result: Tokenized, examples: Sequence[Example], max_length: int) -> UserError:
    if result.masked:
        return UserError(
            f"no token would be learned: the chat template writes none of the {len(examples)} answers"
            f" (first: {result.masked[0]})",
            fix="set chat_template: plain, or the path of a template that writes the assistant's messages",
        )
    return UserError(
        f"no token would be learned: max_length {max_length} cuts off every one of the {len(examples)} answers"
        f" (first: {result.dropped[0] if result.dropped else examples[0].place})",
        fix=f"raise max_length; the longest row has {result.longest} tokens",
    )


class _Marks:
    """What a tokenizer's tokens are: those that can close an answer, and those that only make space."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.closing = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self.closing_texts = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.is_blank = functools.lru_cache(maxsize=None)(lambda token: not tokenizer.decode([token]).strip())

    def says_nothing(self, text: str) -> bool:
        """Whether a text is made of closing tokens and space alone."""
        for mark in self.closing_texts:
            text = text.replace(mark, "")
        return not text.strip()

    def count_ends(self, result: Tokenized, document: Document) -> None:
        """Add a document's answers, and the tokens that close them, to the counts."""
        edges = np.flatnonzero(np.diff(document.learned.astype(np.int8), prepend=0, append=0))
        for first, end in edges.reshape(-1, 2):
            last = end - 1
            while last > first and document.input_ids[last] not in self.closing:
                if not self.is_blank(int(document.input_ids[last])):
                    break
                last -= 1
            result.answers += 1
            if document.input_ids[last] in self.closing:
                result.ends[int(document.input_ids[last])] += 1


def _texts(result: Tokenized, batch: Sequence[Example], tokenizer: Any, max_length: int) -> list[tuple[int, Document]]:
    """Documents of raw texts, each with the identity of its example."""
    found = []
    encoded = tokenizer([example.text for example in batch], verbose=False)["input_ids"]
    for example, ids in zip(batch, encoded, strict=True):
        if ids[-1:] != [tokenizer.eos_token_id]:  # some tokenizers add it themselves
            ids = [*ids, tokenizer.eos_token_id]
        result.longest = max(result.longest, len(ids))
        result.answers += 1
        borders = [*range(0, len(ids), max_length), len(ids)]
        if len(borders) > 2 and borders[-1] - borders[-2] == 1:
            borders[-2] -= 1  # a lone token has no predecessor to be predicted from, and this one is the end
        for start, end in itertools.pairwise(borders):
            if end - start > 1:
                found.append((id(example), _document(ids[start:end], [True] * (end - start), example.place)))
        result.ends[tokenizer.eos_token_id] += len(ids) > 1
    return found


def _conversations(
    result: Tokenized, batch: Sequence[Example], marks: _Marks, max_length: int, answers_only: bool
) -> list[tuple[int, Document]]:
    """Documents of conversations, each with the identity of its example."""
    tokenizer, found = marks.tokenizer, []
    texts, spans, owners = [], [], []
    for example in batch:
        written = _written(example, marks)
        if not written:
            result.masked.append(example.place)
        for text, learned in written:
            texts.append(text)
            spans.append(learned)
            owners.append(example)
    own_bos = tokenizer.chat_template is None and _adds_bos(tokenizer)
    encoded = _encode(texts, spans, tokenizer) if texts else []
    for (ids, learned), example in zip(encoded, owners, strict=True):
        ids, learned = _ended(ids, learned, marks)
        if own_bos:
            ids, learned = [tokenizer.bos_token_id, *ids], [False, *learned]
        if not answers_only:
            learned = [True] * len(ids)
        result.longest = max(result.longest, len(ids))
        if len(ids) > max_length:
            result.lost_tokens += sum(learned[max_length:])
            if not any(learned[1:max_length]):
                result.dropped.append(example.place)
                continue
            result.cut.append(example.place)
        document = _document(ids[:max_length], learned[:max_length], example.place)
        marks.count_ends(result, document)
        found.append((id(example), document))
    return found


def _document(ids: Iterable[int], learned: Iterable[bool], place: str) -> Document:
    mask = np.asarray(learned, dtype=bool)
    mask[:1] = False
    return Document(np.asarray(ids, dtype=np.int32), mask, place)


def _written(example: Example, marks: _Marks) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts of an example, each with the character spans that are learned; none when no answer is written."""
    messages, tokenizer = example.messages, marks.tokenizer
    if tokenizer.chat_template is None:
        if example.format in ("messages", "conversations"):
            raise UserError(
                f"{example.place}: chat messages cannot be written without a template (chat_template: none)",
                fix="set chat_template: auto, plain, or the path of a Jinja file",
            )
        prompt = "\n\n".join(message["content"] for message in messages[:-1])
        prompt += "" if example.format == "prompt_completion" else "\n"
        text = prompt + messages[-1]["content"]
        return [(text, [(len(prompt), len(text))])]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _render(example, tokenizer, messages)
    spans = []
    for index in turns:
        start, upto = _turn(example, tokenizer, index)
        if not whole.startswith(upto):
            # The template writes earlier turns differently once others follow (it drops their reasoning, say): one
            # text a turn then shows each answer exactly as the model will have to give it.
            written = [(i, *_turn(example, tokenizer, i)) for i in turns]
            return [(text, [(at, len(text))]) for i, at, text in written if _is_there(messages[i], text[at:], marks)]
        if _is_there(messages[index], upto[start:], marks):
            spans.append((start, len(upto)))
    return [(whole[: spans[-1][1]], spans)] if spans else []


def _is_there(message: Message, span: str, marks: _Marks) -> bool:
    """Whether a template has written anything of an answer."""
    content = message.get("content")
    if isinstance(content, str) and content.strip() and content.strip() in span:
        return True
    return not marks.says_nothing(span)


def _turn(example: Example, tokenizer: Any, index: int) -> tuple[int, str]:
    """Where the assistant message `index` starts, and the text up to its end."""
    before = _render(example, tokenizer, example.messages[:index], add_generation_prompt=True)
    upto = _render(example, tokenizer, example.messages[: index + 1])
    shorter = min(len(before), len(upto))
    start = next((at for at in range(shorter) if before[at] != upto[at]), shorter)
    bare = _render(example, tokenizer, example.messages[:index]) if start < len(before) and index else before[:start]
    if not upto.startswith(bare):
        raise UserError(
            f"{example.place}: the chat template rewrites the conversation when an answer is added, so the answer"
            " cannot be told from its context",
            fix="set chat_template: plain, or the path of a template that only appends",
        )
    return start, upto


def _render(example: Example, tokenizer: Any, messages: list[Message], **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tools=example.tools, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"{example.place}: the chat template refuses this conversation: {_first_line(error)}",
            fix="mend the roles and contents of that row, or set chat_template to another template",
        ) from error


def _encode(texts: list[str], spans: list[list[tuple[int, int]]], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Token ids with their learned marks; a token that straddles a span's edge is avoided by encoding piecewise."""
    if not tokenizer.is_fast:
        return [_encode_pieces(text, parts, tokenizer) for text, parts in zip(texts, spans, strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encoded = []
    for text, parts, ids, offsets in zip(texts, spans, batch["input_ids"], batch["offset_mapping"], strict=True):
        first, last = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T  # [length] each
        learned = np.zeros(len(ids), dtype=bool)
        clean = True
        for start, end in parts:
            touched = (first < end) & (last > start)
            learned |= touched
            clean = clean and bool(np.all((first >= start)[touched]) and np.all((last <= end)[touched]))
        encoded.append((ids, learned.tolist()) if clean else _encode_pieces(text, parts, tokenizer))
    return encoded


def _encode_pieces(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    for first, last in itertools.pairwise(edges):
        piece = tokenizer(text[first:last], add_special_tokens=False, verbose=False)["input_ids"]
        inside = any(start <= first and last <= end for start, end in spans)
        ids += piece
        learned += [inside] * len(piece)
    return ids, learned


def _ended(ids: list[int], learned: list[bool], marks: _Marks) -> tuple[list[int], list[bool]]:
    """The same tokens up to the end token of the last answer, added where there is none: without it in training a
    model never stops. What follows it (a template's line break) is never asked for."""
    for last in range(len(ids) - 1, -1, -1):
        if not learned[last]:
            break
        if ids[last] in marks.closing:
            return ids[: last + 1], learned[: last + 1]
        if not marks.is_blank(ids[last]):
            break
    return [*ids, marks.tokenizer.eos_token_id], [*learned, True]


def _adds_bos(tokenizer: Any) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    return tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]


def _end_candidates(tokenizer: Any) -> str:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    likely = [token for token in added if any(mark in token.lower() for mark in ("end", "eos", "eot", "/s", "im_end"))]
    return repr((likely or added or sorted(tokenizer.get_vocab()))[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

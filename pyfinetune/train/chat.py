"""`pyfinetune chat`: a conversation with a saved model in the terminal, or with lines from a pipe.

    folder -> open_chat -> Chat.ask(question) -> the answer, token by token

Turns are written by the tokenizer's chat template. A model without one continues each text on its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.model import choose_device
from pyfinetune.train.saved import find_saved, load_saved, load_tokenizer_of

_LEAVE, _RESET = ("/quit", "/exit"), "/reset"


class Chat:
    """A conversation.

    Args:
        model: that generates text.
        tokenizer: its tokenizer.
        system: what the model is told before everything else, or None.
        max_new_tokens: the longest answer.
        temperature: 0 for the most likely tokens, else they are drawn.
        say: called with a sentence for the person at the screen.

    Raises:
        UserError: the model generates no text, a number is out of range, or there is no place for a system message.

    Example:
        >>> Chat(model, tokenizer).ask("What is 2+2?", print)  # doctest: +SKIP
        '4'
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        say: Callable[[str], None] = lambda message: None,
    ):
        if max_new_tokens < 1:
            raise UserError(
                f"--max-new-tokens {max_new_tokens}: an answer has at least 1 token", fix="give a larger number"
            )
        if not 0 <= temperature < float("inf"):
            raise UserError(f"--temperature {temperature}: is negative or no number", fix="give 0, or about 0.7")
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not (hasattr(inner, "can_generate") and inner.can_generate()):
            raise UserError(
                f"chat: {type(inner).__name__} gives no text", fix="give a causal language model, or an adapter of one"
            )
        self.model, self.tokenizer, self.say = model, tokenizer, say
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
        self.has_turns = bool(tokenizer.chat_template)
        if system is not None and not self.has_turns:
            raise UserError(
                "--system: the model has no chat template, and continues texts as they are", fix="leave --system out"
            )
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict[str, str]] = []
        self._ends = _stop_tokens(tokenizer, inner)
        if self.start:
            self._ids([*self.start, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.turns = []

    def ask(self, question: str, write: Callable[[str], None]) -> str:
        """Let the model answer.

        Args:
            question: of the user; without a chat template, the text to continue.
            write: called with each piece of the answer as it comes.

        Returns:
            The whole answer, or what there was of it when Ctrl-C stopped it.

        Raises:
            UserError: the question alone is longer than the model's context.
        """
        ids = self._fitting(question)
        stream = _Stream(self.tokenizer, write)
        try:
            with torch.no_grad():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._settings(ids.shape[1]),
                    streamer=stream,
                )
        except KeyboardInterrupt:
            stream.end()
        answer = "".join(stream.pieces)
        if self.has_turns:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return answer

    def _settings(self, length: int) -> Any:
        from transformers import GenerationConfig

        room = self.max_new_tokens if self.positions is None else min(self.max_new_tokens, self.positions - length)
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return GenerationConfig(
            max_new_tokens=room, eos_token_id=self._ends or None, pad_token_id=next(iter(self._ends), 0), **drawn
        )

    def _fitting(self, question: str) -> torch.Tensor:
        """Token ids of the conversation and the question, without the oldest turns where they do not fit."""
        dropped = 0
        while True:
            ids = self._ids([*self.start, *self.turns, {"role": "user", "content": question}])
            room = float("inf") if self.positions is None else self.positions - len(ids)
            if room >= self.max_new_tokens or (not self.turns and room >= 1):
                break
            if not self.turns:
                raise UserError(
                    f"chat: this question has {len(ids):,} tokens, and the model's context {self.positions:,}",
                    fix="ask it in fewer words",
                )
            self.turns = self.turns[2:]
            dropped += 1
        if dropped:
            self.say(f"the conversation is longer than the model's context: forgot the oldest {dropped} turn(s)")
        return torch.tensor([ids], device=next(self.model.parameters()).device)

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.has_turns:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            what = "--system" if self.start else "chat"
            raise UserError(
                f"{what}: the model's chat template refuses these messages: {error}",
                fix="leave --system out" if self.start else "use a tokenizer whose chat template takes user turns",
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class _Stream:
    """Text of the tokens as they come, without the beginning of a character whose rest is not there yet."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.pieces: list[str] = []
        self._ids: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then token by token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.reshape(-1).tolist()
        self._emit(self._text())

    def end(self) -> None:
        """Give out what is left."""
        self._emit(self._text(), last=True)

    def _text(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True)

    def _emit(self, text: str, last: bool = False) -> None:
        if not last:
            text = text.rstrip("\ufffd")
        new = text[sum(map(len, self.pieces)) :]
        if new:
            self.pieces.append(new)
            self.write(new)


def open_chat(
    folder: str | Path, device: str = "auto", say: Callable[[str], None] = lambda message: None, **settings: Any
) -> Chat:
    """Load a saved model for a conversation.

    Args:
        folder: a run's output folder, an adapter's, or a model's, in 4 bits or not.
        device: `auto`, `cpu` or `cuda`.
        say: called with a sentence for the person at the screen.
        settings: further arguments of `Chat`.

    Returns:
        The conversation.

    Raises:
        UserError: the folder holds no model that gives text.

    Example:
        >>> open_chat("runs/first").ask("What is 2+2?", print)  # doctest: +SKIP
    """
    saved = find_saved(folder)
    model = load_saved(saved, choose_device(device))
    chat = Chat(model, load_tokenizer_of(saved), say=say, **settings)
    if not chat.has_turns:
        say("this model has no chat template: it continues each text as it is")
    return chat


def converse(chat: Chat, source: TextIO, out: TextIO) -> None:
    """Answer line by line, until the lines end or say `/quit`; `/reset` forgets the conversation.

    Args:
        chat: the conversation.
        source: where questions come from, one a line; a terminal is prompted.
        out: where answers go.

    Example:
        >>> converse(open_chat("runs/first"), sys.stdin, sys.stdout)  # doctest: +SKIP
    """

    def write(piece: str) -> None:
        out.write(piece)
        out.flush()

    for line in _lines(source):
        question = line.strip()
        if question in _LEAVE:
            return
        if question == _RESET:
            chat.reset()
            chat.say("forgot the conversation")
        elif question:
            try:
                chat.ask(question, write)
            except UserError as error:
                chat.say(f"error: {error}")
            write("\n")


def _lines(source: TextIO) -> Iterator[str]:
    """Lines of a terminal, with a prompt and a history of its own, or of anything else."""
    if not source.isatty():
        yield from source
        return
    if source is sys.stdin:
        import readline  # noqa: F401  gives input() its editing

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("(Ctrl-D or /quit leaves)", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _stop_tokens(tokenizer: Any, model: Any) -> list[int]:
    """Tokens that end an answer: the end tokens, and the one with which the chat template closes a turn."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    if tokenizer.chat_template:
        mark = "answer"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        rest = tokenizer(text[text.rindex(mark) + len(mark) :] if mark in text else "", add_special_tokens=False)
        added = tokenizer.added_tokens_decoder
        found.append(next((token for token in rest["input_ids"] if token in added), None))
    return list(dict.fromkeys(token for token in found if token is not None))

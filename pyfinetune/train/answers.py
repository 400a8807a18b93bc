"""A few held-out questions, and what the model answers before and after."""

from __future__ import annotations

import dataclasses
import json
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_LONGEST_QUESTION, _LONGEST_TRUTH = 40, 32  # tokens; three fit on a screen
_NEW_TOKENS = 40
_CONTINUED_FROM = 24  # of raw text, which has no question, the model is given this many tokens
_FILE = "examples.json"


@dataclass
class Sample:
    """One question.

    Args:
        prompt: token ids.
        question, truth: as text.
        before, after: the model's answers.
    """

    prompt: list[int]
    question: str
    truth: str
    before: str = ""
    after: str = ""


def choose(rows: Sequence[Sequence[Any]], tokenizer: Any, seed: int, count: int = 3) -> list[Sample]:
    """Choose held-out questions, short ones where there are some.

    Args:
        rows: held-out rows of documents.
        tokenizer: of the run.
        seed: decides which.
        count: how many at most.

    Returns:
        The questions with their true answers. Of raw text, which is learned from its first token, the beginning
        stands for the question.

    Example:
        >>> choose(rows.held_out, tokenizer, seed=42)[0].truth  # doctest: +SKIP
        'Delete all messages.'
    """
    samples = []
    for document in (document for row in rows for document in row):
        ids, learned = document.input_ids.tolist(), document.learned
        start = int(learned.argmax())
        if start <= 1 and learned[start:].all():
            start = min(_CONTINUED_FROM, len(ids) // 2)
        end = next((at for at in range(start, len(ids)) if not learned[at] and at > start), len(ids))
        if start == 0 or end == start:
            continue
        question, truth = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:end]))
        samples.append(
            (start > _LONGEST_QUESTION or end - start > _LONGEST_TRUTH, Sample(ids[:start], question, truth))
        )
    random.Random(seed).shuffle(samples)
    return [sample for _, sample in sorted(samples, key=lambda pair: pair[0])[:count]]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: list[int], seconds: float | None = None) -> str:
    """The model's most likely answer, token by token.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        prompt: token ids.
        seconds: no further token is begun after so many; None waits.

    Returns:
        At most 40 tokens as one line of text.

    Example:
        >>> answer(model, tokenizer, tokenizer("What does `os.abort()` do?\\n")["input_ids"])  # doctest: +SKIP
        'Abort the process.'
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    was_training = model.training
    model.eval()
    with warnings.catch_warnings():
        # PEFT tells that it leaves positions to the model wherever there are virtual tokens; so they should be.
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **({} if seconds is None else {"max_time": seconds}),
        )
    model.train(was_training)
    return " ".join(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).split())


def answer_all(samples: list[Sample], when: str, model: Any, tokenizer: Any, seconds: float = 60.0) -> None:
    """Answer each question, within a time, without a trace in the randomness of the training.

    Args:
        samples: the questions; their answers are set.
        when: `before` or `after`.
        model: as it is then.
        tokenizer: its tokenizer.
        seconds: for all of them; a question whose turn never came keeps the empty answer.

    Example:
        >>> answer_all(samples, "before", model, tokenizer)  # doctest: +SKIP
    """
    end = time.monotonic() + seconds
    with torch.random.fork_rng(devices=[]):
        for sample in samples:
            left = end - time.monotonic()
            if left > 0:
                setattr(sample, when, answer(model, tokenizer, sample.prompt, left))


def save_samples(samples: list[Sample], output_dir: str | Path) -> None:
    """Write the questions and answers beside a run's results, as `examples.json`.

    Args:
        samples: questions and answers.
        output_dir: the run's output folder.

    Example:
        >>> save_samples(samples, "out")  # doctest: +SKIP
    """
    content = json.dumps([dataclasses.asdict(sample) for sample in samples], indent=1, ensure_ascii=False)
    (Path(output_dir) / _FILE).write_text(content + "\n", encoding="utf-8")


def read_samples(output_dir: str | Path) -> list[Sample]:
    """Read what `save_samples` wrote.

    Args:
        output_dir: the run's output folder.

    Returns:
        The questions and answers; none where there is no such file, or half of one.

    Example:
        >>> read_samples("no-such-folder")
        []
    """
    path = Path(output_dir) / _FILE
    try:
        return [Sample(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []

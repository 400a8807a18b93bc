"""Evaluation of a model with a head of its own: its loss on each example, and its predictions.

Found, examples -> head_of -> Head;  load_head -> HeadPredictor -> Answer -> metrics.score
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyfinetune.errors import UserError
from pyfinetune.train import head_scores
from pyfinetune.train.config import RunConfig
from pyfinetune.train.encoders import IGNORED, MaskedRows, Part, collator_of
from pyfinetune.train.formats import Example
from pyfinetune.train.generating import answering
from pyfinetune.train.head_loop import head_logits
from pyfinetune.train.head_model import load_with_head
from pyfinetune.train.head_rows import head_part
from pyfinetune.train.heads import HEADS, Head, choose_head, saved_labels
from pyfinetune.train.model import read_config
from pyfinetune.train.predicting import Answer, OnAnswers
from pyfinetune.train.spans import right_answers
from pyfinetune.train.tasks import tags_of_answer
from pyfinetune.train.tokenizing import load_head_tokenizer
from pyfinetune.train.using import Found, with_adapter

_LEARNED = ("sequence_classification", "token_classification", "question_answering")


def head_of(found: Found, examples: Sequence[Example]) -> Head:
    """The head of a model.

    Args:
        found: what `using.find_model` returned.
        examples: rows to evaluate, from which a model that no run made has its head.

    Returns:
        The head.

    Raises:
        UserError: the model has no head for such rows, or is a reward model, which answers nothing.

    Example:
        >>> head_of(find_model("runs/first"), examples).kind  # doctest: +SKIP
        'causal_lm'
    """
    if found.run is not None:
        head = HEADS[found.record.get("head", {}).get("kind", "causal_lm")]
    else:
        head = choose_head(_settings(found), examples)
    if head.kind == "reward":
        raise UserError(
            f"{found.path}: is a reward model, which answers nothing", fix="see `metrics` in its run.json instead"
        )
    return head


def load_head(found: Found, head: Head, device: torch.device) -> tuple[Any, Any, tuple[str, ...]]:
    """Load a model with its head.

    Args:
        found: what `using.find_model` returned.
        head: what `head_of` returned.
        device: where to.

    Returns:
        The model in evaluation mode, its tokenizer, and the names of its classes.

    Raises:
        UserError: as `head_model.load_with_head`; or the model's head was never trained.

    Example:
        >>> model, tokenizer, labels = load_head(found, head, torch.device("cpu"))  # doctest: +SKIP
    """
    labels = tuple(found.record.get("head", {}).get("labels") or ())
    where = found.path if (Path(found.path) / "config.json").is_file() else found.base
    if head.has_labels and not labels:
        known = saved_labels(read_config(where)) or {}
        labels = tuple(known[number] for number in sorted(known))
    tokenizer = load_head_tokenizer(found.path, split_into_words=head.kind == "token_classification")
    model, fresh = load_with_head(
        found.base,
        head.auto_class,
        labels=labels,
        outputs=head.outputs,
        pad_token_id=tokenizer.pad_token_id,
        method=found.method,
        dtype=found.run.dtype if found.run is not None else "auto",
        device=device,
    )
    if not found.adapter and ((head.has_labels and not labels) or (fresh and head.kind in _LEARNED)):
        raise UserError(
            f"{found.path}: its head {head.kind} was never trained, so it predicts nothing",
            fix="train it first, or give the output_dir of the run that did",
        )
    return with_adapter(found, model, device).eval(), tokenizer, labels


@dataclass
class HeadPredictor:
    """A model with a head of its own.

    Args:
        model, tokenizer, labels: what `load_head` returned.
        head: what `head_of` returned.
        settings: of the run that made it, which say how long a row may be.
        batch_size: examples at a time.
        max_new_tokens: of an encoder-decoder's answer.
    """

    model: Any
    tokenizer: Any
    labels: Sequence[str]
    head: Head
    settings: RunConfig
    batch_size: int = 8
    max_new_tokens: int = 64

    def predict(self, examples: Sequence[Example], on_answers: OnAnswers | None = None) -> list[Answer]:
        """Answer each example; see `predicting.Predictor`."""
        found: list[Answer] = []
        unanswerable = self.head.kind == "question_answering" and not all(map(right_answers, examples))
        for start in range(0, len(examples), self.batch_size):
            batch, begin = examples[start : start + self.batch_size], time.perf_counter()
            part = self.part(batch)
            given = (self.batch_size, self.max_new_tokens, unanswerable)
            said = head_scores.predictions_of(self.head, part, self.model, self.tokenizer, *given)
            seconds = (time.perf_counter() - begin) / len(batch)
            read = np.bincount(part.owners, [len(row["input_ids"]) for row in part.rows], len(batch))
            answers = [
                Answer(
                    self._read(e, prediction), self._text(prediction), int(count), self._written(prediction), seconds
                )
                for e, prediction, count in zip(batch, said, read, strict=True)
            ]
            if on_answers is not None:
                on_answers(list(range(start, start + len(batch))), answers)
            found += answers
        return found

    def part(self, examples: Sequence[Example]) -> Part:
        """The examples as the model's rows.

        Args:
            examples: of one of the head's tasks.
        """
        return head_part(examples, self.tokenizer, self.settings, self.head, self.labels)

    def losses(self, examples: Sequence[Example], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The model's loss on each example.

        Args:
            examples: of one of the head's tasks.
            seed: of the words that are masked, for a head that guesses them.

        Returns:
            Sum of -log p over each example's labels, float64 [examples]; and their number, int64 [examples].
        """
        part = self.part(examples)
        rows: Any = part.rows
        if self.head.kind == "masked_lm":
            rows = MaskedRows(part.rows, self.tokenizer, self.settings.mlm_probability, seed, fixed=True)
        collator = collator_of(self.head, self.tokenizer, self.model)
        device = next(self.model.parameters()).device
        losses, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
        with answering(self.model):
            for start in range(0, len(part.rows), self.batch_size):
                places = range(start, min(start + self.batch_size, len(part.rows)))
                batch = collator([rows[at] for at in places])
                labels = batch.pop("labels").to(device)
                inputs = {name: value.to(device) for name, value in batch.items() if name != "num_tokens"}
                logits = head_logits(self.model(**inputs), inputs["attention_mask"])
                counted = labels.ne(IGNORED)
                each = torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
                owners = np.array([part.owners[places[int(row)]] for row in counted.nonzero()[:, 0]], dtype=np.int64)
                losses += np.bincount(owners, each.double().cpu().numpy(), len(examples))
                counts += np.bincount(owners, minlength=len(examples))
        return losses, counts

    def _read(self, example: Example, prediction: Any) -> Any:
        """An encoder-decoder writes tags as lines of words."""
        if self.head.kind == "seq2seq_lm" and example.format == "token_classification":
            return tags_of_answer(example.fields["tokens"], prediction)
        return prediction

    def _text(self, prediction: Any) -> str:
        return prediction if isinstance(prediction, str) else json.dumps(prediction, ensure_ascii=False)

    def _written(self, prediction: Any) -> int:
        """Tokens that were written, the end included; a head that writes none has none."""
        if self.head.kind != "seq2seq_lm":
            return 0
        return len(self.tokenizer(prediction, add_special_tokens=False)["input_ids"]) + 1


def settings_of(found: Found) -> RunConfig:
    """The configuration of the run that made a model; of one that none made the defaults.

    Args:
        found: what `using.find_model` returned.

    Returns:
        The configuration, which says how long a row may be.

    Example:
        >>> settings_of(find_model("runs/first")).max_length  # doctest: +SKIP
        128
    """
    return found.run or _settings(found)


def _settings(found: Found) -> RunConfig:
    longest = min(found.positions or 512, 512)
    return RunConfig(model_name_or_path=found.base, train_file="-", output_dir="-", max_length=longest)

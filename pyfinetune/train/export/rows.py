"""The rows on which an export is held against what it was made from: the run's held-out ones, or fixed texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.saved import Saved

_ROWS, _TOKENS = 8, 128
_LOGITS = 1 << 26  # of all rows together: 512 MiB in float64
TEXTS = (
    "The ferry left the harbour at half past six, and nobody on board had thought to ask where it was going.",
    "Write a short note to a neighbour who kindly watered the plants while you were away.",
    "def mean(values):\n    if not values:\n        raise ValueError\n    return sum(values) / len(values)\n",
    "17 + 25 = 42, 3 * 9 = 27, and 100 / 8 = 12.5; so the three results add up to 81.5.",
    "Die Brücke wurde 1906 gebaut und ist heute für Autos gesperrt.",
    'Summarise in one sentence: {"city": "Oslo", "rain_mm": [12, 0, 3], "sunny": false}',
    "She read the letter twice, folded it, and put it back into the drawer as if it had never been opened.",
    "What is the capital of Peru? The capital of Peru is Lima.",
)


@dataclass(frozen=True, eq=False)
class ProofRow:
    """One row that both models are given.

    Args:
        name: file and row it came from, as messages carry it.
        inputs: what the model is called with, each int64 [1, length].
        labels: int64 [1, length], -100 where nothing is learned; None where the model is no language model.
    """

    name: str
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor | None

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs on a device."""
        return {key: value.to(device) for key, value in self.inputs.items()}


def proof_rows(saved: Saved, tokenizer: Any, config: Any, generates: bool) -> tuple[list[ProofRow], str]:
    """Choose the rows.

    Args:
        saved: what is exported.
        tokenizer: its tokenizer.
        config: the model's configuration.
        generates: whether it is a language model, so that its rows have labels.

    Returns:
        At most 8 rows of at most 128 tokens, and in words where they are from.

    Raises:
        UserError: the tokenizer makes ids that the model has no embeddings for.

    Example:
        >>> proof_rows(saved, tokenizer, model.config, True)[1]  # doctest: +SKIP
        "8 of the run's held-out rows"
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or len(tokenizer)
    found, reason = _of_run(saved, tokenizer) if saved.record is not None else (None, "no run.json beside it")
    if found:
        rows, words = found
    else:
        rows = [(f"fixed text {i}", tokenizer(text)["input_ids"], None) for i, text in enumerate(TEXTS, start=1)]
        words = f"{len(rows)} fixed texts ({reason})"
    longest = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    longest = max(2, min(longest, _LOGITS // (vocabulary * max(len(rows), 1))))
    made = [_row(name, ids[:longest], learned and learned[:longest], config, generates) for name, ids, learned in rows]
    made = [row for row in made if row.inputs["input_ids"].shape[1] > 1]
    if not made:
        raise UserError("export: the tokenizer makes no token of any row", fix="save the model's own tokenizer with it")
    highest = max(int(row.inputs["input_ids"].max()) for row in made)
    if highest >= vocabulary:
        raise UserError(
            f"export: the tokenizer makes token id {highest}, and the model has {vocabulary} embeddings",
            fix="save the tokenizer that the model was trained with beside it",
        )
    return made, words


def _row(name: str, ids: Sequence[int], learned: Sequence[bool] | None, config: Any, generates: bool) -> ProofRow:
    tokens = torch.tensor([list(ids)], dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id or 0
        inputs["decoder_input_ids"] = torch.cat([torch.full((1, 1), start), tokens[:, :-1]], dim=1)
        return ProofRow(name, inputs, tokens if generates else None)
    if not generates:
        return ProofRow(name, inputs, None)
    keep = torch.ones_like(tokens, dtype=torch.bool) if learned is None else torch.tensor([list(learned)])
    labels = tokens.masked_fill(~keep, -100)
    return ProofRow(name, inputs, labels if (labels[:, 1:] != -100).any() else tokens)


def _of_run(saved: Saved, tokenizer: Any) -> tuple[tuple[list, str] | None, str]:
    """Rows of the run, held out where it held some out; or the reason why they cannot be had."""
    from pyfinetune.train.data.reading import read_data
    from pyfinetune.train.data.tokenizing import tokenize
    from pyfinetune.train.repeat import config_of

    try:
        config = config_of(saved.record, str(saved.folder / "run.json"))
        data = read_data(config)
        examples, words = (data.held_out, "held-out") if data.held_out else (data.train, "training")
        examples = examples[: 4 * _ROWS]
        head = (saved.record.get("head") or {}).get("kind", "causal_lm")
        if head == "causal_lm":
            documents = tokenize(examples, tokenizer, config.max_length, config.completion_only_loss).documents
            rows = [(d.place, d.input_ids.tolist(), d.learned.tolist()) for d in documents]
        else:  # the texts will do: what is compared is two models, not a model with an answer
            rows = [(e.place, tokenizer(_text_of(e))["input_ids"], None) for e in examples]
    except UserError as error:
        return None, f"the run's data cannot be read: {error.message[:200]}"
    rows = [row for row in rows if len(row[1]) > 1][:_ROWS]
    if not rows:
        return None, "the run's rows are empty"
    return (rows, f"{len(rows)} of the run's {words} rows"), ""


def _text_of(example: Any) -> str:
    """All that an example says, whatever its task."""
    from pyfinetune.train.data.cleaning import content_of

    values = [" ".join(map(str, value)) if isinstance(value, list) else value for value in example.columns.values()]
    return content_of(example) or " ".join(value for value in values if isinstance(value, str))

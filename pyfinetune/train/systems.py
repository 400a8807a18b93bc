"""The systems of a comparison: a model with a way to ask it, and the models behind them, loaded when first needed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.checked_yaml import nearest
from pyfinetune.train.compare_config import CompareConfig, OtherModel, Price
from pyfinetune.train.formats import Example
from pyfinetune.train.head_predicting import head_of, load_head
from pyfinetune.train.heads import HEADS, Head
from pyfinetune.train.prompts import Style
from pyfinetune.train.tokenizing import load_head_tokenizer, load_tokenizer
from pyfinetune.train.using import Found, find_model, load_for_use, tokenizer_of


@dataclass(frozen=True)
class System:
    """A model and a way to ask it.

    Args:
        name: what to call it.
        kind: `base`, `tuned` or `other`.
        model: the model's part of the name; systems of one model share it in memory.
        found: where that model is.
        style: how it is asked.
        price: what its answers cost, or None.
        chat_template: as of `tokenizing.load_tokenizer`.
        eos_token: the end token, for a tokenizer that names none.
        head: of the model; only a causal language model is prompted.
    """

    name: str
    kind: str
    model: str
    found: Found
    style: Style
    price: Price | None = None
    chat_template: str = "auto"
    eos_token: str | None = None
    head: Head = HEADS["causal_lm"]

    @property
    def is_prompted(self) -> bool:
        """Whether the prompt is all that tells its model what is wanted."""
        return self.found.run is None and self.head.kind == "causal_lm"


class LoadedModel:
    """A model that is loaded when it is first asked for, and not at all where every answer is there.

    Args:
        found: where it is.
        system: one of the systems that it is part of.
        device: where it goes.
    """

    def __init__(self, found: Found, system: System, device: torch.device):
        self.found, self.system, self.device = found, system, device
        self.identity = found.identity()
        self._model: Any = None
        self._labels: tuple[str, ...] = ()
        self._tokenizers: dict[str, Any] = {}

    @property
    def model(self) -> Any:
        """The model."""
        if self._model is None and self.system.head.kind == "causal_lm":
            self._model = load_for_use(self.found, self.device)
        elif self._model is None:
            self._model, _, self._labels = load_head(self.found, self.system.head, self.device)
        return self._model

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes of the model's head."""
        return self._labels if self.model is not None else ()

    def tokenizer(self, data_format: str) -> Any:
        """The tokenizer.

        Args:
            data_format: what `formats.recognise` says of the rows.
        """
        if data_format not in self._tokenizers:
            if self.system.head.kind != "causal_lm":
                self._tokenizers[data_format] = load_head_tokenizer(self.found.path)
            elif self.system.kind == "base":
                given = (self.found.base, self.system.chat_template, self.system.eos_token, data_format)
                self._tokenizers[data_format] = load_tokenizer(*given)
            else:
                self._tokenizers[data_format] = tokenizer_of(self.found, data_format, self.system.chat_template)
        return self._tokenizers[data_format]

    def release(self) -> None:
        """Give the model's memory back, for the next one."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def systems_of(config: CompareConfig, tuned: Found, task: str, examples: Sequence[Example]) -> list[System]:
    """The systems of a comparison.

    Args:
        config: its configuration.
        tuned: the fine-tuned run.
        task: of the rows.
        examples: the rows, by which a model that no run made is known to have a head of its own.

    Returns:
        The base model with each prompt, with fixed and with retrieved examples; the tuned model; the others.

    Raises:
        UserError: one of the other models is not there, or nothing can be prompted.

    Example:
        >>> [system.name for system in systems_of(config, tuned, "sft", examples)]  # doctest: +SKIP
        ['base, plain', 'base, few-shot (4 examples)', 'base, retrieved (4 examples)', 'tuned']
    """
    run, prompts = tuned.run, config.prompts_for(task)
    head, first = head_of(tuned, examples), next(iter(prompts.values()))
    systems = []
    if head.kind == "causal_lm":
        base = Found(run.model_name_or_path, run.model_name_or_path, method=run.method)
        styles = [Style(name, template) for name, template in prompts.items()]
        systems += [
            System(f"base, {s.name}", "base", "base", base, s, config.price, run.chat_template, run.eos_token)
            for s in [*styles, *_with_examples(first, config.few_shot, config.retrieved)]
        ]
    systems.append(System("tuned", "tuned", "tuned", tuned, Style("as trained"), config.price, head=head))
    for other in config.models:
        systems += _others(config, other, prompts, examples)
    if not any(system.kind == "base" or system.is_prompted for system in systems):
        raise UserError(
            f"run: {config.run} has a head ({head.kind}), so its base cannot be prompted, and nothing else is",
            fix="name a causal language model to compare it with under models:",
        )
    return systems


def _others(
    config: CompareConfig, other: OtherModel, prompts: dict[str, str], examples: Sequence[Example]
) -> list[System]:
    """The systems of one of the other models."""
    found = find_model(other.model_name_or_path)
    head = head_of(found, examples)
    for name in other.prompts:
        if name not in prompts:
            hint = nearest(name, prompts) or f"there are {', '.join(prompts)}"
            raise UserError(f"models: {other.label}: no prompt is called {name!r}", fix=hint)
    first = next(iter(prompts.values()))
    styles = [Style(name, prompts[name]) for name in other.prompts]
    styles += _with_examples(first, other.few_shot, other.retrieved)
    if styles and head.kind != "causal_lm":
        raise UserError(
            f"models: {other.label}: has a head ({head.kind}), which reads no prompt",
            fix="leave its prompts, few_shot and retrieved out",
        )
    # A model that was fine-tuned is asked as it was trained, where nothing else is said.
    alone = not styles and (found.run is not None or head.kind != "causal_lm")
    price = other.price or config.price
    return [
        System(
            other.label if alone else f"{other.label}, {style.name}",
            "other",
            f"other {other.label}",
            found,
            style,
            price,
            other.chat_template,
            head=head,
        )
        for style in styles or [Style("as trained" if alone else "plain")]
    ]


def _with_examples(template: str, few_shot: int, retrieved: int) -> list[Style]:
    styles = []
    for count, choice, name in ((few_shot, "fixed", "few-shot"), (retrieved, "similar", "retrieved")):
        if count:
            words = f"{count} example{'s' if count > 1 else ''}"
            styles.append(Style(f"{name} ({words})", template, count, choice))
    return styles

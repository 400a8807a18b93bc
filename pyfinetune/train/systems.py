"""The systems of a comparison: a model with a way to ask it, and the models behind them, loaded when first needed."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.checked_yaml import nearest
from pyfinetune.train.compare_config import QUESTION, CompareConfig, Price
from pyfinetune.train.prompts import Style
from pyfinetune.train.tokenizing import load_tokenizer
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
    """

    name: str
    kind: str
    model: str
    found: Found
    style: Style
    price: Price | None = None
    chat_template: str = "auto"
    eos_token: str | None = None

    @property
    def is_prompted(self) -> bool:
        """Whether its model was not tuned by a run: the prompt is all that tells it what is wanted."""
        return self.found.run is None


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
        self._tokenizers: dict[str, Any] = {}

    @property
    def model(self) -> Any:
        """The model."""
        if self._model is None:
            self._model = load_for_use(self.found, self.device)
        return self._model

    def tokenizer(self, data_format: str) -> Any:
        """The tokenizer.

        Args:
            data_format: what `formats.recognise` says of the rows.
        """
        if data_format not in self._tokenizers:
            if self.system.kind == "base":
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


def systems_of(config: CompareConfig, tuned: Found, task: str) -> list[System]:
    """The systems of a comparison.

    Args:
        config: its configuration.
        tuned: the fine-tuned run.
        task: of the rows.

    Returns:
        The base model with each prompt, with fixed and with retrieved examples; the tuned model; the others.

    Raises:
        UserError: one of the other models is not there.

    Example:
        >>> [system.name for system in systems_of(config, tuned, "sft")]  # doctest: +SKIP
        ['base, plain', 'base, few-shot (4 examples)', 'base, retrieved (4 examples)', 'tuned']
    """
    run, prompts = tuned.run, config.prompts_for(task)
    base = Found(run.model_name_or_path, run.model_name_or_path, method=run.method)
    first = next(iter(prompts.values()))
    styles = [Style(name, template) for name, template in prompts.items()]
    styles += _with_examples(first, config.few_shot, config.retrieved)
    systems = [
        System(f"base, {s.name}", "base", "base", base, s, config.price, run.chat_template, run.eos_token)
        for s in styles
    ]
    systems.append(System("tuned", "tuned", "tuned", tuned, Style("as trained", QUESTION), config.price))
    for other in config.models:
        found = find_model(other.model_name_or_path)
        for name in other.prompts:
            if name not in prompts:
                hint = nearest(name, prompts) or f"there are {', '.join(prompts)}"
                raise UserError(f"models: {other.label}: no prompt is called {name!r}", fix=hint)
        named = [Style(name, prompts[name]) for name in other.prompts]
        shots = _with_examples(first, other.few_shot, other.retrieved)
        # A model that was fine-tuned is asked as it was trained, where nothing else is said.
        listed = [*named, *shots] or [Style("as trained" if found.run else "plain", QUESTION)]
        price = other.price or config.price
        systems += [
            System(
                other.label if found.run and len(listed) == 1 else f"{other.label}, {style.name}",
                "other",
                f"other {other.label}",
                found,
                style,
                price,
                other.chat_template,
            )
            for style in listed
        ]
    return systems


def _with_examples(template: str, few_shot: int, retrieved: int) -> list[Style]:
    styles = []
    for count, choice, name in ((few_shot, "fixed", "few-shot"), (retrieved, "similar", "retrieved")):
        if count:
            words = f"{count} example{'s' if count > 1 else ''}"
            styles.append(Style(f"{name} ({words})", template, count, choice))
    return styles

"""A run's first configuration: a dozen lines that train as they are, fitted to a model and a data file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig, parse_config
from pyfinetune.train.data.reading import prepare_rows, read_data
from pyfinetune.train.data.sources import Task
from pyfinetune.train.data.tokenizing import load_tokenizer, tokenize
from pyfinetune.train.heads.kinds import Head, choose_head, may_be_unanswered
from pyfinetune.train.heads.rows import tokenizer_for
from pyfinetune.train.model import check_length, choose_device, read_config

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DATASET = "yahma/alpaca-cleaned"
_LENGTH, _LONGEST = 1024, 4096
_SAMPLE = 2000  # rows whose lengths are looked at
_MANY = 1000  # rows from which packing pays, and from which one epoch is enough to begin with
_FEW = 20  # rows below which none is held out


def starter_yaml(model: str | None = None, data: str | None = None) -> str:
    """Write the configuration of a first run.

    Args:
        model: a causal language model's name or folder; None takes a small public one.
        data: a data file, or the name or folder of a dataset; None takes a public set of instructions.

    Returns:
        YAML text of at most 12 lines. A model or a file that is there is looked at: the length fits the rows, and
        enough rows are held out to tell whether the run helped.

    Raises:
        UserError: the model or the file is not there, or its rows cannot be trained on.

    Example:
        >>> starter_yaml().splitlines()[1]
        'model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    model = model or _MODEL
    origin, rows = _origin(data)
    values: dict[str, Any] = {"model_name_or_path": model, **origin}
    if rows is None or rows >= _FEW:
        values["test_size"] = 0.05 if rows is None or rows >= _MANY else 0.1
    name = re.sub(r"[^\w.-]+", "-", Path(data or _DATASET).name.partition(".")[0]).strip("-") or "first"
    values["output_dir"] = f"runs/{name}"
    head = _head(values) if Path(model).is_dir() and rows is not None else None
    if head is not None and head.kind != "causal_lm":
        return _written(_with_head(values, head))
    values["method"] = "qlora" if choose_device("auto").type == "cuda" else "lora"
    values["max_length"] = _length(values) if Path(model).is_dir() and rows is not None else _LENGTH
    if rows is None or rows >= _MANY:
        values["packing"] = True
    values["trainer"] = {
        "num_train_epochs": 1 if rows is None or rows >= _MANY else 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-4,
    }
    return _written(values)


def _written(values: dict[str, Any]) -> str:
    parse_config(values, source="init")
    written = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)
    return f"# next: pyfinetune check run.yaml, then pyfinetune train run.yaml\n{written}"


def _origin(data: str | None) -> tuple[dict[str, str], int | None]:
    """The key that names the data, and its number of rows where it is a file."""
    if data is None:
        return {"dataset_name": _DATASET}, None
    path = Path(data)
    if path.is_dir():
        return {"dataset_name": data}, None
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not path.suffix:
        return {"dataset_name": data}, None
    found = read_data(RunConfig(model_name_or_path="any", train_file=data, output_dir="any"))
    return {"train_file": data}, len(found.train)


def _head(values: dict[str, Any]) -> Head:
    config = RunConfig(**values)
    return choose_head(config, read_data(config, unanswered=may_be_unanswered(config)).train)


def _with_head(values: dict[str, Any], head: Head) -> dict[str, Any]:
    """Settings for a model with a head: small enough to be trained whole."""
    config = RunConfig(**values)
    data = read_data(config, unanswered=may_be_unanswered(config))
    task = {"text": "pretrain"}.get(data.format, data.format if data.format in get_args(Task) else "sft")
    values = {**values, "task": task, "head": head.kind, "method": "full"}
    tokenizer = tokenizer_for(config, data.format, head)
    most = min(_positions(read_config(config.model_name_or_path)), _LONGEST)
    sample = dataclasses.replace(data, train=data.train[:_SAMPLE], held_out=[])
    longest = prepare_rows(sample, tokenizer, config.model_copy(update={"max_length": most}), head).counts["train"]
    values["max_length"] = max(16, min(-(-longest["longest"] // 16) * 16, most))
    values["trainer"] = {"num_train_epochs": 3, "per_device_train_batch_size": 16}
    return values


def _positions(model_config: Any) -> int:
    return getattr(model_config.get_text_config(), "max_position_embeddings", None) or _LENGTH


def _length(values: dict[str, Any]) -> int:
    """The least multiple of 64 that holds 99 of 100 rows, within what the model can read."""
    config = RunConfig(**values)
    model_config = read_config(config.model_name_or_path)
    data = read_data(config)
    tokenizer = load_tokenizer(config.model_name_or_path, data_format=data.format)
    documents = tokenize(data.train[:_SAMPLE], tokenizer, 2**31 - 1).documents
    longest = int(np.percentile([len(document) for document in documents], 99, method="higher"))
    length = min(max(64, -(-longest // 64) * 64), _LONGEST)
    try:
        check_length(model_config, length, config.model_name_or_path)
    except UserError:
        length = model_config.get_text_config().max_position_embeddings
    return length

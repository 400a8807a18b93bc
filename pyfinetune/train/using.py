"""A trained model to be used: found by its folder or name, whatever `train` or somebody else left there.

path -> find_model -> Found -> load_for_use -> model, tokenizer
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train import manifest
from pyfinetune.train.config import RunConfig
from pyfinetune.train.data import hash_files
from pyfinetune.train.model import load_model, read_config
from pyfinetune.train.repeat import found_from, load_repeat
from pyfinetune.train.tokenizing import load_tokenizer


@dataclass(frozen=True)
class Found:
    """A model that can be loaded.

    Args:
        path: its folder, or its name on the hub.
        base: what its weights are, or what its adapter lies on.
        adapter: whether `path` holds an adapter.
        method: of the run that made it, which decides the type of the weights; `lora` for a plain model.
        run: the configuration of that run, its paths found from here; None where no run made it.
        record: that run's `run.json`.
    """

    path: str
    base: str
    adapter: bool = False
    method: str = "lora"
    run: RunConfig | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def positions(self) -> int | None:
        """Tokens that the model can hold; None where it does not say."""
        return getattr(read_config(self.base).get_text_config(), "max_position_embeddings", None)

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others: name, and SHA-256 of the files or the hub's commit.

        Example:
            >>> find_model("path/to/model").identity()["sha256"][:8]  # doctest: +SKIP
            'c0ffee00'
        """
        facts = manifest.model_identity(self.base, read_config(self.base))
        if self.adapter:
            facts["adapter_sha256"] = hash_files(sorted(Path(self.path).glob("*.safetensors")))
        return facts | {"method": self.method}


def find_model(path: str | Path) -> Found:
    """Find out what a folder or a name holds; no weights are read.

    Args:
        path: the output folder of a run, the folder of an adapter, or a model's folder or name on the hub.

    Returns:
        What there is.

    Raises:
        UserError: a run that is not complete, an adapter that does not say what it lies on, or nothing of the kind.

    Example:
        >>> find_model("runs/first").adapter  # doctest: +SKIP
        True
    """
    folder, name = Path(path), str(path)
    is_adapter = (folder / "adapter_config.json").is_file()
    record = manifest.read_manifest(folder / "run.json") if folder.is_dir() else None
    if record is not None:
        if record.get("status") != "complete" and not (is_adapter or (folder / "config.json").is_file()):
            raise UserError(
                f"{name}: this run is not complete ({record.get('status')}): no weights were saved at its end",
                fix="go on with the same `pyfinetune train` command, or give one of its checkpoint folders",
            )
        config, _ = load_repeat(folder)
        base = config.model_name_or_path if is_adapter else name
        return Found(name, base, is_adapter, config.method, config, record)
    if is_adapter:
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        if not base:
            raise UserError(
                f"{name}: adapter_config.json does not say which model the adapter lies on",
                fix="write its name or folder there as base_model_name_or_path",
            )
        return Found(name, found_from(str(folder.parent), base), adapter=True)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: holds neither a run (run.json), nor an adapter (adapter_config.json), nor a model (config.json)",
            fix="give the output_dir of a run, or the folder that save_pretrained wrote",
        )
    return Found(name, name)


def tokenizer_of(found: Found, data_format: str, chat_template: str = "auto") -> Any:
    """The tokenizer of a model, writing conversations as they were trained on.

    Args:
        found: what `find_model` returned.
        data_format: what `formats.recognise` says of the data; of a run's own model, the run's counts.
        chat_template: as of `tokenizing.load_tokenizer`, for a model that no run made.

    Returns:
        The tokenizer.

    Raises:
        UserError: as `tokenizing.load_tokenizer`.

    Example:
        >>> tokenizer_of(find_model("runs/first"), "alpaca").eos_token  # doctest: +SKIP
        '<|im_end|>'
    """
    if found.run is None:
        where = found.path if (Path(found.path) / "tokenizer_config.json").is_file() else found.base
        return load_tokenizer(where, chat_template, data_format=data_format)
    # What a run saves carries the template that it was trained with, where there was one.
    template = "none" if found.run.chat_template == "none" else "auto"
    trained_on = found.record.get("data", {}).get("format", data_format)
    return load_tokenizer(found.path, template, found.run.eos_token, trained_on)


def load_for_use(found: Found, device: torch.device, dtype: str = "auto") -> Any:
    """Load a causal language model, with its adapter on it.

    Args:
        found: what `find_model` returned.
        device: where to.
        dtype: `auto` or a type's name; see `model.choose_dtype`.

    Returns:
        The model in evaluation mode, with its cache on.

    Raises:
        UserError: as `model.load_model`; or the adapter does not fit the model.

    Example:
        >>> load_for_use(find_model("runs/first"), torch.device("cpu")).training  # doctest: +SKIP
        False
    """
    if found.run is not None and dtype == "auto":
        dtype = found.run.dtype
    model = load_model(found.base, method=found.method, dtype=dtype, device=device)
    model = with_adapter(found, model, device)
    model.config.use_cache = True
    return model.eval()


def with_adapter(found: Found, model: Any, device: torch.device) -> Any:
    """A base model with the adapter that was trained on it.

    Args:
        found: what `find_model` returned.
        model: its base, loaded.
        device: where to.

    Returns:
        The PEFT model; the base itself where there is no adapter.

    Raises:
        UserError: the adapter does not fit the model.

    Example:
        >>> with_adapter(find_model("runs/first"), model, torch.device("cpu"))  # doctest: +SKIP
    """
    if not found.adapter:
        return model
    from peft import LoraConfig, PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(found.path)
    if found.method == "qlora" and isinstance(settings, LoraConfig):
        settings = pf.lora_config(settings)
    try:
        return PeftModel.from_pretrained(model, found.path, config=settings).to(device)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{found.path}: this adapter does not fit {found.base}: {reason}",
            fix="give the adapter's own base model back its place, or train the adapter anew",
        ) from error

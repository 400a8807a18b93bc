"""A trained model to be used: found by its folder or name, whatever `train` or somebody else left there.

path -> find_model -> Found -> load_for_use -> model, tokenizer
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train import manifest
from pyfinetune.train.config import RunConfig
from pyfinetune.train.data.files import hash_files
from pyfinetune.train.data.tokenizing import load_tokenizer
from pyfinetune.train.model import load_model, read_config
from pyfinetune.train.repeat import load_repeat
from pyfinetune.train.saved import find_saved, load_saved


@dataclass(frozen=True)
class Found:
    """A model that can be loaded.

    Args:
        path: its folder, or its name on the hub.
        base: what its weights are, or what its adapter lies on.
        adapter: whether `path` holds an adapter.
        in_4bit: whether `path` holds a whole model in 4 bits.
        method: of the run that made it, which decides the type of the weights; `lora` for a plain model.
        run: the configuration of that run, its paths found from here; None where no run made it.
        record: that run's `run.json`.
    """

    path: str
    base: str
    adapter: bool = False
    in_4bit: bool = False
    method: str = "lora"
    run: RunConfig | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def positions(self) -> int | None:
        """Tokens that the model can hold; None where it does not say."""
        return getattr(read_config(self.base, quantized=True).get_text_config(), "max_position_embeddings", None)

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others: name, and SHA-256 of the files or the hub's commit.

        Example:
            >>> find_model("path/to/model").identity()["sha256"][:8]  # doctest: +SKIP
            'c0ffee00'
        """
        facts = manifest.model_identity(self.base, read_config(self.base, quantized=True))
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
        return Found(name, base, is_adapter, method=config.method, run=config, record=record)
    if is_adapter:
        saved = find_saved(folder)
        return Found(name, saved.base, adapter=True, method="qlora" if saved.in_4bit else "lora")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: holds neither a run (run.json), nor an adapter (adapter_config.json), nor a model (config.json)",
            fix="give the output_dir of a run, or the folder that save_pretrained wrote",
        )
    in_4bit = folder.is_dir() and getattr(read_config(name, quantized=True), "quantization_config", None) is not None
    return Found(name, name, in_4bit=in_4bit)


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
    if is_saved(found):
        return load_saved(find_saved(found.path), device)
    model = load_model(found.base, method=found.method, dtype=dtype, device=device)
    model.config.use_cache = True
    return model.eval()


def is_saved(found: Found) -> bool:
    """Whether a folder says itself how its model is to be loaded: what a run or an export left, or 4-bit weights.

    Args:
        found: what `find_model` returned.

    Returns:
        False for a plain model, and for the base of a run, which is loaded as the run had it.

    Example:
        >>> is_saved(find_model("Qwen/Qwen2.5-0.5B"))  # doctest: +SKIP
        False
    """
    return found.adapter or found.run is not None or found.in_4bit

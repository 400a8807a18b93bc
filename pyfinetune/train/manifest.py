"""`run.json`: what a run was made of and what came of it, and whether an earlier run may be continued.

Written when the training starts (status `running`) and again when it ends (`complete` or `interrupted`).
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train.data import hash_files

_PACKAGES = ("pyfinetune", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")

# What a run may not change between its start and its end; the rest (epochs, spacing, device, ...) may be edited.
_FIXED = (
    "model_name_or_path",
    "train_file",
    "dataset_name",
    "dataset_config_name",
    "dataset_train_split",
    "dataset_test_split",
    "validation_file",
    "test_size",
    "validation_size",
    "group_column",
    "sources",
    "stopping_strategy",
    "replay",
    "clean",
    "columns",
    "sample_by",
    "task",
    "method",
    "max_length",
    "packing",
    "completion_only_loss",
    "chat_template",
    "eos_token",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "seed",
)
_FIXED_TRAINER = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "data_seed")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on.

    Returns:
        Name to version; a package that is not installed is left out.

    Example:
        >>> "torch" in versions()
        True
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_identity(name_or_path: str, config: Any) -> dict[str, Any]:
    """What tells one model's weights from another's.

    Args:
        name_or_path: as the run was given it.
        config: the loaded model's configuration.

    Returns:
        The name, and the SHA-256 of a folder's safetensors files or the hub's commit.

    Example:
        >>> model_identity("path/to/model", model.config)["sha256"][:8]  # doctest: +SKIP
        'c0ffee00'
    """
    identity: dict[str, Any] = {"name_or_path": name_or_path, "type": getattr(config, "model_type", None)}
    folder = Path(name_or_path)
    if folder.is_dir():
        identity["sha256"] = hash_files(sorted(folder.glob("*.safetensors")))
    else:
        identity["commit"] = getattr(config, "_commit_hash", None)
    return identity


def device_name(device: torch.device) -> str:
    """The device in words.

    Args:
        device: a torch device.

    Returns:
        The GPU's name, or the processor's with the number of threads.

    Example:
        >>> device_name(torch.device("cpu")).endswith("threads")
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{pf.info()['cpu']['model']}, {torch.get_num_threads()} threads"


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write `run.json` whole or not at all.

    Args:
        path: the file.
        content: JSON values.

    Example:
        >>> write_manifest(Path("out/run.json"), {"status": "running"})  # doctest: +SKIP
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read `run.json`.

    Args:
        path: the file.

    Returns:
        Its content, or None where there is none.

    Raises:
        UserError: the file is not JSON.

    Example:
        >>> read_manifest(Path("no-such-file")) is None
        True
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON: {error}", fix="choose another output_dir, or delete the file"
        ) from None


def check_same_run(earlier: dict[str, Any] | None, config: dict[str, Any], data_hash: str, output_dir: str) -> None:
    """Check that going on from the checkpoints in a folder would continue the same run.

    Args:
        earlier: the folder's `run.json`.
        config: this run's configuration as `config.config_digest` gives it.
        data_hash: SHA-256 of this run's training data.
        output_dir: the folder.

    Raises:
        UserError: the model, the data or what is learned from them changed; names what.

    Example:
        >>> check_same_run({"config": {"seed": 1}}, {"seed": 1}, "", "out")
    """
    mend = "set another output_dir, or put the value back"
    if earlier is None:
        raise UserError(
            f"output_dir: {output_dir} holds checkpoints but no run.json, so it is not known what they were trained on",
            fix="set another output_dir, or resume: path/to/checkpoint-N to go on from one of them",
        )
    was = earlier.get("config", {})
    changed = [(key, was.get(key), config.get(key)) for key in _FIXED]
    changed += [
        (f"trainer: {key}", was.get("trainer", {}).get(key), config.get("trainer", {}).get(key))
        for key in _FIXED_TRAINER
    ]
    for key, before, now in changed:
        if before != now:
            raise UserError(
                f"output_dir: {output_dir} holds another run: {key} was {before!r} there and is {now!r} now", fix=mend
            )
    hashed = earlier.get("data", {}).get("sha256")
    if hashed is not None and hashed != data_hash:
        raise UserError(
            f"output_dir: {output_dir} holds a run on other training data: the contents of the files changed",
            fix="set another output_dir, or put the data back",
        )

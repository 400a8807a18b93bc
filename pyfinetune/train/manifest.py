"""`run.json`: what a run was made of and what came of it, and whether an earlier run may be continued.

Written when the training starts (status `running`) and again when it ends (`complete` or `interrupted`).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pyfinetune as pf
from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig, config_digest
from pyfinetune.train.data import hash_files
from pyfinetune.train.processes import Batch, batch_of, world_size

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
    "freeze",
    "freeze_every",
    "layerwise_lr_decay",
    "columns",
    "sample_by",
    "task",
    "head",
    "mlm_probability",
    "doc_stride",
    "source_prefix",
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
    "use_dora",
    "use_rslora",
    "num_virtual_tokens",
    "prompt_tuning_init_text",
    "adapter_len",
    "adapter_layers",
    "dropout",
    "seed",
    "global_batch_size",
)
# What the reader of a report looks for first among the Trainer's arguments.
_NOTABLE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "save_steps",
    "eval_steps",
    "logging_steps",
)
# Of these only the product counts, over all processes.
_SHARED_OUT = ("trainer: per_device_train_batch_size", "trainer: gradient_accumulation_steps", "global_batch_size")
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


def describe_run(config: RunConfig, device: torch.device, data: dict[str, Any], model: Any) -> dict[str, Any]:
    """What a run is made of, before it starts.

    Args:
        config: the run's configuration.
        device: where the run is.
        data: digest, format and counts of its rows.
        model: the model as it will be trained.

    Returns:
        The content of `run.json`, but for the kernels and what comes of the run.

    Example:
        >>> describe_run(config, device, data, model)["seed"]  # doctest: +SKIP
        42
    """
    parameters = list(model.parameters())
    held_out = {"held_out_sha256": hash_files(config.validation_files)} if config.validation_files else {}
    return {
        "status": "running",
        "started": now(),
        "versions": versions(),
        "device": device_name(device),
        "machine": _machine(),
        "seed": config.seed,
        "world_size": world_size(),
        "batch": batch_of(config).to_dict(),
        "working_directory": os.getcwd(),
        "config": config_digest(config),
        "model": {
            **model_identity(config.model_name_or_path, model.config),
            "dtype": str(model.config.dtype).removeprefix("torch."),
            "attn_implementation": getattr(model.config, "_attn_implementation", None),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "data": {**data, **held_out},
    }


def notable_arguments(arguments: Any, section: Iterable[str] = ()) -> dict[str, Any]:
    """The Trainer's arguments as they were resolved.

    Args:
        arguments: `TrainingArguments`.
        section: names that the section `trainer:` sets.

    Returns:
        What decides the training, and what was set.

    Example:
        >>> notable_arguments(TrainingArguments("out"))["learning_rate"]  # doctest: +SKIP
        5e-05
    """
    values = arguments.to_dict()
    return {name: values[name] for name in dict.fromkeys([*_NOTABLE, *section]) if name in values}


def compare_runs(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What may keep a repeated run from ending at the same bits.

    Args:
        earlier: `run.json` of the run that is repeated.
        now: what `describe_run` says of this one.

    Returns:
        A warning for each difference, or one sentence saying that there is none.

    Example:
        >>> compare_runs({}, {})
        ['the same data, model, versions and machine as in the run that is repeated']
    """

    def at(record: dict[str, Any], path: str) -> Any:
        for part in path.split("/"):
            record = record.get(part) or {}
        return record or None

    names = {
        "data/sha256": "the training data",
        "data/held_out_sha256": "the held-out data",
        "model/sha256": "the model's weights",
        "model/commit": "the model's commit",
        "kernels/swapped": "the number of modules on fast kernels",
        "device": "the device",
        **{f"machine/{key}": f"the machine's {key}" for key in now.get("machine", {})},
    }
    packages = sorted({*earlier.get("versions", {}), *now.get("versions", {})})
    names |= {f"versions/{name}": f"the version of {name}" for name in packages}
    found = [
        f"warning: {words} differs from the run that is repeated: {at(earlier, path)} there, {at(now, path)} here"
        for path, words in names.items()
        if at(earlier, path) != at(now, path)
    ]
    return found or ["the same data, model, versions and machine as in the run that is repeated"]


def now() -> str:
    """The time, in UTC.

    Returns:
        As ISO 8601, to the second.

    Example:
        >>> now()[-6:]
        '+00:00'
    """
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


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


def check_same_run(
    earlier: dict[str, Any] | None,
    config: dict[str, Any],
    data_hash: str,
    output_dir: str,
    batch: dict[str, int] | None = None,
) -> None:
    """Check that going on from the checkpoints in a folder would continue the same run.

    Args:
        earlier: the folder's `run.json`.
        config: this run's configuration as `config.config_digest` gives it.
        data_hash: SHA-256 of this run's training data.
        output_dir: the folder.
        batch: `processes.Batch` of this run as JSON values. How a step's rows are shared among processes may change,
            their number may not.

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
    # A key that is newer than the record had its default there.
    defaults = {key: field.get_default(call_default_factory=True) for key, field in RunConfig.model_fields.items()}
    was, config = defaults | earlier.get("config", {}), defaults | config
    changed = [(key, was.get(key), config.get(key)) for key in _FIXED]
    changed += [
        (f"trainer: {key}", was.get("trainer", {}).get(key), config.get("trainer", {}).get(key))
        for key in _FIXED_TRAINER
    ]
    first = earlier.get("batch")
    if first and batch:
        _check_batch(first, batch, output_dir)
        changed = [entry for entry in changed if entry[0] not in _SHARED_OUT]
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


def _check_batch(before: dict[str, int], now: dict[str, int], output_dir: str) -> None:
    """Steps of other rows would be another run; a person who changed one key is told of that key."""
    if before["rows"] == now["rows"]:
        return
    per_device, accumulation = before["per_device"], before["accumulation"]
    mend = f"set global_batch_size: {before['rows']}, or start {before['processes']} processes as before"
    if before["processes"] == now["processes"]:
        mend = (
            f"set trainer: per_device_train_batch_size: {per_device} and gradient_accumulation_steps: {accumulation},"
            " or another output_dir"
        )
    raise UserError(
        f"output_dir: {output_dir} holds another run: a step took {Batch.of(before)} there, and takes {Batch.of(now)}"
        " now",
        fix=mend,
    )


def _machine() -> dict[str, Any]:
    facts = pf.info()
    cpu = facts["cpu"]
    found = {
        "platform": facts["platform"],
        "processor": cpu["model"],
        "instruction set": cpu["isa"],
        "cores": cpu["cores"],
        "threads": torch.get_num_threads(),
        "memory, GiB": cpu["memory_gb"],
    }
    return found | ({"GPUs": [str(gpu.get("name", gpu)) for gpu in facts["gpus"]]} if facts["gpus"] else {})

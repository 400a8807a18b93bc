"""`pyfinetune train --from run.json`: the configuration that repeats a run, from the record it left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.config import RunConfig, parse_config
from pyfinetune.train.manifest import read_manifest

_PATHS = ("train_file", "validation_file", "test_file", "model_name_or_path", "dataset_name", "resume")


def load_repeat(path: str | Path, output_dir: str | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Read the configuration of a run that is to be repeated.

    Args:
        path: its `run.json`, or the folder that holds it.
        output_dir: where the repetition goes; None takes the run's own folder with `-repeat` behind it.

    Returns:
        The configuration, whose paths are found from any folder, and the record of the run, for
        `manifest.compare_runs`.

    Raises:
        UserError: the file is no record of a run, or the repetition would go where the run is.

    Example:
        >>> load_repeat("out/run.json")[0].output_dir  # doctest: +SKIP
        '/home/me/out-repeat'
    """
    path = Path(path)
    path = path / "run.json" if path.is_dir() else path
    record = read_manifest(path)
    if record is None:
        raise UserError(f"{path}: no such file", fix="give the run.json of a run's output_dir")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{path}: is no record of a run", fix="give the run.json that `pyfinetune train` wrote")
    values = _values_of(record)
    own = os.path.join(record.get("working_directory", ""), values["output_dir"])
    values["output_dir"] = output_dir or f"{own.rstrip('/')}-repeat"
    if Path(values["output_dir"]).resolve() in (Path(own).resolve(), path.parent.resolve()):
        raise UserError(f"output_dir: {output_dir} is where that run is", fix="give another folder, or none")
    return parse_config(values, source=str(path)), record


def config_of(record: dict[str, Any], source: str) -> RunConfig:
    """The configuration of a run, from the record that it left.

    Args:
        record: the content of its `run.json`.
        source: where that is, for messages.

    Returns:
        The configuration, whose paths are found from any folder.

    Raises:
        UserError: a key or value that this version does not know.

    Example:
        >>> config_of(read_manifest(Path("out/run.json")), "out/run.json").seed  # doctest: +SKIP
        42
    """
    return parse_config(_values_of(record), source=source)


def _values_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record's configuration, every path in it found from any folder."""
    folder = record.get("working_directory", "")
    return _with_paths(folder, {key: value for key, value in record["config"].items() if value is not None})


def _with_paths(folder: str, values: dict[str, Any]) -> dict[str, Any]:
    found = {key: found_from(folder, value) if key in _PATHS else value for key, value in values.items()}
    if found.get("sources"):
        found["sources"] = [_with_paths(folder, source) for source in found["sources"]]
    if found.get("replay"):
        found["replay"] = _with_paths(folder, found["replay"])
    return found


def found_from(folder: str, value: Any) -> Any:
    """A path as it was meant in the folder that a run was started in; names of the hub stay as they are.

    Args:
        folder: that folder.
        value: a path, a list of them, a mapping to them, or a name.

    Returns:
        The same, with each path that is there from that folder joined to it.

    Example:
        >>> found_from("no-such-folder", "Qwen/Qwen2.5-0.5B")
        'Qwen/Qwen2.5-0.5B'
    """
    if isinstance(value, list):
        return [found_from(folder, item) for item in value]
    if isinstance(value, dict):
        return {key: found_from(folder, item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    there = os.path.join(folder, value)
    return there if os.path.exists(there) else value

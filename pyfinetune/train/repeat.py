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
    started_in = record.get("working_directory", "")
    values = {key: value for key, value in record["config"].items() if value is not None}
    for key in _PATHS:
        if key in values:
            values[key] = found_from(started_in, values[key])
    own = os.path.join(started_in, values["output_dir"])
    values["output_dir"] = output_dir or f"{own.rstrip('/')}-repeat"
    if Path(values["output_dir"]).resolve() in (Path(own).resolve(), path.parent.resolve()):
        raise UserError(f"output_dir: {output_dir} is where that run is", fix="give another folder, or none")
    return parse_config(values, source=str(path)), record


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
    if isinstance(value, dict):
        return {key: found_from(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [found_from(folder, item) for item in value]
    there = os.path.join(folder, value)
    return there if os.path.exists(there) else value

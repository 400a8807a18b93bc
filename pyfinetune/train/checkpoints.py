"""Checkpoints on disk: which is the newest that is whole, so that a run goes on from there.

A checkpoint is written in place, file by file; a run that was killed meanwhile leaves one that lacks its last files or
holds half of one. `newest_complete` looks inside without unpickling anything.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from pyfinetune.errors import UserError

_FOLDER = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Checkpoints of a run, whole or not.

    Args:
        output_dir: the run's output folder.

    Returns:
        Step and folder of each, the newest first.

    Example:
        >>> list_checkpoints("no-such-folder")
        []
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_complete(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from.

    Args:
        output_dir: the run's output folder.

    Returns:
        The folder (None when there is none), and for each newer one that was passed over, a sentence saying why.

    Example:
        >>> newest_complete("no-such-folder")
        (None, [])
    """
    skipped = []
    for step, path in list_checkpoints(output_dir):
        flaw = find_flaw(path, step)
        if flaw is None:
            return path, skipped
        skipped.append(f"{path} is incomplete ({flaw}); going back to the one before it")
    return None, skipped


def find_flaw(path: Path, step: int | None = None) -> str | None:
    """What keeps a checkpoint from being resumed.

    Args:
        path: the checkpoint's folder.
        step: the step its name promises, or None not to compare.

    Returns:
        The flaw in a few words, or None when the checkpoint is whole.

    Example:
        >>> find_flaw(Path("no-such-folder"))
        'no trainer_state.json'
    """
    state_file = path / "trainer_state.json"
    if not state_file.is_file():
        return "no trainer_state.json"
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError:
        return "trainer_state.json is cut short"
    if step is not None and state.get("global_step") != step:
        return f"trainer_state.json is of step {state.get('global_step')}"
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        return "no weights"
    for index_file in path.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index_file.name} is cut short"
        absent = shards - {file.name for file in weights}
        if absent:
            return f"no {min(absent)}"
    for file in weights:
        if not _whole_safetensors(file):
            return f"{file.name} is cut short"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (path / name).is_file():
            return f"no {name}"
    for file in sorted(path.glob("*.pt*")):
        # torch.save writes a zip archive, whose table of contents comes last: a file that is cut short has none.
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    return None


def check_resume_path(path: str | Path) -> Path:
    """A checkpoint that the user named, if it can be resumed.

    Args:
        path: the checkpoint's folder.

    Returns:
        The folder.

    Raises:
        UserError: it is not there, or not whole.

    Example:
        >>> check_resume_path("out/checkpoint-500")  # doctest: +SKIP
        PosixPath('out/checkpoint-500')
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"resume: {path}: no such folder", fix="set auto, never, or the path of a checkpoint-N folder")
    flaw = find_flaw(folder)
    if flaw is not None:
        raise UserError(
            f"resume: {path} is not a whole checkpoint: {flaw}", fix="name an older one, or set resume: auto"
        )
    return folder


def _whole_safetensors(file: Path) -> bool:
    """Whether the file is as long as its header says."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 + header_size or header_size == 0:
            return False
        try:
            header = json.loads(stream.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)

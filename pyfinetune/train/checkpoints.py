"""Checkpoints on disk: each is written aside, hashed, forced to the disk and renamed into place, and checked on load.

    out/.saving/checkpoint-40 -> seal -> publish -> out/checkpoint-40 -> rotate
                                                    out/checkpoint-40 -> find_flaw -> resume

A folder that bears a checkpoint's name is therefore whole, whatever killed the run; `checksums.json` inside it holds
the SHA-256 of every file, so that what happened to it afterwards is found before anything is loaded from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.data import hash_files

CHECKSUMS = "checksums.json"
SAVING = ".saving"  # where a checkpoint is while it is being written
_REPLACED = ".replaced"  # where one goes whose place is taken, or which is deleted
_FOLDER = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("trainer_state.json", "scheduler.pt")
# What FSDP writes: the weights and the optimizer's state, whole (.bin) or in pieces (a folder).
_SHARED_WEIGHTS, _SHARED_STATE = "pytorch_model_fsdp", "optimizer"


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
        skipped.append(f"{path} is damaged ({flaw}); going back to the one before it")
    return None, skipped


def find_flaw(path: Path, step: int | None = None) -> str | None:
    """What keeps a checkpoint from being resumed; reads every byte of it.

    Args:
        path: the checkpoint's folder.
        step: the step its name promises, or None not to compare.

    Returns:
        The flaw in a few words, or None when the checkpoint is whole and as it was saved.

    Example:
        >>> find_flaw(Path("no-such-folder"))
        'no checksums.json'
    """
    try:
        sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in sums["files"].items()}
        sealed_step = sums["step"]
    except FileNotFoundError:
        return f"no {CHECKSUMS}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {' '.join(str(error).split())[:100]}"
    present = _files_of(path)
    shared = _is_shared(files)
    for name in [*files, *_NEEDED, *([] if shared else ["optimizer.pt"])]:
        if name not in present:
            return f"no {name}"
    if not (shared or any(name.endswith(".safetensors") for name in files)):
        return "no weights"
    for name in present:
        if name not in files:
            return f"{name} was not there when it was saved"
    if step is not None and sealed_step != step:
        return f"{CHECKSUMS} is of step {sealed_step}"
    for name, (size, digest) in files.items():
        flaw = _find_change(path, name, size, digest)
        if flaw is not None:
            return flaw
    return None


def check_kind(folder: Path, sharded: bool) -> None:
    """Check that a run can read what a checkpoint was written with.

    Args:
        folder: a whole checkpoint.
        sharded: whether the run's weights are spread over its processes (FSDP).

    Raises:
        UserError: they are in the checkpoint and not in the run, or the other way round.

    Example:
        >>> check_kind(Path("out/checkpoint-40"), sharded=False)  # doctest: +SKIP
    """
    if _is_shared(_files_of(folder)) == sharded:
        return
    how, mend = ("without FSDP", "leave FSDP out") if sharded else ("under FSDP", "start the run under FSDP as before")
    raise UserError(
        f"resume: {folder} was written {how}, and its optimizer's state is stored in another way",
        fix=f"{mend}, in any number of processes, or set another output_dir",
    )


def check_resume_path(path: str | Path) -> Path:
    """A checkpoint that the user named, if it can be resumed.

    Args:
        path: the checkpoint's folder.

    Returns:
        The folder.

    Raises:
        UserError: it is not there, or not whole, or not as it was saved.

    Example:
        >>> check_resume_path("out/checkpoint-500")  # doctest: +SKIP
        PosixPath('out/checkpoint-500')
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"resume: {path}: no such folder", fix="set auto, never, or the path of a checkpoint-N folder")
    match = _FOLDER.fullmatch(folder.resolve().name)
    flaw = find_flaw(folder, int(match[1]) if match else None)
    if flaw is not None:
        raise UserError(
            f"resume: {path} is not a whole checkpoint: {flaw}", fix="name an older one, or set resume: auto"
        )
    return folder


def seal(folder: Path, step: int) -> None:
    """Write a checkpoint's `checksums.json` and force all of its files to the disk.

    Args:
        folder: the checkpoint, with all of its files.
        step: optimizer steps done.

    Raises:
        OSError: the disk is full, or worse.

    Example:
        >>> seal(Path("out/.saving/checkpoint-40"), 40)  # doctest: +SKIP
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hash_files([folder / name])}
        for name in sorted(_files_of(folder))
    }
    (folder / CHECKSUMS).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    sync(folder)


def publish(staged: Path, final: Path) -> None:
    """Give a sealed checkpoint its name, in one step that either happens or does not.

    Args:
        staged: the sealed folder.
        final: its place, on the same file system; a folder that is there already makes room.

    Example:
        >>> publish(Path("out/.saving/checkpoint-40"), Path("out/checkpoint-40"))  # doctest: +SKIP
    """
    if final.exists():
        _put_aside(final, "moved")
    os.rename(staged, final)
    _sync_one(final.parent)
    clear_leftovers(final.parent)


def rotate(output_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete old checkpoints beyond the limit, never the newest nor the best.

    Args:
        output_dir: the run's output folder.
        limit: how many may stay; None or less than 1 keeps all.
        newest: the checkpoint that was just written whole. What bears a later step is left over from before the run
            went back to an older one, and goes first.
        best: the checkpoint with the best held-out loss, or None.

    Example:
        >>> rotate(Path("out"), 3, Path("out/checkpoint-40"), None)  # doctest: +SKIP
    """
    if limit is None or limit < 1:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    found = list_checkpoints(output_dir)
    now = int(newest.name.rsplit("-", 1)[-1])
    later = [path for step, path in found if step > now]
    earlier = [path for step, path in reversed(found) if step <= now]
    surplus = len(found) - max(limit, len(kept))
    for path in [path for path in (*later, *earlier) if path.resolve() not in kept][: max(surplus, 0)]:
        _put_aside(path, "deleted")
    clear_leftovers(output_dir)


def clear_leftovers(output_dir: Path) -> None:
    """Finish what a killed run had begun: put back a checkpoint whose place was never taken, delete half-written ones.

    Args:
        output_dir: the run's output folder; it need not exist.

    Example:
        >>> clear_leftovers(Path("no-such-folder"))
    """
    shutil.rmtree(output_dir / SAVING, ignore_errors=True)
    aside = output_dir / _REPLACED
    if aside.is_dir():
        for path in aside.iterdir():
            place = output_dir / path.name.partition(".")[0]
            if path.name.endswith(".moved") and not place.exists():
                os.rename(path, place)
        shutil.rmtree(aside, ignore_errors=True)


def sync(folder: Path) -> None:
    """Force a folder, with all that is in it, to the disk.

    Args:
        folder: the folder.

    Example:
        >>> sync(Path("out/checkpoint-40"))  # doctest: +SKIP
    """
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def sync_files(folder: Path) -> None:
    """Force the files of a folder, but not what is in its subfolders, to the disk.

    Args:
        folder: the folder.

    Example:
        >>> sync_files(Path("out"))  # doctest: +SKIP
    """
    for path in folder.iterdir():
        if path.is_file():
            _sync_one(path)
    _sync_one(folder)


def _put_aside(checkpoint: Path, why: str) -> None:
    """Take a checkpoint's name from it in one step, so that no half-deleted folder ever bears one."""
    aside = checkpoint.parent / _REPLACED
    aside.mkdir(exist_ok=True)
    os.rename(checkpoint, aside / f"{checkpoint.name}.{why}")


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_shared(files: Iterable[str]) -> bool:
    """Whether FSDP wrote a checkpoint."""
    names = {name.partition("/")[0] for name in files}
    return any(name.startswith(_SHARED_WEIGHTS) for name in names) and any(
        name.startswith(_SHARED_STATE) and name != "optimizer.pt" for name in names
    )


def _files_of(folder: Path) -> list[str]:
    """Paths of all files below a folder, but for its checksums."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [name for name in found if name != CHECKSUMS]


def _find_change(folder: Path, name: str, size: int, digest: str) -> str | None:
    try:
        now = (folder / name).stat().st_size
        if now != size:
            return f"{name} is cut short: {now:,} of {size:,} bytes" if now < size else f"{name} has grown"
        found = hash_files([folder / name])
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found == digest:
        return None
    for _, other in list_checkpoints(folder.parent):
        if other.name != folder.name and _sealed_digest(other, name) == found:
            return f"{name} is that of {other.name}"
    return f"{name} has changed since it was saved: its SHA-256 differs"


def _sealed_digest(checkpoint: Path, name: str) -> Any:
    try:
        return json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))["files"][name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None

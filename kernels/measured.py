"""Files of measured launch configurations: kernels/measured.json, and those that users have measured on their own GPU.

    {"entries": [{"kernel": "rms_norm_fwd", "capability": 90, "shape": {"itemsize": 2, "cols": 4096, "residual": 0},
                  "blocks": {"BLOCK_M": 1, "BLOCK_N": 4096}, "num_warps": 8, "num_stages": 1, "ms": 0.021,
                  "on": "NVIDIA H100 80GB HBM3, torch 2.13.0, triton 3.9.0"}]}

`ms` and `on` are for readers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FIELDS = {"kernel": str, "capability": int, "shape": dict, "blocks": dict, "num_warps": int, "num_stages": int}
Key = tuple[str, int, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class Entry:
    """One entry of a file, with its place in it."""

    file: Path
    number: int
    kernel: str
    capability: int
    shape: dict[str, int]
    launched: dict[str, Any]

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.file}: entry {self.number} ({self.kernel} on sm_{self.capability}, {shape})"


def shape_key(items: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """A class of shapes whatever the order of its names."""
    return tuple(sorted(items))


def read(path: Path) -> dict[Key, Entry]:
    """A file's entries by kernel, capability and shape.

    Raises:
        ValueError: the file holds no such entries; says which one, and what is wrong.
    """
    table: dict[Key, Entry] = {}
    for number, made in enumerate(_entries(path), 1):
        entry = _entry(path, number, made)
        key = entry.kernel, entry.capability, shape_key(entry.shape.items())
        if key in table:
            raise ValueError(f"{entry}: the same as entry {table[key].number}")
        table[key] = entry
    return table


def _entries(path: Path) -> list:
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(made, dict) or not isinstance(made.get("entries"), list):
        raise ValueError(f'{path}: needs an object with a list "entries"')
    return made["entries"]


def _entry(path: Path, number: int, made: Any) -> Entry:
    if not isinstance(made, dict):
        raise ValueError(f"{path}: entry {number} is no object")
    for name, kind in _FIELDS.items():
        if not isinstance(made.get(name), kind) or isinstance(made[name], bool):
            raise ValueError(f"{path}: entry {number} ({made.get('kernel')}): needs {name!r}, {_named(kind)}")
    for name in ("shape", "blocks"):
        for key, value in made[name].items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{path}: entry {number} ({made['kernel']}): {name}.{key} is {value!r}, no integer")
    launched = {name: made[name] for name in ("blocks", "num_warps", "num_stages")}
    return Entry(path, number, made["kernel"], made["capability"], made["shape"], launched)


def _named(kind: type) -> str:
    return {str: "a text", int: "an integer", dict: "an object of integers"}[kind]


def write(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add entries to a file, in the place of what it holds for the same kernel, capability and shape.

    The file is replaced as a whole, so that a reader never sees half of it.

    Raises:
        ValueError: the file is there and holds no such table.
    """
    found = {"entries": []}
    if path.exists():
        read(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    merged = {_key(entry): entry for entry in [*found["entries"], *entries]}
    found["entries"] = sorted(merged.values(), key=_key)
    text = json.dumps({**found, "entries": []}, indent=2, ensure_ascii=False)
    lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in found["entries"])
    text = text.replace('"entries": []', f'"entries": [\n{lines}\n  ]' if lines else '"entries": []')
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def _key(entry: dict[str, Any]) -> Key:
    return entry["kernel"], entry["capability"], shape_key(entry["shape"].items())

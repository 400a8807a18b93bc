"""Answers kept as they come, one JSON object a line, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyfinetune.train.report.curves import read_metrics


class AnswerCache:
    """The records of one file, by key; a line that a kill cut short is passed over.

    Args:
        path: the file, which need not be there yet.

    Example:
        >>> AnswerCache(Path("no-such-folder/answers.jsonl")).get("0") is None
        True
    """

    def __init__(self, path: Path):
        self.path = path
        self._records = {record["key"]: record for record in read_metrics(path) if "key" in record}

    def get(self, key: str) -> dict[str, Any] | None:
        """A record.

        Args:
            key: as `digest` makes it.

        Returns:
            The record; of several the last one, and None where there is none.
        """
        return self._records.get(key)

    def add(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Append records, on the disk when this returns.

        Args:
            records: key to what is kept under it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # the end of a line that a kill cut short
                    file.write(b"\n")
            for key, record in records.items():
                line = {"key": key, **record}
                self._records[key] = line
                file.write((json.dumps(line, ensure_ascii=False, default=str) + "\n").encode())
            file.flush()


def digest(*parts: Any) -> str:
    """A key of whatever decides an answer.

    Args:
        parts: JSON values.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> digest("model", [1, 2]) == digest("model", [1, 2]), len(digest())
        (True, 32)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_name(name: str) -> str:
    """A system's name as the name of a file.

    Args:
        name: any text.

    Returns:
        Letters, digits and dashes of it; names that differ elsewhere get different files.

    Example:
        >>> file_name("base, plain")
        'base-plain'
    """
    plain = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-")[:80]
    simple = re.sub(r", | ", "-", name)
    return plain if plain == simple else f"{plain or 'system'}-{digest(name)[:6]}"

"""What is wrong with rows that are well formed: repeated ones, nearly repeated ones, and text that was decoded wrongly.

Everything here is deterministic and linear in time and memory. Near-duplicates are found by MinHash (Broder, 1997): a
row is the set of its shingles (three words in a row), 64 hash functions keep the least value each, and rows that agree
on one of 16 bands of 4 are compared exactly:

    similarity(a, b) = |a ∩ b| / |a ∪ b|,  rows from 0.8 on are near-duplicates
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyfinetune.train.data.formats import Example

THRESHOLD = 0.8
_SHINGLE = 3
_HASHES, _BANDS = 64, 16
_NEIGHBOURS = 4  # earlier rows of a band's bucket that a row is compared with
_BLOCK = 1 << 14  # shingles hashed at a time, so that one huge row costs no more memory than its text
_SURE = 0.15  # how far the estimate from the hashes may lie below the similarity

# Words, and signs that tell one formula from another; Chinese, Japanese and Korean writing goes character by character.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s.,!?;:'\"]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# UTF-8 read as another encoding: of Latin, Cyrillic and Greek letters (two bytes), punctuation, Chinese and Japanese
# writing (three), emoji (four). Spaces and guillemets after an accented capital are real French, and left out.
_DOUBLE = re.compile(
    rb"\xc2[\x80-\xbf]|[\xc3\xce-\xd1][\x80-\x9f\xa1-\xaa\xac-\xba\xbc-\xbf]"
    rb"|[\xe2-\xe9\xef][\x80-\x9f\xa1-\xaa\xac-\xba\xbc-\xbf]{2}|\xf0[\x90-\xbf][\x80-\xbf]{2}"
)


@dataclass
class Finding:
    """Rows that share a fault.

    Args:
        kind: `missing`, `empty`, `roles`, `mojibake`, `duplicate`, `near_duplicate` or `leak`.
        part: `train`, `validation` or `test`: where the rows are.
        rows: place of each, with the place of the row that it repeats or what it shows.
        dropped: whether the rows were left out.
    """

    kind: str
    part: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    dropped: bool = False

    def to_dict(self, most: int = 20) -> dict[str, Any]:
        """JSON values of a finding.

        Args:
            most: rows listed; all of them are counted.

        Returns:
            Its fields, with `count`.

        Example:
            >>> Finding("empty", "train", [("a.json, row 3", "")]).to_dict()["count"]
            1
        """
        rows = [{"row": place, "detail": detail} for place, detail in self.rows[:most]]
        return {"kind": self.kind, "part": self.part, "count": len(self.rows), "dropped": self.dropped, "rows": rows}


def content_of(example: Example) -> str:
    """What an example says, as one text.

    Args:
        example: any example.

    Returns:
        The text, or the messages' contents with their roles.

    Example:
        >>> content_of(Example("f, row 1", "text", text="once"))
        'once'
    """
    if not example.messages:
        return example.text
    return "\n".join(f"{message['role']}: {_plain(message)}" for message in example.messages)


def question_of(example: Example) -> str:
    """What an example asks of a task whose answer follows from the question alone; empty for other formats.

    Args:
        example: any example.

    Returns:
        The question, or an empty text.

    Example:
        >>> question_of(Example("f, row 1", "text", text="once"))
        ''
    """
    return _plain(example.messages[0]) if example.fields and example.messages else ""


def exact_duplicates(contents: Iterable[str]) -> dict[int, int]:
    """Rows that say what an earlier one says; space around words does not count.

    Args:
        contents: what each row says; empty ones are passed over.

    Returns:
        Index of each repeated row to the index of the first that says the same.

    Example:
        >>> exact_duplicates(["a b", "c", "a  b"])
        {2: 0}
    """
    first: dict[bytes, int] = {}
    repeated = {}
    for index, content in enumerate(contents):
        if content:
            digest = hashlib.blake2b(" ".join(content.split()).encode("utf-8", "surrogatepass"), digest_size=16)
            earlier = first.setdefault(digest.digest(), index)
            if earlier != index:
                repeated[index] = earlier
    return repeated


def near_duplicates(contents: Sequence[str], threshold: float = THRESHOLD, since: int = 0) -> dict[int, int]:
    """Rows that say nearly what an earlier one says, exact repetitions included.

    Args:
        contents: what each row says; rows without a single word are like no other.
        threshold: the least share of common shingles, 0 to 1.
        since: compare only rows from this index on with rows before it; 0 compares all.

    Returns:
        Index of each such row to the index of the earliest row found that is as similar.

    Example:
        >>> near_duplicates(["The cat sat on the mat today", "the cat sat on the mat, today!", "another"])
        {1: 0}
    """
    signatures = _signatures(contents)
    found: dict[int, int] = {}
    unlike: set[tuple[int, int]] = set()
    for earlier, later in _candidates(signatures):
        if (since and not earlier < since <= later) or found.get(later, later) <= earlier:
            continue
        if np.mean(signatures[earlier] == signatures[later]) < threshold - _SURE or (earlier, later) in unlike:
            continue
        if similarity(contents[earlier], contents[later]) >= threshold:
            found[later] = earlier
        else:
            unlike.add((earlier, later))
    return dict(sorted(found.items()))


def similarity(first: str, second: str) -> float:
    """Share of the shingles of two texts that they have in common.

    Args:
        first: a text.
        second: another.

    Returns:
        0 (nothing in common) to 1 (the same words).

    Example:
        >>> similarity("one two three four", "one two three four five")
        0.6666666666666666
    """
    a, b = _shingles(first), _shingles(second)
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def mojibake(text: str) -> str | None:
    """The first stretch of a text that was decoded with the wrong encoding.

    Args:
        text: any text.

    Returns:
        The stretch, such as `Ã©` for `é`, or None.

    Example:
        >>> mojibake("cafÃ©"), mojibake("café")
        ('Ã©', None)
    """
    for run in _NOT_ASCII.finditer(text):
        found = run.group()
        broken = next((sign for sign in found if sign == "\ufffd" or "\x80" <= sign <= "\x9f"), None)
        if broken is not None:
            return found if len(found) <= 8 else broken
        if len(found) > 1:
            # A sign that no one-byte encoding has separates what stands around it.
            raw = b"".join(_one_byte(sign) for sign in found)
            match = _DOUBLE.search(raw)
            if match:
                return found[match.start() : match.end()]
    return None


def _one_byte(sign: str) -> bytes:
    try:
        return sign.encode("cp1252")
    except UnicodeEncodeError:
        return sign.encode("latin-1") if sign < "\u0100" else b"\0"


def _plain(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str) and not message.get("tool_calls"):
        return content
    rest = {key: value for key, value in message.items() if key != "role"}
    return json.dumps(rest, sort_keys=True, default=str, ensure_ascii=False)


def _shingles(text: str) -> np.ndarray:
    """Distinct hashes of a text's shingles: uint64, sorted."""
    words = np.fromiter(
        (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORD.findall(text.lower())), dtype=np.uint64
    )
    if not len(words):
        return words
    size = min(_SHINGLE, len(words))
    hashes = np.full(len(words) - size + 1, size, dtype=np.uint64)
    for offset in range(size):
        hashes = _mixed(hashes ^ words[offset : offset + len(hashes)])
    return np.unique(hashes)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of the input reaches every bit of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(contents: Sequence[str]) -> np.ndarray:
    """MinHash signatures: uint32 [rows, hashes]; rows without a word get one of their own, like no other."""
    seeds = _mixed(np.arange(1, _HASHES + 1, dtype=np.uint64))[:, None]  # [hashes, 1]
    signatures = np.empty((len(contents), _HASHES), dtype=np.uint32)
    for index, content in enumerate(contents):
        shingles = _shingles(content)
        if not len(shingles):
            signatures[index] = _mixed(seeds[:, 0] + np.uint64(index)) >> np.uint64(32)
            continue
        least = np.full(_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            hashed = (shingles[None, start : start + _BLOCK] ^ seeds) * np.uint64(0xD6E8FEB86659FD93)
            np.minimum(least, (hashed ^ (hashed >> np.uint64(32))).min(axis=1), out=least)
        signatures[index] = least >> np.uint64(32)
    return signatures


def _candidates(signatures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows (earlier, later) that agree on a band, each with the first and a few others of its bucket."""
    width = _HASHES // _BANDS
    for band in range(_BANDS):
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(band * width, (band + 1) * width):
            keys = _mixed(keys ^ signatures[:, column])
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]])) if len(order) else order
        for start, end in itertools.pairwise([*starts.tolist(), len(order)]):
            bucket = order[start:end].tolist()
            for at in range(1, len(bucket)):
                for earlier in {0, *range(max(0, at - _NEIGHBOURS), at)}:
                    yield bucket[earlier], bucket[at]

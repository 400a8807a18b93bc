"""Files into rows: JSON, JSONL, CSV, TSV, Parquet, CoNLL and plain text, each knowing the file and number it came from.

Path -> `load_rows` -> list of `Row` -> `formats.to_examples`. A broken file or row is an error naming both.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfinetune.errors import UserError

_KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
}
# Where files that wrap their rows in one object keep them.
_ROW_KEYS = ("data", "rows", "examples", "instances", "train")


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Args:
        fields: column name to value.
        file: the file it came from, for messages.
        number: 1-based row number in that file (for JSONL the line, for CoNLL the sentence).
    """

    fields: dict[str, Any]
    file: str
    number: int

    @property
    def place(self) -> str:
        """File and row number, as messages carry them."""
        return f"{self.file}, row {self.number}"


def load_rows(paths: Sequence[str], sample_by: str = "auto") -> list[Row]:
    """Read every row of the given files.

    Args:
        paths: files to read, in order; the ending says what each is, and a further `.gz` is unpacked.
        sample_by: what one row of a plain text file is: `line`, `paragraph` (blank lines between), `document` (the
            whole file), or `auto`: paragraphs where the file has blank lines, else lines. Where it is not `auto`, a
            file of an unknown ending is plain text.

    Returns:
        The rows, in file order.

    Raises:
        UserError: a file is missing, empty, of an unknown kind, or broken; names the file, the row and the mend.

    Example:
        >>> load_rows(["train.jsonl"])[0].place  # doctest: +SKIP
        'train.jsonl, row 1'
    """
    rows: list[Row] = []
    for path in paths:
        found = list(_read(Path(path), sample_by))
        if not found:
            raise UserError(f"{path}: holds no rows", fix="give a file with at least one row")
        rows.extend(found)
    return rows


def load_aligned_rows(files: Mapping[str, str]) -> list[Row]:
    """Read text files whose lines belong together, such as a text and its translation.

    Args:
        files: column name to path; line n of every file makes row n. A further `.gz` is unpacked.

    Returns:
        The rows, in line order, empty lines included.

    Raises:
        UserError: a file is missing, empty or not UTF-8, or the files have different numbers of lines.

    Example:
        >>> load_aligned_rows({"source": "a.de", "target": "a.en"})[0].fields["target"]  # doctest: +SKIP
        'Two men outside.'
    """
    columns = {name: _lines(Path(path)) for name, path in files.items()}
    counts = {name: len(lines) for name, lines in columns.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{files[name]} has {count:,} lines" for name, count in counts.items())
        raise UserError(f"the files do not belong together line by line: {listed}", fix="give files of equal length")
    place = " + ".join(files.values())
    return [
        Row(dict(zip(columns, values, strict=True)), place, number)
        for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]


def load_labelled_rows(files: Mapping[str, str]) -> list[Row]:
    """Read text files that hold one class each, a text a line.

    Args:
        files: label to path.

    Returns:
        Rows with the columns `text` and `label`, file after file; empty lines are left out.

    Raises:
        UserError: a file is missing, empty or not UTF-8.

    Example:
        >>> load_labelled_rows({"pos": "good.txt", "neg": "bad.txt"})[0].fields["label"]  # doctest: +SKIP
        'pos'
    """
    return [
        Row({"text": line, "label": label}, path, number)
        for label, path in files.items()
        for number, line in enumerate(_lines(Path(path)), start=1)
        if line.strip()
    ]


def load_dataset_rows(name: str, config_name: str | None = None, split: str = "train") -> list[Row]:
    """Read every row of a split of a dataset known to the `datasets` library.

    Args:
        name: a dataset's name on the Hugging Face hub, or a folder of data files.
        config_name: the dataset's configuration, where it has several.
        split: the split to read.

    Returns:
        The rows, in the dataset's order; numbers that stand for classes become the classes' names.

    Raises:
        UserError: the dataset or the split is not there, or needs code of its own.

    Example:
        >>> len(load_dataset_rows("path/to/folder"))  # doctest: +SKIP
        100
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config_name, split=split)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types for "not there", "offline" and "no such split"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"dataset_name: {name!r} (split {split!r}) cannot be loaded: {reason}",
            fix="check the name, or download the files and name them under train_file",
        ) from error
    if not len(dataset):
        raise UserError(f"dataset_name: {name!r} (split {split!r}) holds no rows", fix="name another split")
    named = {column: feature for column, feature in dataset.features.items() if _class_names(feature)}
    rows = []
    for number, fields in enumerate(dataset, start=1):
        fields = {column: _class_name(named.get(column), value) for column, value in fields.items()}
        rows.append(Row(fields, f"{name} ({split})", number))
    return rows


def hash_files(paths: Iterable[str | Path]) -> str:
    """SHA-256 over the contents of files, in the given order.

    Args:
        paths: the files.

    Returns:
        Hexadecimal digest.

    Example:
        >>> hash_files([])[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hash_rows(rows: Iterable[Row]) -> str:
    """SHA-256 over rows that did not come from files of ours.

    Args:
        rows: the rows.

    Returns:
        Hexadecimal digest.

    Example:
        >>> hash_rows([])[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _class_names(feature: Any) -> Any:
    """The names behind a column of class numbers, or of lists of them; None for any other column."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "names", None)


def _class_name(feature: Any, value: Any) -> Any:
    if feature is None or value is None:
        return value
    names = _class_names(feature)
    if isinstance(value, list):
        return [names[number] for number in value]
    return names[value] if value >= 0 else None  # a hidden label is -1


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise UserError(f"{path}: is a folder", fix=f"set dataset_name: {path}, which reads a folder's data files")
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix=f"correct the path (looked at {path.absolute()})")
    return path


def _lines(path: Path) -> list[str]:
    lines = [line.removesuffix("\r") for line in _read_text(_existing(path)).split("\n")]
    if not lines[-1]:
        lines.pop()
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: holds no rows", fix="give a file with at least one row")
    return lines


def _read(path: Path, sample_by: str) -> Iterator[Row]:
    _existing(path)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    # Who says what a row of plain text is says that it is plain text, whatever the ending: reviews.pos, corpus.en.
    kind = _KINDS.get(plain.suffix.lower()) or ("text" if sample_by != "auto" else None)
    if kind is None:
        raise UserError(
            f"{path}: unknown kind of file '{plain.suffix}'",
            fix=f"convert it, or rename it to one of {', '.join(_KINDS)}; plain text is read with sample_by: line",
        )
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    text = _read_text(path)
    if kind == "text":
        for number, piece in enumerate(_split_text(text, sample_by), start=1):
            yield Row({"text": piece}, str(path), number)
    elif kind == "conll":
        yield from _read_conll(path, text)
    elif kind in ("csv", "tsv"):
        yield from _read_csv(path, text, "\t" if kind == "tsv" else ",")
    elif kind == "jsonl":
        yield from _read_jsonl(path, text)
    else:
        yield from _read_json(path, text)


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}", fix="fetch or compress it again") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte {error.start} is not UTF-8", fix="save the file as UTF-8 (iconv -t utf-8)"
        ) from None


def _split_text(text: str, sample_by: str) -> list[str]:
    text = text.replace("\r\n", "\n")
    if sample_by == "document":
        pieces = [text]
    elif sample_by == "paragraph" or (sample_by == "auto" and re.search(r"\n[ \t]*\n", text.strip())):
        pieces = re.split(r"\n[ \t]*\n+", text)
    else:
        pieces = text.split("\n")
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file: {reason}", fix="write or fetch it again") from None
    for number, fields in enumerate(rows, start=1):
        yield Row(fields, str(path), number)


def _read_csv(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # the default refuses answers over 128 KiB
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="\0extra", strict=True)
    number = 0
    try:
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise UserError(f"{path}: the column {twice[0]!r} is there twice", fix="rename or remove one of the two")
        for number, fields in enumerate(reader, start=1):
            if "\0extra" in fields or None in fields.values():
                wanted = len(reader.fieldnames or ())
                found = wanted + len(fields.get("\0extra", ())) - list(fields.values()).count(None)
                raise UserError(
                    f"{path}, row {number} (line {reader.line_num}): {found} cells, but {wanted} columns",
                    fix="put quotes around cells that hold the delimiter or a line break",
                )
            yield Row(dict(fields), str(path), number)
    except csv.Error as error:
        raise UserError(
            f"{path}, row {number + 1} (line {reader.reader.line_num}): broken CSV: {error}",
            fix="correct the quotes there",
        ) from None


def _read_conll(path: Path, text: str) -> Iterator[Row]:
    """One token a line, its tag in the last column, an empty line after each sentence."""
    number, tokens, tags = 1, [], []
    for line_number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.removesuffix("\r")
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            if tokens:
                yield Row({"tokens": tokens, "tags": tags}, str(path), number)
                number, tokens, tags = number + 1, [], []
        elif len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            raise UserError(
                f"{path}, row {number} (line {line_number}): {line!r} is not a token and its tag",
                fix="write the token, a tab and the tag on each line, and an empty line after each sentence",
            )
        elif cells[0] != "-DOCSTART-":
            tokens.append(cells[0])
            tags.append(cells[-1].strip())


def _read_jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, row {number}: broken JSON: {error.msg} (column {error.colno})",
                fix="each line holds one whole JSON object; correct that line",
            ) from None
        except RecursionError:
            raise _too_deep(f"{path}, row {number}") from None
        yield _json_row(path, number, fields)


def _read_json(path: Path, text: str) -> Iterator[Row]:
    """A list of objects, alone or under a key such as `data`; one object; or, under a misleading name, one a line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            yield from _read_jsonl(path, text)
            return
        number = _broken_row(text)
        raise UserError(
            f"{path}, row {number} (line {error.lineno}): broken JSON: {error.msg} (column {error.colno})",
            fix="correct that row",
        ) from None
    except RecursionError:
        raise _too_deep(str(path)) from None
    if isinstance(content, dict):
        lists = [content[key] for key in _ROW_KEYS if isinstance(content.get(key), list)]
        content = lists[0] if len(lists) == 1 else [content]
    elif not isinstance(content, list):
        content = [content]
    for number, fields in enumerate(content, start=1):
        yield _json_row(path, number, fields)


def _too_deep(place: str) -> UserError:
    return UserError(f"{place}: JSON nested too deeply to be read", fix="flatten or remove that row")


def _json_row(path: Path, number: int, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise UserError(
            f"{path}, row {number}: holds {type(fields).__name__}, not an object",
            fix='each row is an object such as {"prompt": "...", "completion": "..."}',
        )
    return Row(fields, str(path), number)


def _broken_row(text: str) -> int:
    """Number of the array element at which a JSON text stops being JSON."""
    decoder, number = json.JSONDecoder(), 1
    position = text.index("[") + 1
    while True:
        position = re.compile(r"\s*").match(text, position).end()
        try:
            _, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return number
        position = re.compile(r"\s*").match(text, position).end()
        if text[position : position + 1] != ",":
            return number
        position += 1
        number += 1

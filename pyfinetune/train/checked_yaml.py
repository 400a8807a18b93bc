"""Keys and values of a YAML file, and what is wrong with them in one sentence that names the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pyfinetune.errors import UserError
from pyfinetune.train.search_space import UNION_TAGS

# What pydantic puts into a place for the branches of a union.
_UNION_WORDS = ("str", *UNION_TAGS)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, command: str = "pyfinetune train run.yaml") -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: the file.
        command: how to give one, for the message.

    Returns:
        Key to value.

    Raises:
        UserError: the file is missing, not YAML, or no mapping, or a key stands there twice.

    Example:
        >>> read_yaml("run.yaml")["output_dir"]  # doctest: +SKIP
        'out'
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix=f"give the path of a YAML file: {command}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"{place}: not valid YAML: {reason}", fix="correct that line") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {type(content).__name__}, not keys and values",
            fix="write lines such as `model_name_or_path: Qwen/Qwen2.5-0.5B`",
        )
    return content


def nearest(name: str, known: Any) -> str | None:
    """A question that names the known name that a wrong one resembles most.

    Args:
        name: the wrong one.
        known: the names there are.

    Returns:
        The question, or None where none comes close.

    Example:
        >>> nearest("max_lenght", ["max_length", "seed"])
        'did you mean max_length?'
    """
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None


def value_error(
    error: ValidationError, content: dict[str, Any], source: str, section_of: Callable[[list[Any]], Any]
) -> UserError:
    """What pydantic found wrong, in one sentence with its mend.

    Args:
        error: pydantic's.
        content: what was checked.
        source: the name that errors carry.
        section_of: from the place of an unknown key to the model that it belongs to.

    Returns:
        The error to raise.

    Example:
        >>> value_error(error, content, "run.yaml", section_of)  # doctest: +SKIP
    """
    problem = error.errors(include_url=False)[0]
    # A union's branches stand in the place as words of pydantic's own, such as `list[str]`.
    place = [p for p in problem["loc"] if isinstance(p, int) or ("[" not in p and p not in _UNION_WORDS)]
    key = _dotted(place)
    if problem["type"] == "missing":
        return UserError(f"{source}: {key} is missing", fix=f"add a line `{place[-1]}: ...`")
    if problem["type"] == "extra_forbidden":
        known = section_of(place).model_fields
        fix = nearest(str(place[-1]), known) or f"the known keys are {', '.join(known)}"
        return UserError(f"{source}: {_dotted(place[:-1])}: unknown key '{place[-1]}'", fix=fix)
    reason = problem["msg"].removeprefix("Value error, ")
    if not key:
        return UserError(f"{source}: {reason}", fix=f"edit {source}")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return UserError(f"{source}: {key}: {reason}", fix=f"edit {source}")
    given = problem["input"] if len(place) > 1 else content.get(key)
    return UserError(f"{source}: {key}: {given!r} will not do: {reason}", fix=f"correct the value of {key}")


def _dotted(place: list[Any]) -> str:
    """`sources: entry 2: weight`, as a person counts."""
    return ": ".join(f"entry {part + 1}" if isinstance(part, int) else str(part) for part in place)

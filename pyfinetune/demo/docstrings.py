"""The texts: docstrings and signatures of the Python standard library, read from the running interpreter.

    gather -> [Entry] -> split (by object, nothing shared across) -> questions

Modules are imported, never their source read. Nothing is downloaded, and what a module prints or warns of while it is
imported is not shown.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import random
import re
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Opens a browser, prints, draws windows, installs packages, changes the terminal, or has no text of its own.
_SKIPPED = {
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "readline", "rlcompleter",
    "test", "this", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
_LONGEST_SIGNATURE = 120
_SHINGLE = 8  # words in a row; that many in common are no accident
_ROUTINES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
)


@dataclass(frozen=True)
class Entry:
    """One object of the standard library that has a docstring.

    Args:
        name: where it is found, such as `os.path.join`.
        kind: `module`, `class`, `function`, `method` or `property`.
        signature: what its call looks like, such as `(a, *p)`; None where it is not known or not called.
        doc: its docstring, without indentation.
    """

    name: str
    kind: str
    signature: str | None
    doc: str

    @property
    def text(self) -> str:
        """The whole as one raw text: what it is, its call, and its docstring."""
        return f"{self.kind} {self.name}{self.signature or ''}\n\n{self.doc}"

    @property
    def question(self) -> str:
        """The instruction."""
        return f"What does `{self.name}{self.signature or ''}` do?\n"

    @property
    def answer(self) -> str | None:
        """The first sentence of the docstring, or None where it begins with something else."""
        return first_sentence(self.doc)


def gather() -> list[Entry]:
    """Every docstring of the standard library, each text once.

    Returns:
        The entries, sorted by name: the same interpreter gives the same list.

    Example:
        >>> next(entry.signature for entry in gather() if entry.name == "textwrap.dedent")
        '(text)'
    """
    found: dict[str, Entry] = {}
    for name, module in sorted(_modules().items()):
        for entry in _entries(name, module):
            key = " ".join(entry.doc.split())
            known = found.get(key)
            # An object is often reachable under several names; the shortest is the one that people use.
            if known is None or (entry.name.count("."), len(entry.name)) < (known.name.count("."), len(known.name)):
                found[key] = entry
    return sorted(found.values(), key=lambda entry: entry.name)


def split(entries: Sequence[Entry], share: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Hold objects out, such that no text of theirs, nor most of one, is among the others.

    Args:
        entries: what `gather` returned.
        share: how many to hold out, as a share of all, before those that resemble another text are dropped.
        seed: decides which.

    Returns:
        The entries to learn from, and the held-out ones. Objects with the same first sentence stay on one side; a
        held-out object is dropped where more than half of its 8-word sequences occur on the other side.

    Example:
        >>> learn, held_out = split(gather(), 0.1, seed=42)
        >>> {entry.answer for entry in learn} & {entry.answer for entry in held_out} <= {None}
        True
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(" ".join(_words(entry.answer or entry.doc)), []).append(entry)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    held_out: list[Entry] = []
    learn: list[Entry] = []
    for key in order:
        (held_out if len(held_out) < share * len(entries) else learn).extend(groups[key])
    seen = {shingle for entry in learn for shingle in _shingles(entry.doc)}
    held_out = [entry for entry in held_out if _known_share(_shingles(entry.doc), seen) <= 0.5]
    return _by_name(learn), _by_name(held_out)


def questions(entries: Iterable[Entry]) -> list[dict[str, str]]:
    """Prompt/completion rows of those entries that are called and have a first sentence.

    Args:
        entries: any.

    Returns:
        One row an object, with the keys `prompt` and `completion`.

    Example:
        >>> questions([Entry("abs", "function", "(x, /)", "Return the absolute value of the argument.")])[0]["prompt"]
        'What does `abs(x, /)` do?\\n'
    """
    return [
        {"prompt": entry.question, "completion": entry.answer}
        for entry in entries
        if entry.signature is not None and entry.answer is not None
    ]


def first_sentence(doc: str) -> str | None:
    """The first sentence of a docstring.

    Args:
        doc: the docstring, without indentation.

    Returns:
        The sentence in one line, or None where the text does not begin with a sentence of 3 to 40 words.

    Example:
        >>> first_sentence("Return a copy,\\nall lower case.  See upper.")
        'Return a copy, all lower case.'
    """
    paragraph = " ".join(doc.split("\n\n", 1)[0].split())
    ended = re.match(r"(.*?(?<!e\.g)(?<!i\.e)(?<!etc)[.!?])(?=\s+[A-Z`'\"(]|$)", paragraph)
    sentence = ended.group(1) if ended else paragraph
    is_prose = re.match(r"[A-Z][\w'-]*,? ", sentence) is not None and "->" not in sentence and sentence[-1] != ":"
    return sentence if is_prose and 3 <= len(sentence.split()) <= 40 else None


def _modules() -> dict[str, types.ModuleType]:
    """Every public module that can be imported here."""
    modules = {}
    waiting = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_") and name not in _SKIPPED]
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        while waiting:
            name = waiting.pop()
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit):  # a module of another platform, or one whose library is not installed
                continue
            modules[name] = module
            inner = (found.name for found in pkgutil.iter_modules(getattr(module, "__path__", [])))
            # `__main__` runs a program.
            waiting += [
                f"{name}.{part}" for part in inner if not part.startswith("_") and part not in ("test", "tests")
            ]
    return modules


def _entries(name: str, module: types.ModuleType) -> Iterator[Entry]:
    yield from _entry(name, "module", module, module)
    public = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
    for key in sorted(set(public)):
        value = vars(module).get(key)
        path = key if name == "builtins" else f"{name}.{key}"
        if isinstance(value, type):
            if _is_stdlib(value):
                yield from _entry(path, "class", value, value)
                yield from _members(path, value)
        elif isinstance(value, _ROUTINES) and _is_stdlib(value):
            yield from _entry(path, "function", value, value)


def _members(path: str, cls: type) -> Iterator[Entry]:
    for key, value in sorted(vars(cls).items()):
        if key.startswith("_"):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, _ROUTINES):
            yield from _entry(f"{path}.{key}", "method", value, value)
        elif isinstance(value, (property, types.GetSetDescriptorType)):
            yield from _entry(f"{path}.{key}", "property", value, None)


def _entry(name: str, kind: str, documented: object, called: object) -> Iterator[Entry]:
    doc = getattr(documented, "__doc__", None)
    if not isinstance(doc, str):
        return
    doc = inspect.cleandoc(doc).strip()
    signature = _signature(called) if kind in ("class", "function", "method") else None
    # Many objects written in C give their call in the first line instead.
    head, _, rest = doc.partition("\n")
    own = re.match(rf"(?:\w+\.)*{re.escape(name.rsplit('.', 1)[-1])}(\([^()]*\))", head)
    if own and own.end() <= _LONGEST_SIGNATURE and kind != "module":
        signature = signature or own.group(1)
        remark = re.match(r"\s*--+\s*(.+)", head[own.end() :])
        doc = f"{remark.group(1)}\n{rest}".strip() if remark else rest.strip() or doc
    if len(doc.split()) >= 3 and len(doc) < 20_000:
        yield Entry(name, kind, signature, re.sub(r" at 0x[0-9a-fA-F]+", "", doc))


def _signature(called: object) -> str | None:
    try:
        signature = inspect.signature(called)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        bare = [parameter for parameter in bare if parameter.name not in ("self", "cls")]
        text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    except Exception:  # inspect evaluates what C code says of its defaults, which can be anything
        return None
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split())).replace(str(sys.maxsize), "sys.maxsize")
    return text if len(text) <= _LONGEST_SIGNATURE else "(...)"


def _is_stdlib(value: object) -> bool:
    home = getattr(value, "__module__", None)
    return home is None or str(home).partition(".")[0] in sys.stdlib_module_names


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    return {tuple(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))}


def _known_share(shingles: set, seen: set) -> float:
    return len(shingles & seen) / len(shingles)


def _by_name(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.name)

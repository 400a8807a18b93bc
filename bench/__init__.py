"""Benchmarks: every kernel against what people would use instead, checked first, on this machine.

`bench_<op>.py` declares an op's cases once; `runner.main` (the command `pyfinetune bench`) and `pytest bench/` both run
them from there.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

from pyfinetune.errors import UserError

if TYPE_CHECKING:
    from pyfinetune.bench.harness import Case

_PREFIX = "bench_"


def op_names() -> list[str]:
    """The ops that have benchmarks, which are the modules named bench_<op>."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))


def module_of(op: str) -> ModuleType:
    """The module with an op's cases.

    Raises:
        UserError: the op has no benchmark.
    """
    known = op_names()
    if op not in known:
        raise UserError(f"bench: there is no benchmark for {op!r}", fix=f"choose from: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{_PREFIX}{op}")


def cases_of(ops: list[str], quick: bool = False) -> list[Case]:
    """The cases of the ops, in the order asked for; all ops when the list is empty.

    Args:
        ops: names from `op_names`.
        quick: small shapes instead of those that the targets are stated for.

    Raises:
        UserError: an op has no benchmark.
    """
    return [case for op in ops or op_names() for case in module_of(op).cases(quick)]

"""The process that measures: `runner` starts it once for each allocator setting, which is fixed when a process starts.

It writes one JSON object a line to the file descriptor it is given, so that nothing a peer prints gets in between.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from pyfinetune.bench import cases_of
from pyfinetune.bench.ceilings import measure_ceilings
from pyfinetune.bench.harness import Case, measure


def run_cases(
    cases: list[Case], device: torch.device, seconds: float, quick: bool, emit: Callable[[dict], None]
) -> None:
    """Measure the cases one after the other and emit what happens.

    Args:
        cases: what to measure.
        device: where.
        seconds: time to spend on timing each case.
        quick: measure the machine's rates less often.
        emit: takes {"ceilings": ...} first, then {"start": name} and {"row": ...} for each case.
    """
    ceilings = measure_ceilings(device, quick)
    emit({"ceilings": ceilings})
    for case in cases:
        emit({"start": case.name})
        torch.manual_seed(0)
        try:
            row = measure(case, device, ceilings, seconds)
        except Exception as error:  # one case that fails must not take the others' results along
            row = {"op": case.op, "case": case.name, "isa": case.isa, "error": f"{type(error).__name__}: {error}"}
        emit({"row": row})


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m pyfinetune.bench.worker`."""
    parser = argparse.ArgumentParser(prog="pyfinetune.bench.worker")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor to write to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--isa", help="only the cases for this forced instruction set; without it, all the others")
    parser.add_argument("ops", nargs="*")
    args = parser.parse_args(argv)
    cases = [case for case in cases_of(args.ops, args.quick) if case.isa == args.isa]
    with os.fdopen(args.fd, "w", encoding="utf-8") as pipe:

        def emit(message: dict[str, Any]) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        run_cases(cases, torch.device(args.device), args.seconds, args.quick, emit)


if __name__ == "__main__":
    main()

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

from pyfinetune.bench.ceilings import measure_ceilings
from pyfinetune.bench.harness import Case, measure
from pyfinetune.bench.request import Request


def run_cases(cases: list[Case], request: Request, once: bool, emit: Callable[[dict], None]) -> None:
    """Measure the cases one after the other and emit what happens.

    Args:
        cases: what to measure.
        request: where, how long, and beside whom.
        once: measure also what another allocator setting would not change: memory, and where a step's time goes.
        emit: takes {"ceilings": ...} first, then {"start": name} and {"row": ...} for each case.
    """
    device = torch.device(request.device)
    ceilings = measure_ceilings(device, request.quick)
    emit({"ceilings": ceilings})
    for case in cases:
        emit({"start": case.name})
        torch.manual_seed(0)
        try:
            row = measure(case, device, ceilings, request.time_each, request.choice, once)
        except Exception as error:  # one case that fails must not take the others' results along
            row = {"op": case.op, "case": case.name, "isa": case.isa, "error": f"{type(error).__name__}: {error}"}
        emit({"row": row})


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m pyfinetune.bench.worker`."""
    parser = argparse.ArgumentParser(prog="pyfinetune.bench.worker")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor to write to")
    parser.add_argument("--isa", help="only the cases for this forced instruction set; without it, all the others")
    parser.add_argument("--once", action="store_true", help="measure memory, too")
    parser.add_argument("--request", type=Request.from_json, required=True, help="what to measure, in JSON")
    args = parser.parse_args(argv)
    cases = [case for case in args.request.cases() if case.isa == args.isa]
    with os.fdopen(args.fd, "w", encoding="utf-8") as pipe:

        def emit(message: dict[str, Any]) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        run_cases(cases, args.request, args.once, emit)


if __name__ == "__main__":
    main()

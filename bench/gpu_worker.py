"""The process that measures one group of GPU cases: `gpu_check` starts it, and reads what it wrote when it is done.

Each line of the file is a JSON object, written when it is known, so that a timeout loses one case and no more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pyfinetune.bench.gpu_cases import GROUPS
from pyfinetune.bench.gpu_step import CappedStep
from pyfinetune.bench.gpu_timing import ceilings, measure


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m pyfinetune.bench.gpu_worker`."""
    from pyfinetune.kernels.config import remembered

    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.gpu_worker", description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("lines", type=Path, help="file to write to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on timing each case")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:  # some of torch's functions want to know which
        device = torch.device("cuda", torch.cuda.current_device())
    with args.lines.open("w", encoding="utf-8") as file:

        def emit(**message) -> None:
            file.write(json.dumps(message) + "\n")
            file.flush()

        group = GROUPS[args.group]
        rates = ceilings(device, args.quick) if group.timed else {}
        emit(ceilings=rates)
        for case in group.cases(args.quick):
            emit(started=case.name)
            torch.manual_seed(0)
            try:
                if isinstance(case, CappedStep):
                    row = case.measure(device)
                else:
                    row = measure(case, device, rates, args.seconds)
            except Exception as error:  # one case that fails must not take the others' results along
                row = {"op": case.op, "case": case.name, "error": f"{type(error).__name__}: {error}"[:2000]}
            emit(row=row)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        emit(tuned=remembered())


if __name__ == "__main__":
    main()

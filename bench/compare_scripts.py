"""A training script as it is and through `pyfinetune run`, in turn: `python -m pyfinetune.bench.compare_scripts`.

The script's last line of output has to be JSON with `losses` and `tokens_per_second`, as `bench/scripts/sft.py` prints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyfinetune.bench.harness import OURS
from pyfinetune.bench.results import facts_to_share
from pyfinetune.errors import UserError

PLAIN = "plain"
SCRIPT = Path(__file__).parent / "scripts" / "sft.py"


def run_once(script: Path, arguments: list[str], patched: bool) -> dict[str, Any]:
    """What the script's last line says.

    Raises:
        UserError: the script failed, or said something else.
    """
    before = ["-m", "pyfinetune.cli", "run"] if patched else []
    command = [sys.executable, *before, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {last}")
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
        return {"losses": [float(loss) for loss in said["losses"]], "rate": float(said["tokens_per_second"])}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{script}: its last line is no JSON with losses and tokens_per_second ({error})") from error


def compare(script: Path, arguments: list[str], rounds: int) -> dict[str, Any]:
    """Run both ways in turn, and sum up.

    Returns:
        By way ("plain", "ours") the `losses` of its first run and the `rates`, tokens per second of each; `ratio` of
        the median rates; `loss_gap`, the largest difference between losses of the same step.
    """
    ways: dict[str, dict[str, Any]] = {PLAIN: {"losses": [], "rates": []}, OURS: {"losses": [], "rates": []}}
    for i in range(rounds):
        for name in (PLAIN, OURS) if i % 2 == 0 else (OURS, PLAIN):
            found = run_once(script, arguments, patched=name == OURS)
            ways[name]["losses"] = ways[name]["losses"] or found["losses"]
            ways[name]["rates"].append(found["rate"])
    ratio = statistics.median(ways[OURS]["rates"]) / statistics.median(ways[PLAIN]["rates"])
    counts = [len(way["losses"]) for way in ways.values()]
    if counts[0] != counts[1] or not counts[0]:
        raise UserError(
            f"{script}: {counts[0]} losses as it is and {counts[1]} patched, needs as many, and one at least"
        )
    gap = max(abs(a - b) for a, b in zip(ways[PLAIN]["losses"], ways[OURS]["losses"], strict=True))
    return {**ways, "ratio": ratio, "loss_gap": gap}


def main(argv: list[str] | None = None) -> int:
    """Compare and print; arguments that this command does not know go to the script."""
    parser = argparse.ArgumentParser(prog="python -m pyfinetune.bench.compare_scripts", description=__doc__)
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the training script")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args, arguments = parser.parse_known_args(argv)
    try:
        if args.rounds < 1:
            raise UserError(f"--rounds {args.rounds}: needs 1 at least")
        if args.json is not None and not args.json.resolve().parent.is_dir():  # before the minutes, not after
            raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
        found = compare(args.script, arguments, args.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in (PLAIN, OURS):
        rates, losses = found[name]["rates"], found[name]["losses"]
        spread = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"{name:6} {statistics.median(rates):6.0f} tokens/s ({spread}); losses {losses}")
    print(f"ratio {found['ratio']:.2f}x; losses differ by at most {found['loss_gap']:.2g}")
    if args.json is not None:
        result = {"machine": facts_to_share(), "script": args.script.name, "arguments": arguments, **found}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

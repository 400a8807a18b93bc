"""Runs in processes of their own that are killed without warning, and what is compared with a run that was not.

The processes are forked from one server that has imported everything, so that an attempt costs its training alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

# What no two runs have in common: times, rates, memory.
_MEASURED = ("runtime", "per_second", "peak_memory_gb", "total_flos")


def context():
    """A multiprocessing context whose children have transformers, PEFT and the training layer imported already."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["pyfinetune.train.loop", "pyfinetune.train.run", "peft", "killed_runs"])
    return found


def child(values: dict, log: str) -> None:
    """Train as the values say, alone, with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from pyfinetune.train.config import parse_config
    from pyfinetune.train.run import train

    train(parse_config(values))


def warm_up() -> None:
    """Start the server, which imports everything, so that attempts are timed without it."""
    process = context().Process(target=os.getpid)
    process.start()
    process.join()


def attempt(values: dict, kill_after: float | None = None) -> float | None:
    """Train in a process of its own; gives its seconds, or None where it was killed after so many of them."""
    out = Path(values["output_dir"])
    log = out.with_suffix(".log")
    start = time.perf_counter()
    process = context().Process(target=child, args=(values, str(log)))
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return None
    assert process.exitcode == 0, log.read_text()[-4000:]
    return time.perf_counter() - start


def outcome(out: Path) -> dict:
    """All that a run leaves behind, but for what no two runs have in common."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[-1]))
    state = json.loads((last / "trainer_state.json").read_text())
    state["log_history"] = [_comparable(record) for record in state["log_history"]]
    state["best_model_checkpoint"] = state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    run = json.loads((out / "run.json").read_text())
    return {
        "status": run["status"],
        "result": {
            key: run["result"][key] for key in ("steps", "tokens", "eval_loss", "eval_loss_before", "perplexity")
        },
        "adapter": load_file(out / "adapter_model.safetensors"),
        "checkpoint": last.name,
        "last adapter": load_file(last / "adapter_model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "schedule": torch.load(last / "scheduler.pt", weights_only=True),
        "state": state,
        "metrics": [_comparable(line) for line in lines if "train_runtime" not in line],
    }


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Places at which two outcomes differ by as much as a bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def _comparable(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.endswith(_MEASURED)}

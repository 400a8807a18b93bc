"""What the processes of `torchrun` do in test_train_distributed.py: whole runs, one after the other.

    torchrun ... train_processes.py FOLDER          FOLDER/runs.json -> FOLDER/found-RANK.json

Each entry of runs.json has a `name`, a run's `config`, and perhaps `copy`: a folder whose checkpoints up to a step are
put into the run's output folder first, as if it had been stopped there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch

from pyfinetune.errors import PyfinetuneError
from pyfinetune.train.config import parse_config
from pyfinetune.train.run import train


def stopped_at(folder: str | Path, step: int, target: str | Path) -> None:
    """Make a run's output folder look as if the run had been killed after the checkpoint of a step."""
    target = Path(target)
    target.mkdir(parents=True)
    shutil.copytree(Path(folder) / f"checkpoint-{step}", target / f"checkpoint-{step}")
    shutil.copy(Path(folder) / "metrics.jsonl", target / "metrics.jsonl")
    record = json.loads((Path(folder) / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(record | {"status": "running"}))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    rank, found = int(os.environ["RANK"]), {}
    for entry in json.loads((folder / "runs.json").read_text()):
        if "copy" in entry and rank == 0:
            stopped_at(*entry["copy"], entry["config"]["output_dir"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        try:
            found[entry["name"]] = dataclasses.asdict(train(parse_config(entry["config"])))
        except PyfinetuneError as error:
            found[entry["name"]] = {"error": str(error)}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""kill -9 at random instants: whatever a run was doing, the same command ends at the same bits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from killed_runs import attempt, differences, outcome, warm_up
from tiny_model import tiny_fixture  # noqa: F401

from pyfinetune.train.checkpoints import find_flaw, list_checkpoints


@pytest.fixture(scope="module")
def values(tiny, tmp_path_factory) -> dict:
    """A run with all that has a state: packing, dropout, accumulation, a schedule, epochs, records between saves."""
    data = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": f" {a + b}." * (1 + b % 3)} for a in range(12) for b in range(10)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return {
        "model_name_or_path": tiny,
        "train_file": str(data),
        "max_length": 32,
        "packing": True,
        "test_size": 0.2,
        "lora_r": 4,
        "lora_dropout": 0.2,
        "save_steps": 2,
        "eval_steps": 4,
        "device": "cpu",
        "trainer": {
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "logging_steps": 3,
            "save_total_limit": 2,
        },
    }


def with_early_stopping(values: dict) -> dict:
    """The same run, which soon stops because a far too high learning rate spoils the held-out loss."""
    trainer = {**values["trainer"], "learning_rate": 0.5, "num_train_epochs": 9}
    return {**values, "early_stopping_patience": 2, "eval_steps": 2, "trainer": trainer}


def kill_until(values: dict, kills: int, folder: Path, rng: random.Random) -> dict:
    """Kill runs at random instants until that many were hit; each ends, in the end, as the run left alone did.

    Gives the outcome of all of them.
    """
    warm_up()
    seconds = attempt({**values, "output_dir": str(folder / "straight")})
    expected = outcome(folder / "straight")
    hits, run, at_once = 0, 0, 0
    while hits < kills:
        out = folder / f"run{run}"
        run += 1
        while (done := attempt({**values, "output_dir": str(out)}, rng.uniform(0, seconds))) is None:
            hits += 1
            at_once = at_once + 1 if not list_checkpoints(out) else 0
            for step, path in list_checkpoints(out):
                assert find_flaw(path, step) is None
            if hits >= kills or at_once > 5:
                done = attempt({**values, "output_dir": str(out)})
                break
        assert done is not None
        assert differences(expected, outcome(out)) == []
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
    return expected


def test_a_killed_run_ends_at_the_same_bits(values, tmp_path):
    short = {**values, "report": False, "trainer": {**values["trainer"], "num_train_epochs": 2}}
    kill_until(short, 2, tmp_path, random.Random(7))


@pytest.mark.slow
def test_twenty_kills_at_random_instants_end_at_the_same_bits(values, tmp_path):
    expected = kill_until(values, 20, tmp_path, random.Random(20))
    assert expected["state"]["global_step"] == expected["state"]["max_steps"]


@pytest.mark.slow
def test_twenty_kills_of_a_run_that_stops_early_end_at_the_same_bits(values, tmp_path):
    expected = kill_until(with_early_stopping(values), 20, tmp_path, random.Random(21))
    assert expected["state"]["global_step"] < expected["state"]["max_steps"]


def test_differences_are_seen():
    one = {"a": [torch.zeros(2), 1.0], "b": "x"}
    assert differences(one, {"a": [torch.zeros(2), 1.0], "b": "x"}) == []
    assert differences(one, {"a": [torch.tensor([0, 1e-45]), 1.0], "b": "x"}) == ["/a/0"]
    assert len(differences(one, {"a": [torch.zeros(2), 1.0000001], "b": "y"})) == 2
    assert differences(one, {"a": [torch.zeros(2)], "b": "x"}) != []

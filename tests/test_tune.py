"""The command that measures launch configurations, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from pyfinetune.bench import tune
from pyfinetune.kernels import measured
from pyfinetune.kernels.config import SHIPPED


def test_a_rehearsal_measures_and_adds_to_the_file(tmp_path):
    path = tmp_path / "tuned.json"
    other = {"kernel": "k", "capability": 90, "shape": {}, "blocks": {}, "num_warps": 1, "num_stages": 1}
    path.write_text(json.dumps({"entries": [other]}), encoding="utf-8")
    command = [sys.executable, "-m", "pyfinetune.bench.tune", "glu", "--dry-run", "--json", str(path)]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "2 entries written" in run.stdout
    assert run.stdout.startswith("glu_fwd [itemsize=2 ")
    assert sorted(kernel for kernel, _capability, _shape in measured.read(path)) == ["glu_bwd", "glu_fwd", "k"]
    made = {entry["kernel"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]}
    assert made["k"] == other
    assert made["glu_fwd"]["capability"] == 0
    assert made["glu_fwd"]["ms"] > 0
    assert made["glu_fwd"]["on"].startswith("Triton's interpreter, torch ")


def test_each_op_has_cases_that_run(monkeypatch):
    """By the reference, as the kernels' turn is the rehearsal's: the calls themselves are right."""
    monkeypatch.setenv("PYFINETUNE_BACKEND", "reference")
    for op, cases in tune.CASES.items():
        calls = list(cases(tune.Shapes(torch.device("cpu"), tiny=True)))
        assert calls, op
        for call in calls:
            call()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "nope: no such op"),
        (["--minutes", "0"], "--minutes 0: needs more than 0"),
        (["--minutes", "nan"], "--minutes nan: needs more than 0"),
        (["--dry-run", "--json", str(SHIPPED)], "must not ship"),
        (["glu"], "there is no GPU here"),
    ],
)
def test_a_mistake_is_told(monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "measure", lambda *args: pytest.fail("measured"))
    path = tmp_path / "notes.json"
    path.write_text("[]", encoding="utf-8")
    assert tune.main(["--json", str(path)]) == 2
    assert "needs an object with a list" in capsys.readouterr().err


def test_what_the_time_is_not_enough_for_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "measure", lambda *args: ([], False))
    assert tune.main(["glu", "--minutes", "2"]) == 0
    assert "stopped after 2 minutes; more: --minutes 4" in capsys.readouterr().out

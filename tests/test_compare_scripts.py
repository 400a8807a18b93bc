"""A training script as it is and through `pyfinetune run`: what is read from it, refused, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyfinetune.bench import compare_scripts
from pyfinetune.errors import UserError


def write(folder: Path, body: str) -> Path:
    script = folder / "script.py"
    script.write_text(body)
    return script


def test_what_a_script_says(tmp_path):
    said = {"losses": [2, 1.5], "tokens_per_second": 30}
    script = write(tmp_path, f"import sys\nprint('noise', sys.argv[1:])\nprint('{json.dumps(said)}')\n")
    found = compare_scripts.run_once(script, ["--steps", "3"], patched=False)
    assert found == {"losses": [2.0, 1.5], "rate": 30.0}
    assert compare_scripts.run_once(script, [], patched=True) == found


@pytest.mark.parametrize("body", ["", "print('done')", "print('{}')", "print('[1]')"])
def test_a_script_that_says_something_else(tmp_path, body):
    with pytest.raises(UserError, match=r"script\.py: its last line is no JSON with losses"):
        compare_scripts.run_once(write(tmp_path, body), [], patched=False)


def test_a_script_that_fails(tmp_path, capsys):
    script = write(tmp_path, "raise ValueError('mine')")
    with pytest.raises(UserError, match="exit code 1: ValueError: mine"):
        compare_scripts.run_once(script, [], patched=False)
    assert compare_scripts.main(["--script", str(script), "--rounds", "1"]) == 2
    assert "ValueError: mine" in capsys.readouterr().err


def test_both_ways_take_turns(monkeypatch, tmp_path, capsys):
    order = []

    def run_once(script, arguments, patched):
        order.append(patched)
        return {"losses": [3.0, 2.5 if patched else 2.25], "rate": {False: 10.0, True: 30.0}[patched] + len(order)}

    monkeypatch.setattr(compare_scripts, "run_once", run_once)
    path = tmp_path / "found.json"
    assert compare_scripts.main(["--rounds", "3", "--json", str(path), "--model", "tiny"]) == 0
    assert order == [False, True, True, False, False, True]
    found = json.loads(path.read_text())
    assert found["plain"] == {"losses": [3.0, 2.25], "rates": [11.0, 14.0, 15.0]}
    assert found["ours"]["rates"] == [32.0, 33.0, 36.0]
    assert found["ratio"] == pytest.approx(33 / 14)
    assert found["loss_gap"] == 0.25
    assert found["arguments"] == ["--model", "tiny"]
    assert "ratio 2.36x; losses differ by at most 0.25" in capsys.readouterr().out


def test_bad_arguments_cost_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare_scripts, "run_once", lambda *args, **kwargs: pytest.fail("it ran"))
    assert compare_scripts.main(["--rounds", "0"]) == 2
    assert "--rounds 0: needs 1 at least" in capsys.readouterr().err
    assert compare_scripts.main(["--json", str(tmp_path / "none" / "found.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_runs_of_other_lengths_cannot_be_compared(monkeypatch):
    def run_once(script, arguments, patched):
        return {"losses": [1.0] * (2 - patched), "rate": 1.0}

    monkeypatch.setattr(compare_scripts, "run_once", run_once)
    with pytest.raises(UserError, match="2 losses as it is and 1 patched"):
        compare_scripts.compare(Path("script.py"), [], 1)


@pytest.mark.slow
def test_an_sft_script_has_the_same_losses():
    """TRL's trainer, packed rows, bfloat16: as far apart as one rounding to bfloat16 of the loss."""
    pytest.importorskip("trl")
    found = compare_scripts.compare(compare_scripts.SCRIPT, ["--model", "tiny", "--steps", "8"], rounds=1)
    losses = found["plain"]["losses"]
    assert len(losses) == len(found["ours"]["losses"]) == 8
    assert found["loss_gap"] <= 2**-8 * losses[0]
    assert len(set(losses)) == 8

"""The command line: exit codes, what goes to which stream, and that every mistake prints its mend."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from rich.console import Console
from tiny_model import save_tiny, tiny_fixture  # noqa: F401

from pyfinetune import cli
from pyfinetune.train.config import parse_config
from pyfinetune.train.run import train

PAIRS = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)]


def write_run(folder, model, rows=PAIRS, **change) -> str:
    data = folder / "rows.jsonl"
    data.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    values = {
        "model_name_or_path": model,
        "train_file": str(data),
        "output_dir": str(folder / "out"),
        "max_length": 32,
        "device": "cpu",
        "trainer": {"max_steps": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**values, **change}))
    return str(path)


def call(monkeypatch, *arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["pyfinetune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def test_train_prints_its_result(tiny, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "train", write_run(tmp_path, tiny, test_size=2)) == 0
    out, err = capsys.readouterr()
    assert "2 steps" in out
    assert "held-out loss" in out
    assert f"saved: {tmp_path / 'out'}" in out
    assert "step 2/2: loss" in err
    assert "tokens/s" in err


def test_json_has_standard_output_to_itself(tiny, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "train", write_run(tmp_path, tiny), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert result["output_dir"] == str(tmp_path / "out")
    assert result["eval_loss"] is None


def test_info(monkeypatch, capsys):
    assert call(monkeypatch, "info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__
    assert call(monkeypatch, "info") == 0
    assert torch.__version__ in capsys.readouterr().out


def test_ctrl_c_while_loading_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyfinetune.train.run.train", interrupted)
    path = write_run(tmp_path, tiny)
    assert call(monkeypatch, "train", path) == 130
    assert f"go on from the last checkpoint with: pyfinetune train {path}" in capsys.readouterr().err


def test_a_missing_extra_is_named(tiny, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("pyfinetune.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert call(monkeypatch, "train", write_run(tmp_path, tiny)) == 2
    assert "pip install 'pyfinetune[hf]'" in capsys.readouterr().err


def broken(name: str, folder, tiny: str) -> tuple[str, str, str]:
    """A run with one mistake: its YAML file, what the message names, and what the mend names."""
    data = folder / "rows.jsonl"
    if name == "missing configuration":
        return str(folder / "absent.yaml"), "absent.yaml: no such file", "pyfinetune train"
    if name == "missing data":
        return write_run(folder, tiny, train_file="absent.json"), "absent.json: no such file", "correct the path"
    if name == "unknown key":
        return write_run(folder, tiny, lora_rank=8), "unknown key 'lora_rank'", "did you mean lora_r"
    if name == "unknown method":
        return (
            write_run(folder, tiny, method="galore"),
            "method: 'galore' is not available",
            "lora, rslora, dora, qlora, full",
        )
    if name == "unknown training argument":
        path = write_run(folder, tiny, trainer={"learning_rte": 1})
        return path, "trainer: learning_rte", "did you mean learning_rate"
    if name == "row without a field":
        return (
            write_run(folder, tiny, [*PAIRS, {"prompt": "x"}]),
            f"{data}, row 9: has no 'completion'",
            "remove the row",
        )
    if name == "mixed formats":
        path = write_run(folder, tiny, [*PAIRS, {"instruction": "x", "output": "y"}])
        return path, f"{data}, row 9: is Alpaca, but {data}, row 1 is prompt/completion", "one format"
    if name == "broken JSON":
        return write_run(folder, tiny, [*PAIRS, '{"prompt": ']), f"{data}, row 9: broken JSON", "correct that line"
    if name == "empty completion":
        path = write_run(folder, tiny, [*PAIRS, {"prompt": "x", "completion": ""}])
        return path, f"{data}, row 9: completion is empty", "remove the row"
    if name == "nothing learned":
        path = write_run(folder, tiny, [{"prompt": "x" * 99, "completion": "y"}])
        return path, "no token would be learned", "raise max_length"
    if name == "no end token":
        model = save_tiny(folder / "model", end=None)
        return write_run(folder, model), "has no end token", "set eos_token"
    if name == "no GPU":
        return write_run(folder, tiny, device="cuda"), "device: cuda was asked for", "device: auto or cpu"
    if name == "no model":
        return write_run(folder, str(folder / "nowhere")), "model_name_or_path", "a model's name on the hub"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "missing configuration",
        "missing data",
        "unknown key",
        "unknown method",
        "unknown training argument",
        "row without a field",
        "mixed formats",
        "broken JSON",
        "empty completion",
        "nothing learned",
        "no end token",
        "no GPU",
        "no model",
    ],
)
def test_a_mistake_exits_2_and_names_its_place_and_mend(tiny, tmp_path, monkeypatch, capsys, name):
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path, message, fix = broken(name, tmp_path, tiny)
    assert call(monkeypatch, "train", path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    problem, _, mend = err.partition("\n  fix: ")
    assert message in problem
    assert "error: " in problem
    assert fix in mend
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_answers_that_max_length_cuts_are_reported(tiny, tmp_path, monkeypatch, capsys):
    rows = [*PAIRS, {"prompt": "x" * 99, "completion": "y"}, {"prompt": "x", "completion": "y" * 99}]
    assert call(monkeypatch, "train", write_run(tmp_path, tiny, rows)) == 0
    err = capsys.readouterr().err
    assert "warning: 1 answers are cut short, without their end, by max_length 32" in err
    assert "warning: 1 rows are left out, their whole answer cut off by max_length 32" in err
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train"]
    assert (counts["cut_short"], counts["dropped"], counts["documents"]) == (1, 1, 9)


def test_the_progress_bar_shows_loss_speed_and_memory(tiny, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with open(write_run(tmp_path, tiny)) as file:
        train(parse_config(yaml.safe_load(file)), console)
    shown = console.file.getvalue()
    assert "2/2" in shown
    for fact in ("loss ", "tokens/s", " GB"):
        assert fact in shown


@pytest.mark.slow
def test_a_terminated_process_saves_and_exits_130(tiny, tmp_path):
    path = write_run(tmp_path, tiny, trainer={"max_steps": 100_000, "logging_steps": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "pyfinetune.cli", "train", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"go on with: pyfinetune train {path}" in out
    assert list((tmp_path / "out").glob("checkpoint-*"))

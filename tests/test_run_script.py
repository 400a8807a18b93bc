"""`pyfinetune run`: an unchanged script trains to the same losses, patched; its arguments and exit code are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
rows = [{"input_ids": torch.randint(96, (24,)).tolist()} for _ in range(16)]
for row in rows:
    row["labels"] = row["input_ids"]
arguments = TrainingArguments(sys.argv[1], max_steps=6, learning_rate=0.01, logging_steps=1, report_to=[], use_cpu=True,
                              per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
fast = sum(type(module).__name__.startswith("Fast") for module in model.modules())
print(json.dumps({"losses": losses, "fast": fast, "arguments": sys.argv[1:], "name": __name__}))
sys.exit(int(sys.argv[2]))
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYFINETUNE_RECYCLE_PAGES": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_an_unchanged_script_has_the_same_losses(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    plain = python("script.py", "out", "0", "--flag=1", cwd=tmp_path)
    ours = python("-m", "pyfinetune.cli", "run", "script.py", "out", "0", "--flag=1", cwd=tmp_path)
    assert (plain.returncode, ours.returncode) == (0, 0), ours.stderr
    before, after = (json.loads(done.stdout.splitlines()[-1]) for done in (plain, ours))
    assert before["fast"] == 0
    assert after["fast"] >= 14 + 5 + 2 + 2
    assert after["arguments"] == before["arguments"] == ["out", "0", "--flag=1"]
    assert after["name"] == "__main__"
    assert "modules swapped" in ours.stderr
    # Trainer logs losses rounded to four digits, and six steps of AdamW carry a rounding on.
    assert all(abs(a - b) <= 2e-4 for a, b in zip(before["losses"], after["losses"], strict=True))
    assert after["losses"][-1] < after["losses"][0]


def test_exit_code_modules_and_what_goes_wrong(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv[1:], sys.path[0])\nsys.exit(7)\n")
    done = python("-m", "pyfinetune.cli", "run", "script.py", "--help", "-m", "x", cwd=tmp_path)
    assert done.returncode == 7
    assert "['--help', '-m', 'x']" in done.stdout
    assert str(tmp_path) in done.stdout
    as_module = python("-m", "pyfinetune.cli", "run", "-m", "script", "a", cwd=tmp_path)
    assert (as_module.returncode, "['a']" in as_module.stdout) == (7, True), as_module.stderr
    missing = python("-m", "pyfinetune.cli", "run", "nothing.py", cwd=tmp_path)
    assert missing.returncode == 2
    assert "nothing.py: no such file" in missing.stderr
    (tmp_path / "fails.py").write_text("raise ValueError('mine')\n")
    failed = python("-m", "pyfinetune.cli", "run", "fails.py", cwd=tmp_path)
    assert failed.returncode == 1
    assert "ValueError: mine" in failed.stderr
    (tmp_path / "quiet.py").write_text("print('done')\n")
    quiet = python("-m", "pyfinetune.cli", "run", "quiet.py", cwd=tmp_path)
    assert quiet.returncode == 0
    assert "started no transformers Trainer" in quiet.stderr

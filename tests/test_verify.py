"""`verify`: yes for a patched model, no for a wrong one, in numbers, text, JSON and exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import make, no_change_of, with_lora
from typer.testing import CliRunner

import pyfinetune as pf
from pyfinetune.cli import app

pytest.importorskip("transformers")
pytest.importorskip("peft")

from pyfinetune.hf import rms_norm as norms
from pyfinetune.hf import verify as verify_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_right_model_is_said_to_be_right(dtype):
    model = make("Llama", dtype)
    with no_change_of(model):
        verdict = pf.verify(model, steps=2)
    assert verdict.ok, verdict
    assert verdict.exact == "float64"
    names = [item.name for item in verdict.items]
    assert {"loss", "logits", "a packed document beside another", "loss after 2 steps"} <= set(names)
    assert sum(name.startswith("grad of ") for name in names) == len(list(model.parameters()))
    assert str(verdict).startswith("equal within rounding")
    parsed = json.loads(verdict.to_json())
    assert parsed["ok"] is True
    assert len(parsed["items"]) == len(verdict.items)


def test_a_patched_model_is_compared_with_its_original():
    model = with_lora(make("Qwen2"))
    report = pf.patch(model)
    kinds = [type(module) for module in model.modules()]
    verdict = pf.verify(model, steps=0)
    assert verdict.ok, verdict
    assert verdict.notes[0] == f"{report.swapped} of {len(report.rows)} modules swapped"
    assert [type(module) for module in model.modules()] == kinds


def test_fresh_adapters_hide_nothing(monkeypatch):
    """With B = 0 a wrong scaling of the adapters would pass any comparison."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("Llama"), LoraConfig(r=4, target_modules="all-linear"))
    verdict = pf.verify(model, steps=0)
    grads = [item for item in verdict.items if "lora_A" in item.name]
    assert verdict.ok, verdict
    assert all(item.usual > 0 for item in grads)  # a gradient of zero has no error
    assert not any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_a_fault_after_the_proof_is_found(monkeypatch):
    """One per cent in one kernel, put in after the probe has passed."""
    right = norms.rms_norm
    patch = verify_module.patch

    def patch_then_break(model):
        report = patch(model)
        monkeypatch.setattr(norms, "rms_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
        return report

    monkeypatch.setattr(verify_module, "patch", patch_then_break)
    verdict = pf.verify(make("Llama"), steps=1)
    assert not verdict.ok
    assert not {item.name: item for item in verdict.items}["logits"].ok
    assert str(verdict).startswith("NOT EQUAL")
    assert "TOO FAR OFF" in str(verdict)


def test_what_it_does_not_take():
    model = make("Llama")
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(pf.InvalidInput, match="model is dict"):
        pf.verify({})
    with pytest.raises(pf.InvalidInput, match="batch has no labels"):
        pf.verify(model, {"input_ids": ids})
    with pytest.raises(pf.InvalidInput, match="no parameter"):
        pf.verify(model.requires_grad_(False))


def test_the_command_line(tmp_path, monkeypatch):
    make("Llama").save_pretrained(tmp_path / "model")
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(tmp_path / "model"), "--steps", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout[done.stdout.index("{") :])["ok"] is True
    monkeypatch.setattr(verify_module, "judge", lambda *args, **kwargs: [verify_module.Item("loss", 1.0, 0.0, 0.1)])
    assert runner.invoke(app, ["verify", str(tmp_path / "model"), "--steps", "0"]).exit_code == 1
    with pytest.raises(pf.UserError, match="cannot be loaded"):
        runner.invoke(app, ["verify", str(tmp_path / "nothing")], catch_exceptions=False)
